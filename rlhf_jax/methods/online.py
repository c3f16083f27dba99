"""Shared config and driver of the online methods, with one run per seed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.config import Count, CountOrZero, ModelSource, NonNegative, Positive, check_ranges
from rlhf_jax.data.prompts import MixedSource, PromptSource
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import NO_CHANGES, Policy, Tuning, refuse_float16
from rlhf_jax.loading.samples import sample_rows
from rlhf_jax.loading.trainable import stack
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import LoopConfig, Task, train
from rlhf_jax.runtime.optimizers import OptimizerConfig
from rlhf_jax.runtime.programs import HostSteps, Placement, Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Config fields of all online methods: the initial policy, which is also the reference, and the training length."""

    policy: ModelSource  # policy to start from, and the reference
    iterations: Count  # rounds of sampling and learning
    batch_size: Count  # responses in an iteration, or pairs of them in online_dpo
    minibatches: Count  # updates in a pass over an iteration's responses
    epochs: Count  # passes over an iteration's responses
    temperature: Positive  # temperature of the samples
    optimizer: OptimizerConfig
    samples_every: Count  # iterations between those whose samples are written
    samples_written: CountOrZero  # samples written from such an iteration
    loop: LoopConfig
    missing_eos_penalty: NonNegative = 0.0  # penalty on the score of a response that was cut off
    tuning: Tuning = NO_CHANGES

    def __post_init__(self) -> None:
        refuse_float16(self.tuning, adapter=self.tuning.lora is not None)
        check_ranges(self)
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size = {self.batch_size} does not divide into {self.minibatches} minibatches")

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole run."""
        return self.iterations * self.epochs * self.minibatches


def prompt_keys(context: Context) -> tuple[PRNGKeyArray, ...]:
    """Keys that the prompts of `context.seeds` runs are drawn with."""
    return tuple(context.key("prompts", k) for k in range(context.seeds))


def train_online(
    config: OnlineConfig,
    context: Context,
    placement: Placement,
    policy: Policy,
    *,
    step: Step | HostSteps,
    start: Callable[[PRNGKeyArray], TrainState],
    frozen: dict[str, PyTree],
    prompts: PromptSource | MixedSource,
    key_figures: tuple[str, ...],
) -> dict[str, Any]:
    """Trains `context.seeds` policies at once, each with its own prompts, samples and initial key.

    Args: start makes a run's first state with the key that new parameters are drawn with; step's samples have a
    rollout, scores and divergences.
    Returns what the summary says of how prompts were drawn.
    """

    def describe(step: int, samples: Any) -> list[dict[str, Any]]:
        if step % config.samples_every and step != 1:
            return []
        shown = jax.tree.map(lambda leaf: leaf[: config.samples_written], samples)
        return sample_rows(policy.tokenizer, shown.rollout, shown.scores.tolist(), shown.kl.tolist())

    task = Task(
        step=step,
        state=stack([start(context.key("init", k)) for k in range(context.seeds)]),
        frozen=frozen,
        batch_at=prompts,
        run_key=stack([context.key("run", k) for k in range(context.seeds)]),
        total_steps=config.iterations,
        key_figures=key_figures,
        evaluation=None,
        describe=describe,
    )
    train(task, config.loop, placement, context.seed, context.directory, context.bar)
    return {"prompt_key": [np.asarray(jax.random.key_data(key)).tolist() for key in prompt_keys(context)]}
