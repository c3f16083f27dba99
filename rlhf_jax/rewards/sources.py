"""Rewards in configs: a reward model, or a weighted sum of several parts.

Config fields for rewards have the type `RewardSource`. `find_reward` loads the reward, and `scorers.make_scorer`
creates the function that scores responses.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.config import Finite, FunctionSource, ModelSource, NonNegative
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import RewardModel
from rlhf_jax.models.reward_ensemble import Combine, EnsembleConfig, check_combination
from rlhf_jax.rewards.functions import RewardFunction, load_function
from rlhf_jax.rewards.gold_judges import has_judge, judge_reward
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Weighted sum of rewards: Python functions, a reward model, or both.

    A function has the signature `reward_fn(prompts, completions, **columns) -> list[float | None]`, as in TRL. It
    receives texts, or chats if the prompts are chats; `completion_ids`; and the other columns of the prompts' rows. It
    runs on the host, between the two compiled halves of an online iteration. None means not applicable: the completion
    is left out of the sum, and of `rewards/NAME/mean` and `/std`, which online stages log for every part.

    `combine` overrides how the members of an ensemble are combined.
    """

    # Python functions (prompts, completions, **columns) -> list[float | None].
    functions: tuple[FunctionSource, ...] = ()
    # Reward model, a stage or a checkpoint; or a gold stage, whose judge then gives the reward; None: only functions.
    model: ModelSource | None = None
    weights: tuple[Finite, ...] | None = None  # weights in the sum, with the model (if any) first; None: 1 each
    combine: Combine | None = None  # how to combine the members of an ensemble; None: as in training
    # Coefficient of the members' variance, which uwo subtracts from their mean.
    variance_coefficient: NonNegative | None = None

    def __post_init__(self) -> None:
        parts = len(self.functions) + (self.model is not None)
        if not parts:
            raise ValueError("functions = () and model = None: a reward needs at least one of them")
        if len(set(self.functions)) < len(self.functions):
            raise ValueError(f"functions = {self.functions} has a duplicate: list it once and change its weight")
        if self.weights is not None and len(self.weights) != parts:
            raise ValueError(
                f"weights = {self.weights} must have one weight for each of {parts} parts, a model's weight first"
            )
        if self.weights is not None and not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights = {self.weights} must be finite numbers")
        if self.combine is not None and self.model is None:
            raise ValueError(f"combine = {self.combine!r} needs a model that is an ensemble")
        if self.combine is not None or self.variance_coefficient is not None:
            check_combination(self.combine, self.variance_coefficient)


RewardSource = ModelSource | RewardConfig


class Reward(NamedTuple):
    """Loaded reward of several parts."""

    model: RewardModel | None
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]  # with the model first
    names: tuple[str, ...]  # with the model first


RewardCallable = Callable[..., Sequence[float | None]]
"""Python function `reward_fn(prompts, completions, **columns)`. Configs name functions by file, to hash them."""

AnyReward = RewardModel | Reward | RewardCallable
"""Rewards accepted by the Python API."""


def as_reward(reward: AnyReward) -> RewardModel | Reward:
    """Wrap a Python function as a reward with one part. Raises RlhfError for anything else that is not a reward."""
    if isinstance(reward, RewardModel | Reward):
        return reward
    if not callable(reward):
        raise RlhfError(f"{reward!r} is not a reward: give a reward model, or a function of prompts and completions")
    name = getattr(reward, "__name__", type(reward).__name__)
    return Reward(None, (RewardFunction(name, reward),), (1.0,), (name,))


def find_reward(context: Context, source: RewardSource) -> RewardModel | Reward:
    """Load the reward that a stage's config names. A section with only a model of weight 1 returns that model.

    A gold stage in the place of a model gives the scores of its judge.
    """
    config = source if isinstance(source, RewardConfig) else RewardConfig(model=source)
    name = config.model
    if name is None:
        return load_reward(config, None)
    if has_judge(context, name):
        if config.combine is not None:
            raise RlhfError(f"config.{context.name}.reward_model.combine = {config.combine!r}: {name} is a gold stage")
        reward = load_reward(config, None)
        return reward._replace(functions=(judge_reward(context, name), *reward.functions))
    model = recombined(context.reward_model(name), config, f"config.{context.name}.reward_model")
    reward = load_reward(config, model)
    return model if reward.weights == (1.0,) else reward


def load_reward(source: RewardConfig, model: RewardModel | None) -> Reward:
    """Load a section's functions and combine them with its model. Raises RlhfError if a function cannot be loaded."""
    functions = tuple(map(load_function, source.functions))
    return Reward(model, functions, source.weights or (1.0,) * len(names_of(source)), names_of(source))


def names_of(source: RewardConfig) -> tuple[str, ...]:
    """Names of a reward's parts in metrics: the function's name, as in TRL, or its full source if names clash."""
    full = [*([source.model] if source.model else []), *source.functions]
    short = [
        *([Path(source.model).name] if source.model else []),
        *(name.rpartition(":")[2] for name in source.functions),
    ]
    return tuple(name if short.count(name) == 1 else path for name, path in zip(short, full, strict=True))


def name_of(source: RewardSource) -> str:
    """Name of a reward in tables."""
    if not isinstance(source, RewardConfig):
        return source
    return " + ".join([*([source.model] if source.model else []), *source.functions])


def recombined(model: RewardModel, source: RewardConfig, where: str) -> RewardModel:
    """Apply a section's `combine` to an ensemble. Raises RlhfError if the model is not an ensemble."""
    if source.combine is None:
        return model
    if model.network.ensemble is None:
        raise RlhfError(f"{where}.combine = {source.combine!r}: {source.model} is a single model, not an ensemble")
    ensemble = EnsembleConfig(model.network.ensemble.members, source.combine, source.variance_coefficient)
    return model._replace(network=dataclasses.replace(model.network, ensemble=ensemble))
