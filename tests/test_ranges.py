"""Every number that a config may hold has a range, and a number outside of it is refused by one message."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.config import Range
from rlhf_jax.loading.context import Common
from rlhf_jax.main import main
from rlhf_jax.stages.kinds import KINDS

PREFERENCES = f"--config={Path(__file__).parents[1]}/experiments/preferences.py:smoke"


def numbers(section: type, seen: set[type]) -> Iterator[tuple[str, bool]]:
    """Each int and float among the types of a section's fields, sections within it included, and if it has a range."""
    if section in seen:
        return
    seen.add(section)
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        for leaf in leaves(hint):
            origin, (base, *extras) = typing.get_origin(leaf), typing.get_args(leaf) or (leaf,)
            if dataclasses.is_dataclass(leaf):
                yield from numbers(leaf, seen)  # type: ignore[arg-type]
            elif (base if origin is typing.Annotated else leaf) in (int, float):
                yield f"{section.__name__}.{name}", any(isinstance(extra, Range) for extra in extras)


def leaves(hint: Any) -> Iterator[Any]:
    """The types in a type that have no others in them."""
    inner = () if typing.get_origin(hint) in (typing.Annotated, typing.Literal) else typing.get_args(hint)
    if not inner:
        yield hint
    for one in inner:
        yield from leaves(one)


def test_every_number_of_a_config_has_a_range():
    seen: set[type] = set()
    sections = [Common, *(kind.config for kind in KINDS.values())]
    found = [number for section in sections for number in numbers(section, seen)]
    assert len(found) > 150
    assert [name for name, ranged in found if not ranged] == [], "write it as Count, Positive, Finite, or with a Range"


def test_a_number_without_a_range_would_be_found():
    @dataclasses.dataclass
    class Inner:
        tokens: tuple[int | None, ...]

    @dataclasses.dataclass
    class Outer:
        share: typing.Annotated[float, Range(at_least=0)]
        inner: Inner | None
        name: typing.Literal[3] | str

    assert list(numbers(Outer, set())) == [("Outer.share", True), ("Inner.tokens", False)]


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
