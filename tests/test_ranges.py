"""Every number that a config may hold has a range, and a number outside of it is refused by one message."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.config import Range, convert
from rlhf_jax.loading.context import Common
from rlhf_jax.main import main
from rlhf_jax.stages.kinds import KINDS
from rlhf_jax.types import RlhfError

PREFERENCES = f"--config={Path(__file__).parents[1]}/experiments/preferences.py:smoke"


class Number(typing.NamedTuple):
    """An int or a float in the type of a field."""

    field: str  # section and name
    hint: Any  # of the whole field
    base: type
    bounds: Range | None


def numbers(section: type, seen: set[type]) -> Iterator[Number]:
    """Each int and float among the types of a section's fields, sections within it included."""
    if section in seen:
        return
    seen.add(section)
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        for leaf in leaves(hint):
            origin, (base, *extras) = typing.get_origin(leaf), typing.get_args(leaf) or (leaf,)
            if dataclasses.is_dataclass(leaf):
                yield from numbers(leaf, seen)  # type: ignore[arg-type]
            elif (kind := base if origin is typing.Annotated else leaf) in (int, float):
                bounds = next((extra for extra in extras if isinstance(extra, Range)), None)
                yield Number(f"{section.__name__}.{name}", hint, kind, bounds)


def all_numbers() -> list[Number]:
    """The numbers of every config."""
    seen: set[type] = set()
    return [
        number for section in (Common, *(kind.config for kind in KINDS.values())) for number in numbers(section, seen)
    ]


def outside(number: Number) -> Iterator[float]:
    """Values just outside of a range, far outside of it, and none that is a number."""
    assert number.bounds is not None
    low, above, high, below, infinite = dataclasses.astuple(number.bounds)
    step = 1 if number.base is int else 1e-3
    yield from (value for value in (*([] if low is None else [low - step, -(10**12)]), above) if value is not None)
    yield from (value for value in (*([] if high is None else [high + step, 10**12]), below) if value is not None)
    if number.base is float:
        yield from [math.nan] if infinite else [math.nan, math.inf, -math.inf]


def containers(hint: Any, value: float) -> Iterator[Any]:
    """The value, as every list in a field's type that holds numbers has it."""
    yield value
    for leaf in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,):
        if typing.get_origin(leaf) is tuple:
            inner = typing.get_args(leaf)
            yield [value] * (2 if Ellipsis in inner else len(inner))


def refused(number: Number, value: float) -> bool:
    """Return whether a message names the field and the bound; a list's field does not take a number, and so on."""
    messages = []
    for given in containers(number.hint, value):
        try:
            convert(number.hint, given, f"config.{number.field}")
        except RlhfError as error:
            messages.append(str(error))
        else:
            return False
    start = f"config.{number.field} = "
    return any(text.startswith(start) and " must be " in text and "set it with --" in text for text in messages)


def leaves(hint: Any) -> Iterator[Any]:
    """The types in a type that have no others in them."""
    inner = () if typing.get_origin(hint) in (typing.Annotated, typing.Literal) else typing.get_args(hint)
    if not inner:
        yield hint
    for one in inner:
        yield from leaves(one)


def test_every_number_of_a_config_has_a_range():
    found = all_numbers()
    assert len(found) > 150
    assert [number.field for number in found if number.bounds is None] == [], "write it as Count, Positive, or a Range"


def test_every_number_out_of_its_range_is_refused_by_name():
    tried = [(number, value) for number in all_numbers() for value in outside(number)]
    assert len(tried) > 500
    assert [(number.field, value) for number, value in tried if not refused(number, value)] == []


def test_a_number_without_a_range_would_be_found():
    @dataclasses.dataclass
    class Inner:
        tokens: tuple[int | None, ...]

    @dataclasses.dataclass
    class Outer:
        share: typing.Annotated[float, Range(at_least=0)]
        inner: Inner | None
        name: typing.Literal[3] | str

    found = [(number.field, number.bounds is not None) for number in numbers(Outer, set())]
    assert found == [("Outer.share", True), ("Inner.tokens", False)]


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("sft.batch_size", 0, "at least 1"),
        ("sft.epochs", -1.0, "above 0"),
        ("seed", -1, "at least 0"),
        ("seeds", 0, "at least 1"),
        ("data.max_response_tokens", 0, "at least 1"),
        ("runtime.data", 0, "at least 1"),
        ("sft.model.n_layers", 0, "at least 1"),
        ("sft.optimizer.learning_rate", -1.0, "above 0"),
        ("dpo.beta", float("nan"), "a finite number"),
        ("ppo.iterations", 10**12, "at most 2147483647"),
        ("evaluate.temperature", -0.5, "at least 0"),
    ],
)
def test_the_command_names_the_key_the_value_and_the_bound(key, value, fault, tmp_path, capsys):
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    data = [f"--config.data.{name}={tmp_path / name}.jsonl" for name in ("train", "eval")]
    assert main([PREFERENCES, f"--workdir={tmp_path / 'run'}", *data, f"--config.{key}={value}"]) == 1
    expected = f"Error: config.{key} = {value!r} must be {fault}: set it with --config.{key}=....\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()
