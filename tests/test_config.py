import dataclasses
import re
from typing import Annotated, Literal

import pytest
from ml_collections import ConfigDict, FrozenConfigDict, config_dict

from rlhf_jax import config
from rlhf_jax.config import Count, Finite, NonNegative, Positive, Range, Share, StageName
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["constant", "cosine"] = "constant"


@dataclasses.dataclass(frozen=True)
class Judge:
    stage: StageName | None = None
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Stage:
    policy: StageName
    optimizer: Optimizer
    steps: int = 10
    kl_coef: float = 0.05
    whiten: bool = True
    name: str = "ppo"
    clip: float | None = None
    beta: float | Literal["auto"] = "auto"
    betas: tuple[float, ...] = ()
    grid: tuple[tuple[int, ...], ...] = ()
    limits: tuple[int, ...] | None = None
    others: tuple[StageName, ...] = ()
    judge: Judge | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, not {self.steps}")


def build(**changes: object) -> Stage:
    section = {"policy": "sft", "optimizer": {"learning_rate": 1e-3}, **changes}
    return config.build(Stage, ConfigDict(section), "config.ppo")


def message(**changes: object) -> str:
    with pytest.raises(RlhfError) as caught:
        build(**changes)
    return str(caught.value)


def test_defaults_fill_what_the_section_leaves_out():
    expected = Stage(policy=StageName("sft"), optimizer=Optimizer(learning_rate=1e-3))
    assert build() == expected
    assert dataclasses.is_dataclass(build().optimizer)


@pytest.mark.parametrize("container", [dict, ConfigDict, FrozenConfigDict, lambda section: ConfigDict(section).lock()])
def test_sections_may_be_any_kind_of_mapping(container):
    section = container({"policy": "sft", "optimizer": {"learning_rate": 0.1, "schedule": "cosine"}})
    stage = config.build(Stage, section, "config.ppo")
    assert stage.optimizer == Optimizer(0.1, schedule="cosine")


def test_unknown_key_is_named_with_the_closest_field():
    assert message(kl_coeff=0.1) == "config.ppo.kl_coeff is not a field of Stage. Did you mean 'kl_coef'?"


def test_unknown_key_far_from_any_field_lists_the_fields():
    text = message(zzz=1)
    assert text.startswith("config.ppo.zzz is not a field of Stage. Known fields: policy, optimizer, steps, ")


def test_unknown_key_in_a_nested_section_is_named_by_its_path():
    text = message(optimizer={"learning_rate": 1e-3, "shedule": "cosine"})
    assert text == "config.ppo.optimizer.shedule is not a field of Optimizer. Did you mean 'schedule'?"


def test_missing_key_says_what_to_set_it_to():
    with pytest.raises(RlhfError, match=r"^config\.ppo\.policy is missing: set it to the name of a stage\.$"):
        config.build(Stage, {"optimizer": {"learning_rate": 1.0}}, "config.ppo")
    with pytest.raises(RlhfError, match=r"^config\.ppo\.optimizer\.learning_rate is missing: set it to a number\.$"):
        build(optimizer={})
    with pytest.raises(RlhfError, match="optimizer is missing: set it to a section with the fields of Optimizer"):
        config.build(Stage, {"policy": "sft"}, "config.ppo")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("steps", 1.5, "an integer"),
        ("steps", 2.0, "an integer"),
        ("steps", True, "an integer"),
        ("steps", "3", "an integer"),
        ("steps", None, "an integer"),
        ("kl_coef", "0.1", "a number"),
        ("kl_coef", False, "a number"),
        ("kl_coef", (0.1,), "a number"),
        ("whiten", 1, "True or False"),
        ("whiten", "no", "True or False"),
        ("name", 3, "a string"),
        ("policy", 3, "the name of a stage"),
        ("clip", "none", "a number or None"),
        ("clip", True, "a number or None"),
        ("beta", "automatic", "a number or one of 'auto'"),
        ("betas", 0.1, "a list of a number"),
        ("betas", (0.1, "0.2"), "a list of a number"),
        ("grid", (1, 2), "a list of a list of an integer"),
        ("limits", (1.5,), "a list of an integer or None"),
        ("others", ("sft", 1), "a list of the name of a stage"),
        ("optimizer", 0.1, "a section with the fields of Optimizer"),
        ("judge", "rm", "a section with the fields of Judge or None"),
    ],
)
def test_wrong_type_names_key_value_and_what_is_expected(key, value, expected):
    flag = f"--config.ppo.{key}=..."
    assert message(**{key: value}) == f"config.ppo.{key} = {value!r} should be {expected}: set it with {flag}."


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("betas", (0.9,), "a list (a number, a number)"),
        ("betas", (0.9, 0.95, 0.99), "a list (a number, a number)"),
        ("betas", (0.9, "0.95"), "a list (a number, a number)"),
        ("schedule", "linear", "one of 'constant', 'cosine'"),
    ],
)
def test_wrong_type_in_a_nested_section(key, value, expected):
    text = message(optimizer={"learning_rate": 1e-3, key: value})
    assert text.startswith(f"config.ppo.optimizer.{key} = {value!r} should be {expected}: ")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("kl_coef", 1, 1.0),
        ("clip", 2, 2.0),
        ("clip", None, None),
        ("beta", "auto", "auto"),
        ("beta", 1, 1.0),
        ("betas", [1, 0.5], (1.0, 0.5)),
        ("betas", (), ()),
        ("grid", [[1, 2], [3]], ((1, 2), (3,))),
        ("limits", [1, 2], (1, 2)),
        ("limits", None, None),
        ("others", ["rm", "sft"], ("rm", "sft")),
        ("judge", None, None),
        ("judge", {"stage": "rm"}, Judge(StageName("rm"))),
        ("judge", {"temperature": 2}, Judge(temperature=2.0)),
    ],
)
def test_values_arrive_as_the_types_their_fields_promise(key, value, expected):
    got = getattr(build(**{key: value}), key)
    assert repr(got) == repr(expected)  # repr tells 1 from 1.0, and a list from a tuple
    hash(got)


def test_a_literal_is_matched_by_type_too():
    @dataclasses.dataclass(frozen=True)
    class Section:
        bits: Literal[1, 8]

    assert config.build(Section, {"bits": 1}, "config").bits == 1
    for value in (True, 1.0):
        with pytest.raises(RlhfError, match=re.escape(f"config.bits = {value!r} should be one of 1, 8")):
            config.build(Section, {"bits": value}, "config")


def test_a_required_value_left_unset_is_an_error_that_names_it():
    assert message(steps=config_dict.placeholder(int)).startswith("config.ppo.steps = None should be an integer: ")


def test_what_the_dataclass_itself_refuses_is_the_same_kind_of_error():
    assert message(steps=0) == "config.ppo: steps must be positive, not 0"


@dataclasses.dataclass(frozen=True)
class Ranged:
    rows: Count = 1
    rate: Positive = 1.0
    decay: NonNegative = 0.0
    share: Share = 0.5
    score: Finite = 0.0
    smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0
    bound: Annotated[float, Range(above=0, infinite=True)] = 1.0
    clip: Positive | None = None
    beta: Positive | Literal["auto"] = "auto"
    targets: tuple[Positive, ...] = ()
    windows: tuple[Count | None, ...] | None = None


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("rows", 0, "at least 1"),
        ("rows", -3, "at least 1"),
        ("rows", 2**31, "at most 2147483647"),
        ("rate", 0, "above 0"),
        ("rate", float("nan"), "a finite number"),
        ("rate", float("inf"), "a finite number"),
        ("decay", -1e-9, "at least 0"),
        ("share", 1.01, "at most 1"),
        ("score", float("-inf"), "a finite number"),
        ("smoothing", 0.5, "below 0.5"),
        ("bound", float("nan"), "a finite number"),
        ("clip", 0.0, "above 0"),
        ("beta", -1, "above 0"),
        ("targets", (1.0, 0.0), "above 0 in every element"),
        ("windows", (4, None, 0), "at least 1 in every element"),
    ],
)
def test_a_number_out_of_its_range_is_named_with_its_bound(key, value, fault):
    with pytest.raises(RlhfError) as caught:
        config.build(Ranged, {key: value}, "config.dpo")
    assert str(caught.value) == f"config.dpo.{key} = {value!r} must be {fault}: set it with --config.dpo.{key}=...."


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rows", 1, 1),
        ("rate", 1, 1.0),
        ("decay", 0, 0.0),
        ("share", 1, 1.0),
        ("score", -3, -3.0),
        ("bound", float("inf"), float("inf")),
        ("clip", None, None),
        ("beta", "auto", "auto"),
        ("beta", 2, 2.0),
        ("targets", [1, 2], (1.0, 2.0)),
        ("windows", [4, None], (4, None)),
    ],
)
def test_a_number_on_the_right_side_of_its_bounds_arrives(key, value, expected):
    assert repr(getattr(config.build(Ranged, {key: value}, "config.dpo"), key)) == repr(expected)


def test_a_type_with_a_range_is_described_as_without():
    with pytest.raises(RlhfError, match=re.escape("config.clip = 'no' should be a number or None: set it")):
        config.build(Ranged, {"clip": "no"}, "config")


def test_input_stages_are_every_stage_named_in_the_order_of_fields_and_once():
    stage = build(others=["rm", "sft", "gold"], judge={"stage": "critic"}, name="not_a_stage")
    assert config.input_stages(stage, ()) == ("sft", "rm", "gold", "critic")
    assert config.input_stages(build(), ()) == ("sft",)
    assert config.input_stages(Judge(), ()) == ()


def overridden(*flags: tuple[str, str]) -> Stage:
    section = ConfigDict({"policy": "sft", "optimizer": {"learning_rate": 1e-3}, "kl_coef": 0.1, "judge": None})
    whole = ConfigDict({"ppo": section}).lock()
    for path, text in flags:
        config.override(whole, path, text)
    return config.build(Stage, whole.ppo, "config.ppo")


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("kl_coef", "1", 1.0),
        ("kl_coef", "1e-2", 0.01),
        ("steps", "7", 7),
        ("whiten", "False", False),
        ("whiten", "false", False),
        ("name", "7", "7"),
        ("name", "'7'", "7"),
        ("name", "None", "None"),
        ("policy", "runs/a b", "runs/a b"),
        ("clip", "None", None),
        ("clip", "2", 2.0),
        ("beta", "auto", "auto"),
        ("beta", "0.5", 0.5),
        ("betas", "[1, 2]", (1.0, 2.0)),
        ("betas", "1,2", (1.0, 2.0)),
        ("grid", "((1,), (2, 3))", ((1,), (2, 3))),
        ("others", "('rm', 'a\\d')", ("rm", "a\\d")),
        ("others", "rm", ("rm",)),
        ("others", "rm,runs/sft", ("rm", "runs/sft")),
        ("name", "rm,sft", "rm,sft"),
        ("optimizer.betas", "(0.5, 0.6)", (0.5, 0.6)),
        ("judge.stage", "rm", "rm"),
        ("judge", "{'temperature': 2}", Judge(temperature=2.0)),
    ],
)
def test_any_field_is_set_by_text(path, text, expected):
    found = overridden((f"ppo.{path}", text))
    for name in path.split("."):
        found = getattr(found, name)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("kl_coeff", "1", "config.ppo.kl_coeff is not a field of Stage. Did you mean 'kl_coef'?"),
        ("optimizer.shedul", "1", "config.ppo.optimizer.shedul is not a field of Optimizer. Did you mean 'schedule'?"),
        ("judges.stage", "rm", "config.ppo.judges is not a field of Stage. Did you mean 'judge'?"),
        ("judge.stag", "rm", "config.ppo.judge.stag is not a field of Judge. Did you mean 'stage'?"),
        ("kl_coef.x", "1", "config.ppo.kl_coef should be a number: it has no fields, such as 'x'"),
        ("kl_coef", "high", "config.ppo.kl_coef = 'high' should be a number"),
        ("steps", "1.5", "config.ppo.steps = 1.5 should be an integer"),
        ("whiten", "1", "config.ppo.whiten = 1 should be True or False"),
        ("others", "a{1,2}", "config.ppo.others = 'a{1,2}' should be a list of the name of a stage"),
        ("betas", "(1, 'a')", "config.ppo.betas = (1, 'a') should be a list of a number"),
        ("judge", "rm", "config.ppo.judge = 'rm' should be a section with the fields of Judge or None"),
    ],
)  # fmt: skip
def test_a_text_that_a_field_does_not_take_is_named_with_its_path(path, text, message):
    with pytest.raises(RlhfError) as caught:
        overridden((f"ppo.{path}", text))
    assert str(caught.value).removesuffix(f": set it with --config.ppo.{path}=....") == message


def test_the_last_override_of_a_field_counts_and_references_within_a_config_follow():
    assert overridden(("ppo.judge.temperature", "2"), ("ppo.judge", "None")).judge is None
    assert overridden(("ppo.judge", "None"), ("ppo.judge.temperature", "2")).judge == Judge(temperature=2.0)
    whole = ConfigDict({"data": {"length": 3}})
    whole.ppo = {"policy": "sft", "optimizer": {"learning_rate": 1.0}, "steps": whole.data.get_ref("length")}
    config.override(whole.lock(), "data.length", "5")
    assert config.build(Stage, whole.ppo, "config.ppo").steps == 5


def test_a_section_given_in_part_keeps_the_rest_of_its_fields_default():
    @dataclasses.dataclass(frozen=True)
    class Section:
        optimizer: Optimizer = Optimizer(0.1, schedule="cosine")

    assert config.build(Section, {"optimizer": {"betas": (0, 0)}}, "config").optimizer == Optimizer(
        0.1, (0.0, 0.0), "cosine"
    )


def test_nan_and_infinity_are_numbers_as_text():
    whole = ConfigDict({})
    config.override(whole, "bound", "inf")
    assert config.build(Ranged, whole, "config").bound == float("inf")
    config.override(whole, "rate", "nan")
    with pytest.raises(RlhfError, match=r"config\.rate = nan must be a finite number"):
        config.build(Ranged, whole, "config")
