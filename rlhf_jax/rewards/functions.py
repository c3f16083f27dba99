"""Rewards written in Python, as in TRL: `reward_fn(prompts, completions, **columns) -> list[float]`."""

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

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
    """The function that a source names. Raises RlhfError where there is none, or where its module does not load."""
    place, name = _parts(source)
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever a user's module may raise
        raise RlhfError(f"reward function {source} cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RlhfError(f"reward function {source}: {place} has no function {name!r}")
    if inspect.iscoroutinefunction(function):
        raise RlhfError(f"reward function {source} is asynchronous: give a plain function")
    return RewardFunction(source, function)


def function_hash(source: str) -> str:
    """SHA-256 in hex of the file that a function stands in, so that a changed function is noticed."""
    place, _ = _parts(source)
    file: str | None = place
    if not place.endswith(".py"):
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            spec = None
        file = None if spec is None else spec.origin
    if file is None or not Path(file).is_file():
        raise RlhfError(f"reward function {source}: there is no {place}; a file is named from the working directory")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


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


def _parts(source: str) -> tuple[str, str]:
    place, _, name = source.rpartition(":")
    if not place or not name.isidentifier():
        raise RlhfError(f"{source!r} names no reward function: write package.module:function or path/file.py:function")
    return place, name


def _load_file(path: Path) -> ModuleType:
    text = path.read_bytes()
    name = f"_rlhf_jax_reward_{path.stem}_{hashlib.sha256(text).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        # Not exec_module, whose bytecode of an earlier text serves as long as size and second of writing are the same.
        exec(loader.source_to_code(text, path), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module
