"""Rewards written in Python, as in TRL: `reward_fn(prompts, completions, **columns) -> list[float]`."""

import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import user_code
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A function of texts (or chats) that says what each completion is worth."""

    source: str  # "package.module:function" or "path/file.py:function"
    function: Callable[..., Any]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, list]) -> np.ndarray:
        """float64[N]; NaN where the function says None or NaN: it does not apply to that completion.

        A function that takes `**kwargs` is given every column, another one those that it names.

        Raises RlhfError, naming the function, where it raises, where it asks for a column that there is not, and where
        it does not return a number or None for each completion.
        """
        given = {"prompts": list(prompts), "completions": list(completions), **columns}
        try:
            found = self.function(**self._arguments(given))
        except RlhfError:
            raise
        except Exception as error:  # whatever a user's function may raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RlhfError(
                f"reward function {self.source} raised {type(error).__name__}: {error} ({frame.filename}, line "
                f"{frame.lineno}): correct it"
            ) from error
        return self._checked(found, len(given["completions"]))

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(self.function).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        for parameter in parameters:
            needed = parameter.default is parameter.empty and parameter.kind in named
            if needed and parameter.name not in given:
                raise RlhfError(
                    f"reward function {self.source} asks for {parameter.name}, and there are {', '.join(given)}: a "
                    "column is given where every row of the prompts has it, and rows with one prompt agree in it"
                )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return given
        return {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}

    def _checked(self, found: Any, count: int) -> np.ndarray:
        where = f"reward function {self.source}"
        if isinstance(found, np.ndarray):
            found = found.tolist()
        if not isinstance(found, (list, tuple)):
            raise RlhfError(f"{where} returned a {type(found).__name__}: return a list with a number a completion")
        if len(found) != count:
            raise RlhfError(f"{where} returned {len(found)} rewards for {count} completions: return one for each")
        rewards = np.full(count, np.nan)
        for place, reward in enumerate(found):
            if reward is None:
                continue
            rewards[place] = _number(reward)
            if math.isinf(rewards[place]):
                raise RlhfError(
                    f"{where} returned {reward!r} for completion {place + 1} of {count}: return a finite number, or "
                    "None where the function does not apply"
                )
        return rewards


def load_function(source: str) -> RewardFunction:
    """Load the reward function that a source names. Raises RlhfError if there is none, or its module does not load."""
    return RewardFunction(source, user_code.load(source, "reward function"))


def weighted_sum(
    rewards: np.ndarray,
    weights: Sequence[float],
    sources: Sequence[str],
    prompts: Sequence[Any],
    completions: Sequence[Any],
) -> np.ndarray:
    """float32[N], from float64[N, parts]: what does not apply counts nothing, as in TRL's GRPOTrainer.

    Raises RlhfError, naming prompt and completion, where nothing applies. TRL warns, and trains on the rest of the
    group; here every consumer of scores, a value function among them, has one for each response.
    """
    nothing = np.isnan(rewards).all(axis=1)
    if nothing.any():
        row = int(nothing.argmax())
        raise RlhfError(
            f"no reward applies to the completion {_shortened(completions[row])} of the prompt "
            f"{_shortened(prompts[row])}: {', '.join(sources)} gave it None. Let one of them give it a number"
        )
    total = np.nansum(rewards * np.asarray(weights), axis=1)
    if np.abs(total).max(initial=0.0) > float(np.finfo(np.float32).max):
        raise RlhfError(f"the sum of rewards with weights = {tuple(weights)} is too large: give smaller weights")
    return total.astype(np.float32)


def _number(reward: Any) -> float:
    """A reward as a number; infinite where it is none, or more than a float32 holds."""
    try:
        number = math.inf if isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last from a tensor of several numbers
        return math.inf
    return math.inf if abs(number) > float(np.finfo(np.float32).max) else number


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-90:]}"
