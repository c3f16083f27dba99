"""Number of calls of a stage's programs, from the configs and the number of rows of the data."""

import math

from rlhf_jax.config import StageName
from rlhf_jax.data import pipeline
from rlhf_jax.experiment import Experiment
from rlhf_jax.loading.context import steps_for
from rlhf_jax.methods.offline import OfflineConfig
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.stages.best_of_n import BestOfNConfig
from rlhf_jax.stages.evaluate import EvaluateConfig
from rlhf_jax.stages.kto import KTOConfig
from rlhf_jax.stages.noisy_labels import NoisyLabelsConfig
from rlhf_jax.stages.pool import PoolConfig
from rlhf_jax.stages.preferences import PreferencesConfig
from rlhf_jax.stages.rejection_sampling import KeepBest, KeepSoft, RejectionSamplingConfig
from rlhf_jax.stages.reward_model import RewardModelConfig
from rlhf_jax.stages.sft import SFTConfig


def calls(experiment: Experiment, name: str) -> int | None:
    """Return the steps, iterations or batches of samples of a stage; None if they depend on what earlier stages find.

    Raises RlhfError if the data cannot be read.
    """
    stage = experiment.stages[name]
    if isinstance(stage, OnlineConfig):
        return stage.iterations
    if isinstance(stage, OfflineConfig):
        rows = _training_rows(experiment, stage)
        per_call = stage.loop.steps_per_call
        return None if rows is None else steps_for(stage.epochs, rows, stage.batch_size, per_call)
    responses = _responses(stage)
    return None if responses is None else math.ceil(responses / experiment.runtime.inference_batch)


def _responses(stage: object) -> int | None:
    """Responses that a stage samples; an evaluation has those of every policy, on both splits."""
    if isinstance(stage, PreferencesConfig | RejectionSamplingConfig):
        return stage.prompts * stage.samples_per_prompt
    if isinstance(stage, BestOfNConfig):
        return stage.prompts * stage.pool
    if isinstance(stage, PoolConfig):
        return stage.prompts * stage.samples
    if isinstance(stage, EvaluateConfig):
        methods = 1 + len(stage.policies) + len(stage.against) + max(stage.best_of, default=0)
        return methods * (stage.prompts + stage.selection_prompts)
    return None


def _training_rows(experiment: Experiment, stage: OfflineConfig) -> int | None:
    if isinstance(stage, SFTConfig):
        return _rows(experiment, stage.demonstrations)
    if isinstance(stage, RewardModelConfig) and not stage.loss.spec.pairwise:
        found = None if stage.preferences is None else experiment.stages[stage.preferences]
        return found.prompts - found.eval_prompts if isinstance(found, PreferencesConfig) else None
    source = getattr(stage, "preferences", None)
    rows = _rows(experiment, source)
    if not isinstance(stage, KTOConfig) or rows is None:
        return rows
    splits = source is not None or "chosen" in pipeline.load_rows(experiment.data, "train")[0]
    return 2 * rows if splits else rows


def _rows(experiment: Experiment, source: StageName | None) -> int | None:
    """Training rows of an earlier stage, or of the experiment's data."""
    if source is None:
        return len(pipeline.load_rows(experiment.data, "train"))
    stage = experiment.stages[source]
    if isinstance(stage, NoisyLabelsConfig):
        return stage.pairs or _rows(experiment, stage.preferences)
    if isinstance(stage, PreferencesConfig):
        each = math.comb(stage.samples_per_prompt, 2) if stage.pairs == "all" else 1
        return (stage.prompts - stage.eval_prompts) * each
    if isinstance(stage, RejectionSamplingConfig) and isinstance(stage.keep, KeepBest | KeepSoft):
        each = stage.keep.best if isinstance(stage.keep, KeepBest) else 1
        return (stage.prompts - stage.eval_prompts) * each
    return None
