"""reward_model: train a reward model on preferences, with the Bradley-Terry loss or a variant.

Trains a single model, or an ensemble in one program with separate initialisations and data orders (Coste et al. 2023,
arXiv:2310.02743). Member k equals a single run with seed + k.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from rlhf_jax.config import AtLeastTwo, ModelSource, Positive, StageName, check_ranges
from rlhf_jax.core.metrics import Metric
from rlhf_jax.data import pipeline
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_answers
from rlhf_jax.loading.models import Pretrained, RewardModel, as_reward_model, refuse_float16
from rlhf_jax.loading.samples import draw_and_sample
from rlhf_jax.loading.stage_models import load_stage_reward_model, save_reward_spec
from rlhf_jax.loading.tables import evaluation_rows
from rlhf_jax.loading.trainable import full_params, init_trainable, trainable
from rlhf_jax.methods import reward as reward_loss
from rlhf_jax.methods.offline import OfflineConfig, OfflineMethod, Updates, train_offline
from rlhf_jax.methods.reward_report import HeldOut, evaluate, report
from rlhf_jax.methods.reward_table import BRADLEY_TERRY, RewardLossConfig
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.reward_ensemble import EnsembleConfig
from rlhf_jax.models.scalars import Pooling, ScalarNetwork
from rlhf_jax.rewards.scorers import make_scorer
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Rows
from rlhf_jax.runtime.programs import Step
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class NormaliseConfig:
    """Policy on whose samples (one per prompt) scores are normalised to mean 0 and variance 1."""

    policy: ModelSource  # policy whose samples are scored
    prompts: AtLeastTwo  # prompts of the training split, drawn at random, one sample each
    temperature: Positive = 1.0  # temperature of the samples; use that of the later fine-tuning

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelConfig(OfflineConfig):
    """The reward model, from scratch or from a checkpoint or stage, and its loss."""

    kind: Literal["reward_model"]
    policy: ModelSource | None  # policy whose tokenizer a model from scratch uses
    preferences: StageName | None  # stage that made the preferences; None: the experiment's data
    # Shape of a model from scratch, or the model to start from; a language model's head is replaced.
    model: ModelConfig | Pretrained
    pooling: Pooling  # tokens that the score is read from
    loss: RewardLossConfig = BRADLEY_TERRY
    ensemble: EnsembleConfig | None = None  # train several members at once; None: one model
    # Scale scores to mean 0 and variance 1 on samples of a policy; None: do not scale.
    normalise: NormaliseConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_float16(self.model, adapter=isinstance(self.model, Pretrained) and self.model.lora is not None)
        if (self.policy is None) != isinstance(self.model, Pretrained):
            raise ValueError("policy provides the tokenizer of a model from scratch, and must be None with model.init")
        if self.ensemble is not None and self.model.attention == "cudnn":
            raise ValueError("model.attention = 'cudnn' does not support ensembles: set it to 'xla'")


def run(config: RewardModelConfig, context: Context) -> dict[str, Any]:
    """Train on the training pairs, evaluate on held-out pairs, and write `calibration.json` of all held-out pairs."""
    members = 1 if config.ensemble is None else config.ensemble.members
    starts = [make_reward_model(config, context, member) for member in range(members)]
    tuning = config.model if isinstance(config.model, Pretrained) else None
    network = trainable(starts[0].network, tuning)
    initial = [
        init_trainable(network, start.params, context.key("adapter", member)) for member, start in enumerate(starts)
    ]
    # Without an adapter, the first weights are not kept.
    model = starts[0]._replace(network=dataclasses.replace(network, ensemble=config.ensemble), params=initial[0].base)
    starts.clear()
    origin = context.base(tuning.init, tuning) if tuning else None
    save_reward_spec(context.directory, model, base=origin)
    rows, held_out = reward_loss.load_rows(config.loss, context, config.preferences)
    data = reward_loss.make_table(config.loss, rows, model.tokenizer, context.data)
    all_held_out, eval_data = (
        HeldOut(pipeline.preferences(table, model.tokenizer, context.data), table)
        for table in (held_out, evaluation_rows(held_out, config.eval_rows))
    )
    report_answers(context, model.tokenizer, {"train": rows, "eval": held_out}, config.preferences)
    frozen = {"base": initial[0].base}

    def evaluation(trained: PyTree, member: int) -> tuple[dict[str, float], Rows]:
        del member
        return evaluate(network, full_params(network, trained["reward"], frozen, "base"), eval_data, context)

    method = OfflineMethod(
        step=lambda updates: make_step(updates, config.loss),
        start=lambda updates, member: updates.init({"reward": initial[member].trained}),
        frozen=frozen,
        evaluate=evaluation,
        key_figures=("loss", "accuracy", "eval/accuracy", "token_share"),
    )
    trained = train_offline(config, context, network, data, method, runs=range(members))
    load = functools.partial(load_stage_reward_model, context.directory, find=context.workdir.find, where=context.where)
    if config.normalise is not None:
        found = score_moments(config.normalise, load(), context)
        save_reward_spec(context.directory, model, base=origin, moments=found)
    finished = load()
    figures = report(finished, all_held_out, context)
    return {"train_pairs": len(rows), "eval_pairs": len(held_out), **trained, **figures}


def make_reward_model(config: RewardModelConfig, context: Context, member: int = 0) -> RewardModel:
    """Initialise the reward model; ensemble members differ in their random weights."""
    if not isinstance(config.model, Pretrained):
        assert config.policy is not None
        policy = context.policy(config.policy)
        network = ScalarNetwork(config.model, policy.network.vocab_size, config.pooling)
        return RewardModel(network, network.init(context.key("init", member)), policy.tokenizer)
    found = context.model(config.model.init, config.model)
    start = found if isinstance(found, RewardModel) else as_reward_model(found, context.key("init", member))
    if start.network.ensemble is not None:
        raise RlhfError(
            f"config.{context.name}.model.init = {config.model.init!r} is an ensemble: name a single model to start "
            "from"
        )
    return start._replace(network=dataclasses.replace(start.network, pooling=config.pooling))


def make_step(updates: Updates[ScalarNetwork], loss_config: RewardLossConfig = BRADLEY_TERRY) -> Step:
    """Make the step: one update on the batch that the loss reads, a PreferenceBatch for the default loss."""
    network, axes = updates.network, updates.axes

    def step(
        state: TrainState, frozen: PyTree, batch: reward_loss.Batch, run_key: jax.Array
    ) -> tuple[TrainState, dict[str, Array], tuple]:
        def loss_fn(
            params: PyTree, rows: reward_loss.Batch, keys: Key[Array, "B"] | None
        ) -> tuple[Array, dict[str, Metric]]:
            reward = full_params(network, params["reward"], frozen, "base")
            return reward_loss.loss(loss_config, network, reward, rows, dropout_keys=keys, axes=axes)

        def weight(rows: reward_loss.Batch) -> Array:
            return reward_loss.weight(loss_config, rows, axes)

        state, logged = updates.update(state, batch, run_key, loss_fn, weight=weight)
        return state, logged | reward_loss.token_counts(batch, axes), ()

    return step


def score_moments(config: NormaliseConfig, model: RewardModel, context: Context) -> list[tuple[float, float]]:
    """Mean and standard deviation of the scores of a policy's samples, for every member of an ensemble.

    `load_stage_reward_model` uses them to shift and scale the reward to mean 0 and standard deviation 1 on samples of
    the initial policy, as Ziegler et al. 2019 (arXiv:1909.08593) do; Stiennon et al. 2020 (arXiv:2009.01325) only shift
    it. Raises RlhfError if all samples have the same score.
    """
    policy = context.policy(config.policy)
    rows = pipeline.load_rows(context.data, "train")
    drawn = draw_and_sample(
        policy,
        rows,
        context,
        prompts=config.prompts,
        samples=1,
        temperature=config.temperature,
        field="normalise.prompts",
        purpose="normalise: ",
    )
    moments = []
    for member in model.members():
        scores = make_scorer(member, policy, rows, context.data, context.runtime.inference_batch)(drawn.rollout)
        mean, deviation = float(np.mean(scores, dtype=np.float64)), float(np.std(scores, dtype=np.float64))
        if not deviation > 0:
            raise RlhfError(
                f"config.{context.name}.normalise: all {config.prompts} samples of {config.policy} have the score "
                f"{mean:.4g} and cannot be scaled: train the reward model for longer, or set normalise to None"
            )
        moments.append((mean, deviation))
    return moments
