"""The table of kinds, and what becomes of a name that is not in it."""

import dataclasses
import typing

import jaxtyping
import pytest

from rlhf_jax.reports.style import DARK, PALETTE
from rlhf_jax.stages.kinds import KINDS, Colour, Kind, find_kind
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class Own:
    kind: str
    batch_size: int


def row(**changes) -> Kind:
    return dataclasses.replace(Kind(config=Own, run=lambda config, context: {}, summary="Do it"), **changes)


def test_each_kind_is_called_in_a_config_as_in_the_table():
    for name, kind in KINDS.items():
        assert typing.get_args(typing.get_type_hints(kind.config)["kind"]) == (name,)
        assert kind.run.__module__ == kind.config.__module__ == f"rlhf_jax.stages.{name}"


def test_every_colour_has_a_shade_for_day_and_night():
    assert set(PALETTE) == set(typing.get_args(Colour))
    assert set(PALETTE.values()) <= set(DARK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": dict}, "config must be a dataclass"),
        ({"run": None}, "config must be a dataclass, and run a function"),
        ({"label": "β = {beta:g}"}, "Own has no field beta"),
        ({"unit": "pairs"}, "Own has no field optimizer"),
        ({"colour": "red"}, "colour = 'red' should be one of grey, amber"),
    ],
)
def test_a_row_that_does_not_fit_together(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(ValueError, match=message):
        row(**changes)


def test_a_row_that_fits():
    assert row(label="{batch_size}").config is Own


def test_kinds_are_found_in_the_table_and_in_files(tmp_path):
    assert find_kind("dpo", "config.a.kind") is KINDS["dpo"]
    file = tmp_path / "own.py"
    file.write_text("from rlhf_jax.stages.kinds import KINDS\nMine = KINDS['sft']\nOther = KINDS['sft'].config\n")
    assert find_kind(f"{file}:Mine", "config.a.kind") is KINDS["sft"]
    with pytest.raises(
        RlhfError, match=r"config.a.kind = '.*own.py:Other' is a type: make it a rlhf_jax.stages.kinds.Kind"
    ):
        find_kind(f"{file}:Other", "config.a.kind")
    with pytest.raises(RlhfError, match=r"own.py:Missing' is a NoneType"):
        find_kind(f"{file}:Missing", "config.a.kind")
    with pytest.raises(RlhfError, match="cannot be loaded: FileNotFoundError"):
        find_kind(f"{tmp_path}/none.py:Mine", "config.a.kind")
    with pytest.raises(
        RlhfError, match=r"config.a.kind = 'dpoo' should be one of gold, sft, .*, or a kind of your own"
    ):
        find_kind("dpoo", "config.a.kind")
