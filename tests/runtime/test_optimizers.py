"""Optimisers: which parameters are decayed, the rate's floor, the fields that each one reads, and their formulas."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.models import value_head
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.optimizers import OptimizerConfig, learning_rate, make_optimizer, update
from rlhf_jax.types import RlhfError
from tests.support import tiny

ALL_BIASES = dataclasses.replace(
    tiny.MODEL,
    norm="layer",
    qk_norm="all",
    norm_placement="around",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=True,
    positions="learned",
    context=8,
    tied=False,
)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("attention/qkv", "attention/o", "up|gate|down"))
SECTION = dataclasses.asdict(tiny.OPTIMIZER)


def paths_of(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def one_update(config: OptimizerConfig, params, grads, updates: int = 4):
    optimizer = make_optimizer(config, updates)

    @jax.jit
    def updated(params, grads):
        return update(optimizer, grads, params, optimizer.init(params), (), key=jax.random.key(0))[0]

    return updated(params, grads)


def ones_of(model: ModelConfig) -> dict:
    """Parameters of several networks, all 1."""
    policy, reward, key = PolicyNetwork(model, 11, (), LORA), ScalarNetwork(model, 11, "last"), jax.random.key(0)

    def init():
        start = policy.init(key)
        return {
            "policy": start,
            "reward": reward.init(key),
            "adapter": policy.init_adapter(start, key),
            "value": value_head.init_normal(model.d_model, key),
        }

    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), jax.eval_shape(init))


@pytest.mark.nightly
@pytest.mark.parametrize("model", [tiny.MODEL, ALL_BIASES], ids=["rms", "every bias and norm"])
def test_weight_decay_leaves_out_norms_and_biases_alone(model):
    """Without a gradient only decay moves a weight; all start at 1, so that none is 0."""
    params = ones_of(model)
    config = dataclasses.replace(tiny.OPTIMIZER, weight_decay=0.5, learning_rate=0.1)
    after = paths_of(one_update(config, params, jax.tree.map(np.zeros_like, params)))
    kept = {path for path, leaf in after.items() if np.all(leaf == 1)}
    assert kept == {path for path in after if path.split("/")[-1] in ("scale", "bias")}
    decayed = {path.split("/")[-1] for path in after} - {"scale", "bias"}
    assert {"embedding", "kernel", "A"} <= decayed and (model is tiny.MODEL or {"positions", "head"} <= decayed)
    for path in set(after) - kept:
        np.testing.assert_allclose(after[path], 1 - 0.1 * 0.5, rtol=1e-6, err_msg=path)


def test_what_is_not_decayed_is_a_field():
    params = ones_of(tiny.MODEL)
    for no_decay, kept in (((), ()), (("embedding$", "adapter/"), ("embedding", "adapter"))):
        config = dataclasses.replace(tiny.OPTIMIZER, weight_decay=0.5, no_decay=no_decay)
        after = paths_of(one_update(config, params, jax.tree.map(np.zeros_like, params)))
        still = {path for path, leaf in after.items() if np.all(leaf == 1)}
        assert still == {path for path in after if any(name in path for name in kept)}
    with pytest.raises(ValueError, match="no_decay: '\\(' is not a regular expression"):
        dataclasses.replace(tiny.OPTIMIZER, no_decay=("(",))


def updates_of(config: OptimizerConfig, grads: list, start=None, updates: int = 50) -> list[np.ndarray]:
    """The weights after each update."""
    optimizer, params = (
        make_optimizer(config, updates),
        {"policy": {"kernel": jnp.asarray(start if start is not None else START)}},
    )
    state, seen = optimizer.init(params), []
    for grad in grads:
        given = {"policy": {"kernel": jnp.asarray(grad)}}
        params, state, _ = update(optimizer, given, params, state, (), key=jax.random.key(0))
        seen.append(np.asarray(params["policy"]["kernel"], np.float64))
    return seen


START = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
GRADS = [np.random.default_rng(k).normal(size=(6, 4)).astype(np.float32) for k in range(1, 7)]
UNBOUND = dataclasses.replace(tiny.OPTIMIZER, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1e9, epsilon=1e-8)


def test_lion_is_the_papers_algorithm():
    """Chen et al. 2023, algorithm 2: the sign of an interpolation, decoupled decay, then the momentum."""
    config = dataclasses.replace(UNBOUND, name="lion", b1=0.9, b2=0.95)
    weights, momentum = START.astype(np.float64), np.zeros(START.shape)
    for grad, found in zip(GRADS, updates_of(config, GRADS), strict=True):
        weights = weights - 1e-2 * (np.sign(0.9 * momentum + 0.1 * grad) + 0.1 * weights)
        momentum = 0.95 * momentum + 0.05 * grad
        np.testing.assert_allclose(found, weights, rtol=1e-5, atol=1e-6)
    default = updates_of(dataclasses.replace(config, b1=None, b2=None), GRADS)
    np.testing.assert_array_equal(default, updates_of(dataclasses.replace(config, b1=0.9, b2=0.99), GRADS))
    assert not np.array_equal(default, updates_of(config, GRADS))


def test_adafactor_is_the_papers_algorithm():
    """Shazeer & Stern 2018, algorithm 4 for a matrix of 128 by 130 and algorithm 5 for a small one, by a fixed rate."""
    for shape in ((128, 130), (6, 4)):
        start, *grads = (np.random.default_rng(k).normal(size=shape).astype(np.float32) for k in range(5))
        config = dataclasses.replace(UNBOUND, name="adafactor")
        weights, rows, columns, whole = start.astype(np.float64), 0.0, 0.0, 0.0
        for number, (grad, found) in enumerate(zip(grads, updates_of(config, grads, start), strict=True), 1):
            decay, square = 1 - number**-0.8, np.square(grad, dtype=np.float64) + 1e-30
            rows, columns, whole = (
                decay * old + (1 - decay) * new
                for old, new in ((rows, square.mean(axis=1)), (columns, square.mean(axis=0)), (whole, square))
            )
            second = np.outer(rows, columns) / np.mean(rows) if shape[0] >= 128 else whole
            change = grad / np.sqrt(second)
            change = change / max(1.0, np.sqrt(np.mean(change**2)))
            weights = weights - 1e-2 * (change + 0.1 * weights)
            np.testing.assert_allclose(found, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_ends_at_the_minimum_rate(schedule):
    config = dataclasses.replace(tiny.OPTIMIZER, schedule=schedule, warmup_steps=4, learning_rate=1e-3)
    low = dataclasses.replace(config, min_learning_rate=2e-4)
    rates, lower = (np.array([learning_rate(each, 24)(n) for n in range(30)]) for each in (config, low))
    np.testing.assert_allclose(lower[:4], rates[:4])
    share = np.arange(21) / 20
    fall = 1 - share if schedule == "linear" else 0.5 * (1 + np.cos(np.pi * share))
    np.testing.assert_allclose(lower[4:25], 2e-4 + 8e-4 * fall, rtol=1e-5)
    np.testing.assert_allclose(lower[24:], 2e-4, rtol=1e-5)  # and stays there
    np.testing.assert_allclose(rates[24:], 0, atol=1e-9)


NAMES = ("adamw", "adam", "rmsprop", "adafactor", "lion", "sgd")
OPTIONS: dict[str, Any] = {"epsilon": 1e-2, "b1": 0.5, "b2": 0.5, "momentum": 0.5}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_what_its_optimiser_does_and_others_refuse_it(name):
    reads = {
        "adamw": {"epsilon", "b1", "b2"},
        "adam": {"epsilon", "b1", "b2"},
        "rmsprop": {"epsilon", "b2", "momentum"},
        "adafactor": set(),
        "lion": {"b1", "b2"},
        "sgd": {"momentum"},
    }[name]
    config = dataclasses.replace(UNBOUND, name=name)
    plain = updates_of(config, GRADS)[-1]
    for field, value in OPTIONS.items():
        if field in reads:
            other = updates_of(dataclasses.replace(config, **{field: value}), GRADS)[-1]
            assert np.abs(other - plain).max() > 1e-4, field
        else:
            with pytest.raises(ValueError, match=f"{field} = {value} has no effect with name = '{name}', which reads"):
                dataclasses.replace(config, **{field: value})
    without = updates_of(dataclasses.replace(config, weight_decay=0.0), GRADS)[-1]
    assert np.abs(without - plain).max() > 1e-4


def test_each_optimiser_is_another():
    ends = [updates_of(dataclasses.replace(UNBOUND, name=name), GRADS)[-1] for name in NAMES]
    for i in range(len(ends)):
        for j in range(i):
            assert np.abs(ends[i] - ends[j]).max() > 1e-4, (NAMES[i], NAMES[j])


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("learning_rate", -1.0, "above 0"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "a finite number"),
        ("warmup_steps", -1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("epsilon", 0.0, "above 0"),
        ("max_grad_norm", 0.0, "above 0"),
        ("max_grad_norm", float("inf"), "a finite number"),
        ("micro_batch", 0, "at least 1"),
        ("b1", 1.0, "below 1"),
        ("b2", -0.5, "at least 0"),
        ("momentum", 1.5, "below 1"),
        ("min_learning_rate", -1e-9, "at least 0"),
    ],
)
def test_a_number_out_of_range_is_one_message(field, value, bound):
    message = (
        f"config.sft.optimizer.{field} = {value!r} must be {bound}: set it with --config.sft.optimizer.{field}=...."
    )
    with pytest.raises(RlhfError, match=re.escape(message)):
        configs.build(OptimizerConfig, SECTION | {field: value}, "config.sft.optimizer")


def test_a_minimum_rate_that_is_not_read_or_too_high_is_refused():
    with pytest.raises(ValueError, match="min_learning_rate = 1e-05 has no effect with schedule = 'constant'"):
        dataclasses.replace(tiny.OPTIMIZER, min_learning_rate=1e-5)
    with pytest.raises(ValueError, match=r"min_learning_rate = 0\.1 must be at most learning_rate = 0\.0003"):
        dataclasses.replace(tiny.OPTIMIZER, schedule="linear", min_learning_rate=0.1)
