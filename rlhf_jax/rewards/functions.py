"""Python reward functions, as in TRL: `reward_fn(prompts, completions, **columns) -> list[float]`."""

import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import processes, user_code
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """Python function that scores completions given as texts or chats."""

    source: str  # "package.module:function" or "path/file.py:function"
    function: Callable[..., Any]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, list]) -> np.ndarray:
        """Score completions: float64[N], with NaN where the function returns None or NaN because it does not apply.

        The first of several processes calls the function.
        A function with `**kwargs` receives every column, any other function the columns that it names.

        Raises RlhfError, naming the function, if it raises, needs a missing column, or does not return one number or
        None per completion.
        """
        return processes.from_first(lambda: self._scores(prompts, completions, columns))

    def _scores(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, list]) -> np.ndarray:
        available = {"prompts": list(prompts), "completions": list(completions), **columns}
        try:
            rewards = self.function(**self._arguments(available))
        except RlhfError:
            raise
        except Exception as error:  # a user's function may raise anything
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RlhfError(
                f"reward function {self.source} raised {type(error).__name__}: {error} ({frame.filename}, line "
                f"{frame.lineno}): correct it"
            ) from error
        return self._checked(rewards, len(available["completions"]))

    def _arguments(self, available: dict[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(self.function).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        for parameter in parameters:
            needed = parameter.default is parameter.empty and parameter.kind in named
            if needed and parameter.name not in available:
                raise RlhfError(
                    f"reward function {self.source} needs {parameter.name}, but only {', '.join(available)} are "
                    "available: a column is passed if every prompt row has it and rows with equal prompts agree"
                )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return available
        return {parameter.name: available[parameter.name] for parameter in parameters if parameter.name in available}

    def _checked(self, values: Any, count: int) -> np.ndarray:
        where = f"reward function {self.source}"
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise RlhfError(f"{where} returned a {type(values).__name__}: return a list with one number per completion")
        if len(values) != count:
            raise RlhfError(f"{where} returned {len(values)} rewards for {count} completions: return one for each")
        rewards = np.full(count, np.nan)
        for i, reward in enumerate(values):
            if reward is None:
                continue
            rewards[i] = _number(reward)
            if math.isinf(rewards[i]):
                raise RlhfError(
                    f"{where} returned {reward!r} for completion {i + 1} of {count}: return a finite number, or None "
                    "where the function does not apply"
                )
        return rewards


def load_function(source: str) -> RewardFunction:
    """Load the reward function that a source names. Raises RlhfError if there is none or it does not load."""
    return RewardFunction(source, user_code.load(source, "reward function"))


def weighted_sum(
    rewards: np.ndarray,
    weights: Sequence[float],
    sources: Sequence[str],
    prompts: Sequence[Any],
    completions: Sequence[Any],
) -> np.ndarray:
    """Compute the weighted sum of rewards, [N, parts] -> float32[N], ignoring NaN entries, as in TRL's GRPOTrainer.

    Raises RlhfError, naming prompt and completion, if all parts are NaN. TRL warns and trains on the rest of the
    group; here every response needs a score, for example for the value function.
    """
    missing = np.isnan(rewards).all(axis=1)
    if missing.any():
        row = int(missing.argmax())
        raise RlhfError(
            f"no reward applies to the completion {_shortened(completions[row])} of the prompt "
            f"{_shortened(prompts[row])}: {', '.join(sources)} returned None. At least one must return a number"
        )
    total = np.nansum(rewards * np.asarray(weights), axis=1)
    if np.abs(total).max(initial=0.0) > float(np.finfo(np.float32).max):
        raise RlhfError(f"the sum of rewards with weights = {tuple(weights)} is too large: reduce the weights")
    return total.astype(np.float32)


def _number(reward: Any) -> float:
    """Convert a reward to a float; infinity if it is not a number or exceeds the range of float32."""
    try:
        number = math.inf if isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor with several elements
        return math.inf
    return math.inf if abs(number) > float(np.finfo(np.float32).max) else number


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-90:]}"
