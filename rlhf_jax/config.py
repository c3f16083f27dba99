"""From an ml_collections ConfigDict to frozen dataclasses: an unknown, missing or mistyped key is one clear error."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Any, NewType, TypeVar

from ml_collections import ConfigDict

from rlhf_jax.types import RlhfError

T = TypeVar("T")

StageName = NewType("StageName", str)
"""A field of this type names an earlier stage of the experiment, which thereby becomes an input of this one."""

ModelSource = NewType("ModelSource", str)
"""A field of this type names an earlier stage, or a checkpoint: a directory, a GGUF file, an id on the hub."""

FunctionSource = NewType("FunctionSource", str)
"""A field of this type names a Python function: package.module:function, or path/file.py:function."""


INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number in a config, which `build` checks: `beta: Annotated[float, Range(above=0)]`.

    Every number must be finite besides, unless `infinite`. The names below serve most fields.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    infinite: bool = False

    def fault(self, value: float) -> str | None:
        """The bound that a number violates, to follow "must be"; None if it is within all bounds."""
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return "a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"at least {self.at_least}"
        if self.above is not None and value <= self.above:
            return f"above {self.above}"
        if self.at_most is not None and value > self.at_most:
            return f"at most {self.at_most}"
        if self.below is not None and value >= self.below:
            return f"below {self.below}"
        return None


Count = Annotated[int, Range(at_least=1, at_most=INT32_MAX)]
"""One or more: rows, steps, layers."""

AtLeastTwo = Annotated[int, Range(at_least=2, at_most=INT32_MAX)]
"""Two or more, of what is compared with others."""

CountOrZero = Annotated[int, Range(at_least=0, at_most=INT32_MAX)]
"""Zero or more. Seeds too: grain, NumPy and JAX agree on these."""

Finite = Annotated[float, Range()]
"""Any number but NaN and the infinities, such as a score."""

Positive = Annotated[float, Range(above=0)]
"""A number above 0."""

NonNegative = Annotated[float, Range(at_least=0)]
"""A number from 0 on."""

Share = Annotated[float, Range(at_least=0, at_most=1)]
"""A part of a whole: from 0 to 1."""


def build(cls: type[T], section: Mapping[str, Any] | ConfigDict, path: str) -> T:
    """An instance of a dataclass from a config section.

    Args: path is where the section stands, for messages, such as `config.ppo`.
    Raises RlhfError naming the key, its value, what was expected, and the closest known key.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
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


def check_ranges(config: Any) -> None:
    """Raise ValueError for the first number of a section that is out of its range, sections within it left out.

    `build` has checked what comes from a config. This is for `__post_init__`, where sections are made in Python too.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if not dataclasses.is_dataclass(value) and _matches(hint, value) and (fault := _fault(hint, value)):
            raise ValueError(f"{name} = {value!r} must be {fault}")


def input_stages(config: Any, known: Container[str]) -> tuple[str, ...]:
    """Names of the stages that a stage's config refers to, in the order of its fields.

    Args: known are the experiment's stages, by which a stage is told from a checkpoint where a field may name either.
    """
    return tuple(dict.fromkeys([*_named(config, StageName), *(x for x in _named(config, ModelSource) if x in known)]))


def checkpoints(config: Any, known: Container[str]) -> tuple[str, ...]:
    """The checkpoints that a stage's config refers to: what may be either and is no stage's name."""
    return tuple(dict.fromkeys(name for name in _named(config, ModelSource) if name not in known))


def functions(config: Any) -> tuple[str, ...]:
    """The Python functions that a stage's config names."""
    return tuple(dict.fromkeys(_named(config, FunctionSource)))


def _named(config: Any, kind: Any) -> Iterator[str]:
    """Values of a config's fields of one kind of name, sections within it included."""
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        if dataclasses.is_dataclass(value):
            yield from _named(value, kind)
        else:
            yield from _of_kind(hint, value, kind)


def _of_kind(hint: Any, value: Any, kind: Any) -> Iterator[str]:
    """Values of one kind of name within a field's value; of a union, the first type that matches counts."""
    hint = next((_bare(arm) for arm in _arms(hint) if _matches(arm, value)), None)
    if hint is kind:
        yield value
    elif isinstance(value, (list, tuple)):
        for inner, element in zip(_elements(hint, value), value, strict=True):
            yield from _of_kind(inner, element, kind)


def describe(hint: Any) -> str:
    """A type as a reader of an error message would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is StageName:
        return "the name of a stage"
    if hint is ModelSource:
        return "the name of a stage, or a checkpoint's directory, GGUF file or hub id"
    if hint is FunctionSource:
        return "a function, as package.module:function or path/file.py:function"
    if hint is types.NoneType:
        return "None"
    if origin is Annotated:
        return describe(args[0])
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


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known fields: {', '.join(known)}."


def _convert(hint: Any, value: Any, path: str) -> Any:
    sections = [arm for arm in _arms(hint) if dataclasses.is_dataclass(arm)]
    if sections and isinstance(value, (Mapping, ConfigDict)):  # a ConfigDict is not a Mapping
        return build(max(sections, key=lambda section: _likeness(section, value)), value, path)
    if not _matches(hint, value):
        raise RlhfError(f"{path} = {value!r} should be {describe(hint)}: set it with --{path}=....")
    if fault := _fault(hint, value):
        raise RlhfError(f"{path} = {value!r} must be {fault}: set it with --{path}=....")
    return _cast(hint, value)


def _fault(hint: Any, value: Any) -> str | None:
    """The first bound that a number violates; in a list, any number of it."""
    hint = next(arm for arm in _arms(hint) if _matches(arm, value))
    if typing.get_origin(hint) is Annotated:
        ranges = [extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Range)]
        return next((fault for bounds in ranges if (fault := bounds.fault(value))), None)
    if isinstance(value, (list, tuple)):
        faults = map(_fault, _elements(hint, value), value)
        return next((f"{fault} in every element" for fault in faults if fault), None)
    return None


def _likeness(section: Any, value: Any) -> tuple[int, int]:
    """Of several sections that may stand in one place, the one meant has the most of the keys, and lacks the fewest."""
    fields = dataclasses.fields(section)
    needed = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    return sum(key in {field.name for field in fields} for key in value), -len(needed.difference(value))


def _cast(hint: Any, value: Any) -> Any:
    # What matches a type, as that type: lists become tuples (which hash), and integers floats, elements too.
    hint = _bare(next(arm for arm in _arms(hint) if _matches(arm, value)))
    if isinstance(value, (list, tuple)):
        return tuple(map(_cast, _elements(hint, value), value))
    return float(value) if hint is float else value


def _bare(hint: Any) -> Any:
    """A type without its range."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _arms(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _elements(hint: Any, value: Any) -> tuple[Any, ...]:
    args = typing.get_args(hint)
    return args[:1] * len(value) if Ellipsis in args else args


def _matches(hint: Any, value: Any) -> bool:
    hint = _bare(hint)
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
    if hint is FunctionSource:
        return isinstance(value, str) and ":" in value
    if hint in (StageName, ModelSource):
        return isinstance(value, str)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
