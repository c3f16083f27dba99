"""Context of a stage: shared settings, and access to the outputs of earlier stages."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rlhf_jax.config import Count, CountOrZero
from rlhf_jax.core.keys import derive
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.loading.models import NO_CHANGES, Policy, RewardModel, Tuning, merged, tuned
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.stage_models import Base, load_stage
from rlhf_jax.models.quantised import quantised
from rlhf_jax.models.sharding import Where
from rlhf_jax.runtime.programs import Placement, RuntimeConfig, make_placement
from rlhf_jax.runtime.progress import Bar
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class Common:
    """Config fields shared by all stages."""

    seed: CountOrZero  # seed of all random numbers; run k of a stage with several runs uses seed + k
    seeds: Count  # runs that dpo, kto, online_dpo, ppo and group_rl train at once; other kinds train one
    stages: tuple[str, ...]  # names of the stages to run, in order; each has a section of its own
    data: DataConfig
    runtime: RuntimeConfig


class Together(NamedTuple):
    """Stages of several work directories that train at once, and differ in numbers of their configs."""

    directories: tuple[Path, ...]
    numbers: Mapping[str, tuple[float, ...]]  # values of a field, given by dotted path, in each stage


@dataclasses.dataclass(frozen=True)
class Context:
    """Everything that a stage runs with: its name and directory, seeds, data, devices, and earlier stages."""

    workdir: Workdir
    stages: tuple[str, ...]  # all stages of the experiment; any other model source is a checkpoint
    name: str
    seed: int
    seeds: int
    data: DataConfig
    runtime: RuntimeConfig
    bar: Bar
    together: Together | None = None  # None: the stage trains alone

    @property
    def directory(self) -> Path:
        """Output directory of this stage."""
        return self.workdir.directory(self.name)

    @property
    def directories(self) -> tuple[Path, ...]:
        """Output directories of all stages that train at once."""
        return self.together.directories if self.together else (self.directory,)

    @property
    def runs(self) -> tuple[int, ...]:
        """Number k of the seed, `seed` + k, of each run that trains at once: the seeds of each stage."""
        return tuple(range(self.seeds)) * len(self.directories)

    @property
    def per_run(self) -> dict[str, Float[Array, "runs"]]:
        """Numbers of the config that differ between the runs, by dotted path."""
        numbers = self.together.numbers if self.together else {}
        return {path: jnp.repeat(jnp.array(values, jnp.float32), self.seeds) for path, values in numbers.items()}

    def number_of_runs(self, path: str, alone: float) -> list[float]:
        """Value of a number of the config in each run; `alone` if the runs do not differ in it."""
        numbers = self.together.numbers if self.together else {}
        return [value for value in numbers.get(path, (alone,) * len(self.directories)) for _ in range(self.seeds)]

    def key(self, tag: str, seed_index: int = 0) -> PRNGKeyArray:
        """Derive the random key for one purpose, the tag, in run `seed_index` from its seed and the stage's name."""
        return derive(derive(jax.random.key(self.seed + seed_index), self.name), tag)

    def placement(self, seeds: int = 1) -> Placement:
        """Place this many simultaneous runs on the devices."""
        return make_placement(self.runtime, seeds)

    @property
    def where(self) -> Where:
        """Function that gives the sharding of each parameter of a loaded model."""
        return self.placement().where

    def sampling(self, tokenizer: Tokenizer, temperature: float) -> Sampling:
        """Sampling settings with at most data.max_response_tokens new tokens."""
        return Sampling(self.data.max_response_tokens, temperature, tokenizer.stop_ids)

    def policy(self, source: str, tuning: Tuning = NO_CHANGES) -> Policy:
        """Load the policy of an earlier stage (its first seed) or a checkpoint."""
        model = self.model(source, tuning)
        if not isinstance(model, Policy):
            raise RlhfError(f"config.{self.name}: {source} is a reward model where a language model is needed")
        return model

    def base(self, source: str, tuning: Tuning) -> Base | None:
        """Return the source, a stage or a checkpoint, as the base of the adapter; None without an adapter."""
        return None if tuning.lora is None else Base(source, source in self.stages)

    def reward_model(self, source: str) -> RewardModel:
        """Load the reward model of an earlier stage or a checkpoint."""
        model = self.model(source)
        if not isinstance(model, RewardModel):
            raise RlhfError(f"config.{self.name}: {source} is a language model where a reward model is needed")
        return model

    def model(self, source: str, tuning: Tuning = NO_CHANGES) -> Policy | RewardModel:
        """Load the model of an earlier stage or a checkpoint, with the dtypes and options of `tuning`.

        The base of an adapter is quantised where `tuning` says so. A checkpoint's weights are quantised one by one as
        they are read, a stage's once all are.
        """
        platform = self.placement().platform
        needed = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}.get(tuning.attention)
        if needed is not None and platform != needed[0]:
            raise RlhfError(
                f"config.{self.name}: attention = {tuning.attention!r} needs {needed[1]}, but this runs on {platform}: "
                "set it to 'xla'"
            )
        self.bar.now(f"loading {source}")
        if source not in self.stages:
            found = load_checkpoint(source, tuning, where=self.where)
        elif tuning.family is not None:
            raise RlhfError(
                f"config.{self.name}: family = {tuning.family!r} only applies to a checkpoint, and {source} is a "
                "stage: leave it out"
            )
        else:
            directory, find = self.workdir.find(source), self.workdir.find
            found = tuned(merged(load_stage(directory, seed=self.seed, find=find, where=self.where)), tuning)
        config, most = found.network.config, self.data.max_prompt_tokens + self.data.max_response_tokens
        positions = config.context if config.positions == "learned" else config.rope.limit
        if positions is not None and most > positions:
            raise RlhfError(
                f"config.{self.name}: {source} supports at most {positions} positions, but data.max_prompt_tokens + "
                f"data.max_response_tokens = {most}: lower them"
            )
        return found._replace(params=quantised(found.params, tuning.base_dtype))


def steps_for(epochs: float, rows: int, batch_size: int, steps_per_call: int) -> int:
    """Number of steps for `epochs` passes over the rows, rounded to a whole number of calls, at least one."""
    return max(1, round(epochs * rows / batch_size / steps_per_call)) * steps_per_call
