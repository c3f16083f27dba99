"""What a stage's config may name as its reward: a reward model, or a sum of several parts.

Wherever a stage is told what to score by, its field is a `RewardSource`. `find_reward` finds what it names, and
`scorers.make_scorer` makes of either a function of responses.
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
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """A reward of several parts: Python functions, a reward model, or both, and how much each of them counts.

    A function is `reward_fn(prompts, completions, **columns) -> list[float | None]`, as in TRL: chats where the prompts
    are chats, else texts; `completion_ids` beside them; and every other column of the prompts' rows. It runs on the
    host, between the two halves of an online stage's iteration. Where it gives None it does not apply: it is left out
    of the sum, and of `rewards/NAME/mean` and `/std`, which online stages log of every part.

    `combine` is another way to combine an ensemble than that which it was trained with.
    """

    # Python functions (prompts, completions, **columns) -> list[float | None].
    functions: tuple[FunctionSource, ...] = ()
    model: ModelSource | None = None  # reward model: a stage, or a checkpoint; None: functions alone
    weights: tuple[Finite, ...] | None = None  # weights in the sum, the model's first if there is one; None: 1 each
    combine: Combine | None = None  # score of an ensemble; None: as it was trained
    # Weight of the members' variance, which uwo subtracts from their mean.
    variance_coefficient: NonNegative | None = None

    def __post_init__(self) -> None:
        parts = len(self.functions) + (self.model is not None)
        if not parts:
            raise ValueError("functions = () and model = None: a reward needs one of them")
        if len(set(self.functions)) < len(self.functions):
            raise ValueError(f"functions = {self.functions} has one twice: name it once, and weigh it by weights")
        if self.weights is not None and len(self.weights) != parts:
            raise ValueError(
                f"weights = {self.weights} must have one for each of {parts} parts, the model's first if there is one"
            )
        if self.weights is not None and not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights = {self.weights} must be finite numbers")
        if self.combine is not None and self.model is None:
            raise ValueError(f"combine = {self.combine!r} needs a model, an ensemble of which it says how to combine")
        if self.combine is not None or self.variance_coefficient is not None:
            check_combination(self.combine, self.variance_coefficient)


RewardSource = ModelSource | RewardConfig


class Reward(NamedTuple):
    """A reward of several parts that one can use."""

    model: RewardModel | None
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]  # the model's first, as the weights


RewardCallable = Callable[..., Sequence[float | None]]
"""`reward_fn(prompts, completions, **columns)`, in memory. A config names functions by file instead, for their hash."""

AnyReward = RewardModel | Reward | RewardCallable
"""A reward as Python code gives it."""


def as_reward(reward: AnyReward) -> RewardModel | Reward:
    """Wrap a Python function as a reward of one part."""
    if isinstance(reward, RewardModel | Reward):
        return reward
    if not callable(reward):
        raise RlhfError(f"{reward!r} is no reward: give a reward model, or a function of prompts and completions")
    name = getattr(reward, "__name__", type(reward).__name__)
    return Reward(None, (RewardFunction(name, reward),), (1.0,), (name,))


def find_reward(context: Context, source: RewardSource) -> RewardModel | Reward:
    """The reward that a stage's config names: a reward model, or a reward of several parts.

    A section that names a model and nothing else is that model.
    """
    if not isinstance(source, RewardConfig):
        return context.reward_model(source)
    model = None
    if source.model is not None:
        model = recombined(context.reward_model(source.model), source, f"config.{context.name}.reward_model")
    found = load_reward(source, model)
    return model if model is not None and found.weights == (1.0,) else found


def load_reward(source: RewardConfig, model: RewardModel | None) -> Reward:
    """A section's reward. Raises RlhfError where a function cannot be loaded.

    Args: model is the one that the section names, if it names one.
    """
    functions = tuple(map(load_function, source.functions))
    return Reward(model, functions, source.weights or (1.0,) * len(names_of(source)), names_of(source))


def names_of(source: RewardConfig) -> tuple[str, ...]:
    """Each part as its metrics are named: by the function's own name, as in TRL, or its source if two are alike."""
    whole = [*([source.model] if source.model else []), *source.functions]
    short = [
        *([Path(source.model).name] if source.model else []),
        *(name.rpartition(":")[2] for name in source.functions),
    ]
    return tuple(one if short.count(one) == 1 else all_of_it for one, all_of_it in zip(short, whole, strict=True))


def name_of(source: RewardSource) -> str:
    """A reward as a table names it."""
    if not isinstance(source, RewardConfig):
        return source
    return " + ".join([*([source.model] if source.model else []), *source.functions])


def recombined(model: RewardModel, source: RewardConfig, where: str) -> RewardModel:
    """An ensemble whose scores are combined as a section says. Raises RlhfError where it is none."""
    if source.combine is None:
        return model
    if model.network.ensemble is None:
        raise RlhfError(f"{where}.combine = {source.combine!r}: {source.model} is a single model, not an ensemble")
    ensemble = EnsembleConfig(model.network.ensemble.members, source.combine, source.variance_coefficient)
    return model._replace(network=dataclasses.replace(model.network, ensemble=ensemble))
