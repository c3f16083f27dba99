"""pool: sample many responses per prompt, and score them with several reward models and a judge.

Best-of-N, its soft and pessimistic variants, and ensembles of any combination can then be compared on the same samples
(`rlhf_jax.core.selection`), without sampling or scoring again.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_jax import processes
from rlhf_jax.config import Count, ModelSource, Positive, check_ranges
from rlhf_jax.data import pipeline
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.samples import draw_and_sample, texts
from rlhf_jax.rewards.judging import make_judge
from rlhf_jax.rewards.scorers import make_scorer
from rlhf_jax.rewards.sources import RewardSource

POOL_FILE = "pool.npz"
GOLD, LENGTH = "gold", "length"


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Policy to sample from, reward models to compare, and the judge."""

    kind: Literal["pool"]
    policy: ModelSource  # policy to sample from
    reward_models: tuple[ModelSource, ...]  # reward models that score the responses
    judge: RewardSource | None  # gold stage, or reward, that scores the responses; None: no judge
    prompts: Count  # prompts of the test split
    samples: Count  # responses per prompt
    temperature: Positive  # temperature of the samples

    def __post_init__(self) -> None:
        check_ranges(self)
        names = (GOLD, LENGTH, *self.reward_models)
        if len(set(names)) < len(names):
            raise ValueError(
                f"reward_models = {self.reward_models}: names must differ from each other, and from {names[:2]}"
            )


def run(config: PoolConfig, context: Context) -> dict[str, Any]:
    """Write `pool.npz`, arrays [prompts, samples]: scores by reward model, `gold` with a judge, and `length` in tokens.

    The scores of an ensemble are those of its members, [members, prompts, samples].
    """
    policy, table = context.policy(config.policy), pipeline.load_rows(context.data, "test")
    report_prompts(context, policy.tokenizer, {"test": table})
    drawn = draw_and_sample(
        policy, table, context, prompts=config.prompts, samples=config.samples, temperature=config.temperature
    )
    rollout, shape = drawn.rollout, (config.prompts, config.samples)
    found = {LENGTH: rollout.response_mask.sum(axis=1).reshape(shape)}
    if config.judge is not None:
        whole = [prompt + completion for prompt, completion in zip(*texts(policy.tokenizer, rollout), strict=True)]
        found[GOLD] = make_judge(config.judge, context)(policy, table)(rollout, whole).reshape(shape)
    for done, source in enumerate(config.reward_models, start=1):
        members = context.reward_model(source).members()
        scorers = [
            make_scorer(member, policy, table, context.data, context.runtime.inference_batch) for member in members
        ]
        scores = [scorer(rollout).reshape(shape) for scorer in scorers]
        found[source] = np.stack(scores) if len(scores) > 1 else scores[0]
        context.bar.update(done, len(config.reward_models), {})
    if processes.is_first():
        with (context.directory / POOL_FILE).open("wb") as file:
            np.savez_compressed(file, **{name: values.astype(np.float32) for name, values in found.items()})
    return {"prompts": config.prompts, "samples": config.samples, "prompt_key": drawn.key}


def load_pool(directory: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a stage's directory, float64."""
    with np.load(directory / POOL_FILE) as arrays:
        return {name: arrays[name].astype(np.float64) for name in arrays.files}
