"""Numbers of policy gradients' configs that make no sense are refused with one message of the key and its bound."""

import dataclasses
from typing import Any

import pytest
from ml_collections import ConfigDict

from rlhf_jax import config
from rlhf_jax.stages.group_rl import GroupRLConfig
from rlhf_jax.stages.ppo import PPOConfig
from rlhf_jax.types import RlhfError
from tests.support import tiny

NAN, INFINITE = float("nan"), float("inf")
SECTIONS: dict[type, dict[str, Any]] = {
    PPOConfig: {field.name: getattr(tiny.PPO, field.name) for field in dataclasses.fields(PPOConfig)},
    GroupRLConfig: {**tiny.GROUP_RL, "method": "rloo", "kl_coef": 0.1},
}


def parse(cls, **changes):
    section = {**SECTIONS[cls], **changes}
    plain = {name: dataclasses.asdict(x) if name in ("optimizer", "loop") else x for name, x in section.items()}
    return config.build(cls, ConfigDict(plain, convert_dict=True), "config.rl")


SHARED = [
    ("kl_coef", -0.1, "at least 0"),
    ("kl_coef", NAN, "a finite number"),
    ("clip_ratio", 0.0, "above 0"),
    ("clip_ratio_high", -0.2, "above 0"),
    ("dual_clip", INFINITE, "a finite number"),
    ("score_scale", 0.0, "above 0"),
    ("score_scale", -1.0, "above 0"),
    ("score_clip", 0.0, "above 0"),
    ("missing_eos_score", -INFINITE, "a finite number"),
    ("entropy_coef", -0.01, "at least 0"),
    ("importance_cap", 0.0, "above 0"),
    ("importance_floor", -0.5, "at least 0"),
    ("overlong_buffer", 1.0, "below 1"),
    ("overlong_buffer", -0.1, "at least 0"),
    ("gamma", 1.1, "at most 1"),
    ("gamma", -0.1, "at least 0"),
]
CASES = [
    *((cls, *case) for cls in SECTIONS for case in SHARED),
    (PPOConfig, "gae_lambda", 1.01, "at most 1"),
    (PPOConfig, "gae_lambda", -0.1, "at least 0"),
    (PPOConfig, "value_clip", 0.0, "above 0"),
    (PPOConfig, "vf_coef", -0.1, "at least 0"),
    (PPOConfig, "value_warmup", -1, "at least 0"),
    (GroupRLConfig, "num_generations", 0, "at least 1"),
    (GroupRLConfig, "dynamic_sampling_rounds", -1, "at least 0"),
]


@pytest.mark.parametrize(("cls", "key", "value", "fault"), CASES)
def test_a_number_beyond_its_bounds_is_named_with_them(cls, key, value, fault):
    with pytest.raises(RlhfError) as caught:
        parse(cls, **{key: value})
    assert str(caught.value) == f"config.rl.{key} = {value!r} must be {fault}: set it with --config.rl.{key}=...."


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("ptx", {"coef": 0.0, "batch_size": 16}, "coef = 0.0 must be above 0"),
        ("ptx", {"coef": 1.0, "batch_size": 0}, "batch_size = 0 must be at least 1"),
        ("kl_controller", {"target": 0.0, "horizon": 10.0}, "target = 0.0 must be above 0"),
        ("kl_controller", {"target": 1.0, "horizon": INFINITE}, "horizon = inf must be a finite number"),
    ],
)
def test_sections_within_have_bounds_too(key, value, fault):
    with pytest.raises(RlhfError, match=f"^config.rl.{key}.{fault}: set it with"):
        parse(PPOConfig, **{key: value})


def test_bounds_themselves_are_within():
    parse(PPOConfig, kl_coef=0.0, gamma=0.0, gae_lambda=1.0, vf_coef=0.0, entropy_coef=0.0, overlong_buffer=0.0)
    parse(GroupRLConfig, kl_coef=0, num_generations=2, importance_cap=2, importance_floor=0, dynamic_sampling_rounds=0)
