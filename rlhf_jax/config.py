"""From an ml_collections ConfigDict to frozen dataclasses: an unknown, missing or mistyped key is one clear error."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, NewType, TypeVar

from ml_collections import ConfigDict

from rlhf_jax.types import RlhfError

T = TypeVar("T")

StageName = NewType("StageName", str)
"""A field of this type names an earlier stage of the experiment, which thereby becomes an input of this one."""


def build(cls: type[T], section: Mapping[str, Any] | ConfigDict, path: str) -> T:
    """An instance of a dataclass from a config section.

    Args: path is where the section stands, for messages, such as `config.ppo`.
    Raises RlhfError naming the key, its value, what was expected, and the closest known key.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in section:
        if key not in fields:
            raise RlhfError(f"{path}.{key} is not a field of {cls.__name__}.{_suggestion(key, list(fields))}")
    values = {}
    for name, field in fields.items():
        if name in section:
            values[name] = _convert(hints[name], section[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RlhfError(f"{path}.{name} is missing: set it to {describe(hints[name])}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise RlhfError(f"{path}: {error}") from error


def input_stages(config: Any) -> tuple[str, ...]:
    """Names of the stages that a stage's config refers to, in the order of its fields."""
    names: list[str] = []
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        if dataclasses.is_dataclass(value):
            names.extend(input_stages(value))
        elif _mentions_stage(hint) and value is not None:
            names.extend([value] if isinstance(value, str) else value)
    return tuple(dict.fromkeys(names))


def describe(hint: Any) -> str:
    """A type as a reader of an error message would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is StageName:
        return "the name of a stage"
    if hint is types.NoneType:
        return "None"
    if dataclasses.is_dataclass(hint):
        return f"a section with the fields of {hint.__name__}"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(arg) for arg in args)
    if origin is tuple:
        inner = [describe(arg) for arg in args if arg is not Ellipsis]
        return f"a list of {inner[0]}" if Ellipsis in args else f"a list ({', '.join(inner)})"
    return {bool: "True or False", int: "an integer", float: "a number", str: "a text"}.get(hint, str(hint))


def _mentions_stage(hint: Any) -> bool:
    return hint is StageName or any(_mentions_stage(arg) for arg in typing.get_args(hint))


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known fields: {', '.join(known)}."


def _convert(hint: Any, value: Any, path: str) -> Any:
    for arm in _arms(hint):
        # A ConfigDict is not a Mapping.
        if dataclasses.is_dataclass(arm) and isinstance(value, (Mapping, ConfigDict)):
            return build(arm, value, path)
    if not _matches(hint, value):
        raise RlhfError(f"{path} = {value!r} should be {describe(hint)}: set it with --{path}=....")
    return _cast(hint, value)


def _cast(hint: Any, value: Any) -> Any:
    # What matches a type, as that type: lists become tuples (which hash), and integers floats, elements too.
    hint = next(arm for arm in _arms(hint) if _matches(arm, value))
    if isinstance(value, (list, tuple)):
        return tuple(map(_cast, _elements(hint, value), value))
    return float(value) if hint is float else value


def _arms(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _elements(hint: Any, value: Any) -> tuple[Any, ...]:
    args = typing.get_args(hint)
    return args[:1] * len(value) if Ellipsis in args else args


def _matches(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(_arms(hint)) > 1:
        return any(_matches(arm, value) for arm in _arms(hint))
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        elements = _elements(hint, value)
        return len(elements) == len(value) and all(map(_matches, elements, value))
    if hint is StageName:
        return isinstance(value, str)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
