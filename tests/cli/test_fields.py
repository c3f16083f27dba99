"""`rlhf-jax fields`: every field has its type, default and description, on 80 columns."""

import dataclasses
import typing
from typing import Annotated, Literal

import pytest

from rlhf_jax.cli.fields import descriptions, type_text
from rlhf_jax.config import Count, FunctionSource, ModelSource, Positive, Range, StageName
from rlhf_jax.loading.context import Common
from rlhf_jax.stages.kinds import KINDS
from tests.support.commands import fails, succeeds


@dataclasses.dataclass(frozen=True)
class Inner:
    """A section within another. More of it."""

    rate: float  # learning rate


@dataclasses.dataclass(frozen=True)
class Base:
    """Fields of all."""

    kept: int = 1  # of the base
    changed: int = 1  # of the base


@dataclasses.dataclass(frozen=True)
class Section(Base):
    """Fields."""

    # Two lines above the field,
    # as one text (eq. 2).
    above: int = 0
    bare: int = 0
    values: tuple[int, ...] = (
        1,  # first
        2,
    )
    changed: int = 2  # of the section
    inner: Inner | None = None
    own: Inner | None = None  # a comment of its own
    name: Inner | str = ""


def test_descriptions_are_comments_beside_or_above_a_field_or_the_docstring_of_its_section():
    assert descriptions(Section) == {
        "kept": "of the base",
        "changed": "of the section",
        "above": "Two lines above the field, as one text (eq. 2).",
        "values": "first",
        "inner": "A section within another. More of it.",
        "own": "a comment of its own",
    }


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Count, "integer >= 1"),
        (Positive | None, "number > 0 | None"),
        (Annotated[float, Range(at_least=0, below=0.5)], "number >= 0, < 0.5"),
        (Literal["a", 1], "'a' | 1"),
        (tuple[StageName, ...], "list of stage"),
        (tuple[int, str], "(integer, text)"),
        (ModelSource | Inner, "stage or checkpoint | section"),
        (tuple[Literal["ppo"] | FunctionSource, ...], "list of 'ppo' | file.py:function"),
        (bool, "bool"),
    ],
)
def test_types_in_few_words(hint, text):
    assert type_text(hint) == text


def sections(section: type, seen: set[type]) -> set[type]:
    """A dataclass and all that stand in its fields."""
    if section not in seen:
        seen.add(section)
        for hint in typing.get_type_hints(section).values():
            for arm in typing.get_args(hint) or (hint,):
                if dataclasses.is_dataclass(arm):
                    sections(arm, seen)  # type: ignore[arg-type]
    return seen


def test_every_field_of_every_section_has_a_description():
    seen: set[type] = set()
    for section in (Common, *(kind.config for kind in KINDS.values())):
        sections(section, seen)
    assert len(seen) > 35
    missing = [
        f"{section.__name__}.{field.name}"
        for section in seen
        for field in dataclasses.fields(section)
        if field.name not in descriptions(section) and typing.get_origin(field.type) is not Literal
    ]
    assert missing == [], "write a comment beside the field, or above it"


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_everything_is_listed_within_80_columns(kind, capsys):
    printed = succeeds(capsys, "fields", *([kind] if kind else []))
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    words = {line.split()[0] for line in lines if line.strip()}
    fields = dataclasses.fields(KINDS[kind].config if kind else Common)
    assert {field.name for field in fields} - {"kind"} <= words
    if kind is None:
        assert set(KINDS) <= words


def test_defaults_ranges_and_sections_within_sections(capsys):
    printed = succeeds(capsys, "fields", "dpo")
    assert "\nbeta *   number > 0\n" in printed
    assert "\nsample_temperature = 1.0   number >= 0\n" in printed
    assert "\n  learning_rate *   number > 0\n" in printed
    assert "\n  lora = None   section | None\n" in printed and "\n    rank *   integer >= 1\n" in printed
    assert "as under optimizer" in succeeds(capsys, "fields", "ppo")


def test_an_unknown_kind(capsys):
    assert "KIND = 'dpoo' should be one of gold, sft" in fails(capsys, "fields", "dpoo")
