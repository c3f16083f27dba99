"""Conversion of an ml_collections ConfigDict to frozen dataclasses, with one clear error for each bad key."""

import ast
import copy
import dataclasses
import difflib
import math
import re
import types
import typing
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sized
from typing import Annotated, Any, ClassVar, NewType, Protocol, TypeAlias, TypeVar, runtime_checkable

from ml_collections import ConfigDict

from rlhf_jax.types import RlhfError

T = TypeVar("T")

Hint: TypeAlias = Any
"""A type or a `typing` construct, such as `Positive | None`."""


@runtime_checkable
class Section(Protocol):
    """A section of a config: any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


StageName = NewType("StageName", str)
"""Type of a field that names an earlier stage of the experiment, which becomes an input of this stage."""

ModelSource = NewType("ModelSource", str)
"""Type of a field that names an earlier stage or a checkpoint: a directory, a GGUF file, or an id on the hub."""

FunctionSource = NewType("FunctionSource", str)
"""Type of a field that names a Python object: package.module:name, or path/file.py:name."""


INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number in a config, checked by `build`: `beta: Annotated[float, Range(above=0)]`.

    A number must also be finite, unless `infinite`. The types below cover most fields.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    infinite: bool = False

    def fault(self, value: float) -> str | None:
        """Return the first bound that a number violates, worded to follow "must be"; None if it is within its range."""
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
"""An integer of at least 1: rows, steps, layers."""

AtLeastTwo = Annotated[int, Range(at_least=2, at_most=INT32_MAX)]
"""An integer of at least 2, such as a number of responses to compare."""

CountOrZero = Annotated[int, Range(at_least=0, at_most=INT32_MAX)]
"""An integer of at least 0. Seeds too: NumPy and JAX accept this range."""

Finite = Annotated[float, Range()]
"""Any finite number, such as a score."""

Positive = Annotated[float, Range(above=0)]
"""A number above 0."""

NonNegative = Annotated[float, Range(at_least=0)]
"""A number of at least 0."""

Share = Annotated[float, Range(at_least=0, at_most=1)]
"""A fraction, from 0 to 1."""


class UnknownFieldError(RlhfError):
    """Error for a key that is not a field of its section. `fault` is the message without the closest known field."""

    def __init__(self, fault: str, key: str, known: list[str]) -> None:
        super().__init__(fault + suggestion(key, known))
        self.fault, self.key = fault, key


@dataclasses.dataclass(frozen=True)
class Typed:
    """A value as typed on the command line. `build` parses it once it knows the type of the field."""

    text: str

    def read(self, hint: Hint) -> Any:
        """Parse the text as a Python literal, boolean, NaN or infinity, string, or names: the first that fits the type.

        Names are separated by commas, so that `sft,ppo` is a list. Any other list must be a Python literal.
        """
        literal = _literal(self.text)
        word = self.text.lower()
        others = [{"true": True, "false": False}[word]] if word in ("true", "false") else []
        if word.lstrip("+-") in ("nan", "inf", "infinity"):
            others = [float(word)]
        names = tuple(self.text.split(",")) if re.fullmatch(r"[\w.:/-]+(,[\w.:/-]+)*", self.text) else self.text
        return next((value for value in [literal, *others, self.text, names] if _matches(hint, value)), literal)


def override(config: ConfigDict, path: str, value: Any) -> None:
    """Set one field of a config, creating the sections on its path (a value in a section's place is replaced).

    Args: path is dotted, such as `ppo.tuning.lora.rank`. A string is later parsed as the field's type, or becomes a
    section if it is a Python dict; any other value is set unchanged.
    """
    *sections, name = path.split(".")
    with config.unlocked(), config.ignore_type():
        for section in sections:
            if not isinstance(config.get(section), ConfigDict):
                config[section] = ConfigDict()
            config = config[section]
        literal = _literal(value) if isinstance(value, str) else value
        if isinstance(literal, dict):
            config[name] = ConfigDict(literal)
        else:
            config[name] = Typed(value) if isinstance(value, str) else value


def build(cls: type[T], section: Mapping[str, Any] | ConfigDict, path: str, default: T | None = None) -> T:
    """Build an instance of a dataclass from a config section.

    Args: path names the section in messages, such as `config.ppo`; default, if given, supplies the fields that the
    section omits, instead of the dataclass's own defaults.
    Raises RlhfError naming the bad key, and its value and the expected type, or the closest known key.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in section:
        if key not in fields:
            raise UnknownFieldError(f"{path}.{key} is not a field of {cls.__name__}.", str(key), list(fields))
    values = {}
    for name, field in fields.items():
        if name in section:
            values[name] = convert(hints[name], section[name], f"{path}.{name}", field.default)
        elif default is not None:
            values[name] = getattr(default, name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RlhfError(f"{path}.{name} is missing: set it to {describe(hints[name])}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise RlhfError(f"{path}: {error}") from error


def with_values(config: T, values: Mapping[str, Any]) -> T:
    """Return a copy of a frozen dataclass with other values of some fields, given by dotted path.

    The values are not checked, so that they may be arrays that a compiled program gets.
    """
    made = copy.copy(config)
    for path, value in values.items():
        name, _, rest = path.partition(".")
        object.__setattr__(made, name, with_values(getattr(made, name), {rest: value}) if rest else value)
    return made


def check_ranges(config: Section) -> None:
    """Raise ValueError for the first number in a section that is out of its range. Nested sections check themselves.

    `build` checks values from a config; `__post_init__` calls this for sections constructed in Python.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if not dataclasses.is_dataclass(value) and _matches(hint, value) and (fault := _fault(hint, value)):
            raise ValueError(f"{name} = {value!r} must be {fault}")


def input_stages(config: Section, known: Container[str]) -> tuple[str, ...]:
    """Names of the stages that a stage's config refers to, in the order of its fields.

    Args: known are the experiment's stages. A `ModelSource` that is not one of them is a checkpoint, and left out.
    """
    return tuple(dict.fromkeys([*_named(config, StageName), *(x for x in _named(config, ModelSource) if x in known)]))


def checkpoints(config: Section, known: Container[str]) -> tuple[str, ...]:
    """Checkpoints that a stage's config refers to: a `ModelSource` that is not the name of a stage."""
    return tuple(dict.fromkeys(name for name in _named(config, ModelSource) if name not in known))


def functions(config: Section) -> tuple[str, ...]:
    """Sources of the Python objects that a stage's config names."""
    return tuple(dict.fromkeys(_named(config, FunctionSource)))


def _named(config: Section, kind: Hint) -> Iterator[str]:
    """Values of all fields of one type, nested sections included."""
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        if dataclasses.is_dataclass(value):
            yield from _named(value, kind)
        else:
            yield from _of_kind(hint, value, kind)


def _of_kind(hint: Hint, value: object, kind: Hint) -> Iterator[str]:
    """Values of one kind of name within a field's value; in a union, the first type that matches decides."""
    hint = next((_without_range(member) for member in _union_members(hint) if _matches(member, value)), None)
    if hint is kind and isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner, element in zip(_elements(hint, value), value, strict=True):
            yield from _of_kind(inner, element, kind)


def describe(hint: Hint) -> str:
    """Describe a type for an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is StageName:
        return "the name of a stage"
    if hint is ModelSource:
        return "the name of a stage, or a checkpoint's directory, GGUF file or hub id"
    if hint is FunctionSource:
        return "a name in a Python file or module, as path/file.py:NAME or package.module:NAME"
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
    return {bool: "True or False", int: "an integer", float: "a number", str: "a string"}.get(hint, str(hint))


def suggestion(key: str, known: list[str]) -> str:
    """Return the sentence of a message that suggests the closest known key, or lists all of them."""
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known fields: {', '.join(known)}."


def convert(hint: Hint, value: object, path: str, default: object = None) -> Any:
    """Check a value against a type and its range, and convert it: sections to dataclasses, lists to tuples.

    Args: path names the value in messages; default is the default of its field.
    Raises RlhfError, as `build` does.
    """
    if isinstance(value, Typed):
        value = value.read(hint)
    if isinstance(value, (Mapping, ConfigDict)):  # a ConfigDict is not a Mapping
        sections = [member for member in _union_members(hint) if dataclasses.is_dataclass(member)]
        if not sections:
            raise RlhfError(f"{path} should be {describe(hint)}: it has no fields, such as {next(iter(value), None)!r}")
        section = max(sections, key=lambda section: _likeness(section, [*map(str, value)]))
        return build(section, value, path, default if type(default) is section else None)
    if not _matches(hint, value):
        raise RlhfError(f"{path} = {value!r} should be {describe(hint)}: set it with --{path}=....")
    if fault := _fault(hint, value):
        raise RlhfError(f"{path} = {value!r} must be {fault}: set it with --{path}=....")
    return _cast(hint, value)


def _fault(hint: Hint, value: object) -> str | None:
    """Return the first bound that a number, or any number in a list, violates."""
    hint = next(member for member in _union_members(hint) if _matches(member, value))
    if typing.get_origin(hint) is Annotated and isinstance(value, (int, float)):
        ranges = [extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Range)]
        return next((fault for bounds in ranges if (fault := bounds.fault(value))), None)
    if isinstance(value, (list, tuple)):
        faults = map(_fault, _elements(hint, value), value)
        return next((f"{fault} in every element" for fault in faults if fault), None)
    return None


def _likeness(section: Hint, value: Iterable[str]) -> tuple[int, int]:
    """Rank a member of a union by how many of the keys it has, then by how few required keys are missing."""
    fields = dataclasses.fields(section)
    needed = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    return sum(key in {field.name for field in fields} for key in value), -len(needed.difference(value))


def _cast(hint: Hint, value: object) -> Any:
    # Lists become tuples, which hash, and integers become floats where the type is float.
    hint = _without_range(next(member for member in _union_members(hint) if _matches(member, value)))
    if isinstance(value, (list, tuple)):
        return tuple(map(_cast, _elements(hint, value), value))
    return float(value) if hint is float and isinstance(value, int) else value


def _literal(text: str) -> Any:
    """Return the value of a Python literal, or the text itself if it is not a literal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a regular expression may have escapes that are invalid in Python strings
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two for deep nesting
        return text


def _without_range(hint: Hint) -> Hint:
    """Strip the range from a type."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _union_members(hint: Hint) -> tuple[Hint, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _elements(hint: Hint, value: Sized) -> tuple[Hint, ...]:
    args = typing.get_args(hint)
    return args[:1] * len(value) if Ellipsis in args else args


def _matches(hint: Hint, value: object) -> bool:
    hint = _without_range(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(_union_members(hint)) > 1:
        return any(_matches(member, value) for member in _union_members(hint))
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
