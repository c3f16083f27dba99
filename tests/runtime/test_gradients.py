"""Gradients by micro-batches are the whole batch's, weighted by tokens; what is frozen stays, and costs no memory."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.core import masking
from rlhf_jax.methods import dpo
from rlhf_jax.methods.offline import Updates
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import OptimizerConfig, gradients, make_optimizer
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.stages import reward_model, sft
from rlhf_jax.types import RlhfError
from tests.support import tiny
from tests.support.programs import PLACEMENTS, assert_close
from tests.support.tiny import demonstrations, with_micro_batch


@functools.cache
def run(name: str, optimizer: OptimizerConfig, where=tiny.ONE_DEVICE):
    """One step of a stage from the same start: parameters and metrics after it."""
    placement = make_placement(where, seeds=1)
    policy, reward = {"policy": tiny.policy_params()}, {"reward": tiny.reward_params()}
    if name == "ppo":
        config = tiny.with_config(optimizer=optimizer, minibatches=1)
        step, state = tiny.ppo_step(config, placement.axes), tiny.ppo_state(config)
        frozen, batch = tiny.ppo_frozen(), tiny.online(16)
    else:
        cases: dict[str, Any] = {
            "sft": (sft.make_step, policy, (), demonstrations()),
            "dpo": (
                dpo.make_step,
                policy,
                {"reference": tiny.policy_params(2), "beta": jnp.float32(0.1)},
                tiny.preferences(16),
            ),
            "reward_model": (reward_model.make_step, reward, (), tiny.preferences(16)),
        }
        make, params, frozen, batch = cases[name]
        network: Any = tiny.REWARD if name == "reward_model" else tiny.POLICY
        step = make(Updates(network, optimizer, 3, placement.axes))
        state = TrainState(jnp.int32(0), params, make_optimizer(optimizer, 3).init(params))
    state = placement.put_state(state)
    program = placement.compile(step, state)
    state, metrics, _ = program(state, placement.put_frozen(frozen), tiny.several([batch]), jax.random.key(0))
    return jax.device_get((placement.whole(state).params, metrics))


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.nightly) for name in ("sft", "ppo")), "dpo", "reward_model"]
)
def test_micro_batches_give_the_step_of_the_whole_batch(name):
    whole, parts = run(name, tiny.OPTIMIZER), run(name, with_micro_batch(4))
    nonlinear = ("val/ratio_var",)  # a variance within micro-batches is not the batch's
    without = [{key: value for key, value in result[1].items() if key not in nonlinear} for result in (whole, parts)]
    assert_close((parts[0], without[1]), (whole[0], without[0]))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "where", [pytest.param(name, marks=() if name == "pmap=8" else pytest.mark.nightly) for name in PLACEMENTS]
)
def test_micro_batches_on_several_devices(where):
    assert_close(run("sft", with_micro_batch(8), PLACEMENTS[where]), run("sft", tiny.OPTIMIZER))


@pytest.mark.nightly
def test_an_unweighted_mean_would_be_another_gradient():
    """The test above has the power to tell: micro-batches of these lengths, weighted alike, give another one."""
    batch, params = jax.tree.map(jnp.asarray, demonstrations()), {"policy": tiny.policy_params()}

    def loss_fn(params, rows):
        return sft.sft_loss(tiny.POLICY, params["policy"], rows, None, ())

    def gradient(config, weight):
        return jax.jit(lambda params, batch: gradients(config, loss_fn, params, batch, weight, ())[2])(params, batch)

    def tokens(rows):
        return masking.count(rows.loss_mask[:, 1:], ())

    expected = gradient(tiny.OPTIMIZER, tokens)
    assert_close(gradient(with_micro_batch(4), tokens), expected)
    with pytest.raises(AssertionError):
        assert_close(gradient(with_micro_batch(4), lambda rows: jnp.int32(1)), expected)


@pytest.mark.parametrize("rows", [None, 4])
def test_gradients_of_bfloat16_weights_are_taken_and_summed_in_float32(rows):
    batch = jax.tree.map(jnp.asarray, demonstrations())
    half = {"policy": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.policy_params())}

    def loss_fn(params, rows):
        return sft.sft_loss(tiny.POLICY, params["policy"], rows, None, ())

    def tokens(rows):
        return masking.count(rows.loss_mask[:, 1:], ())

    gradient = jax.jit(lambda params: gradients(with_micro_batch(rows), loss_fn, params, batch, tokens, ())[2])
    found, expected = gradient(half), gradient(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
    assert_close(jax.device_get(found), jax.device_get(expected), 1e-6)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(RlhfError, match=re.escape("16 rows does not divide into slices of 5")):
        run("sft", with_micro_batch(5))
    section = {**dataclasses.asdict(tiny.OPTIMIZER), "micro_batch": 0}
    with pytest.raises(RlhfError, match=re.escape("config.sft.optimizer.micro_batch = 0 must be at least 1")):
        configs.build(OptimizerConfig, section, "config.sft.optimizer")


def test_frozen_parameters_stay_and_have_no_optimiser_state():
    frozen = dataclasses.replace(tiny.OPTIMIZER, freeze=("embedding$", "attention/"), weight_decay=0.1)
    start = {"policy": jax.device_get(tiny.policy_params())}
    params, _ = run("sft", frozen)
    leaves = zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(params), strict=True)
    moved = {jax.tree_util.keystr(path, simple=True, separator="/"): np.any(a != b) for (path, a), b in leaves}
    for path, changed in moved.items():
        assert changed == (not re.search("embedding$|attention/", path)), path
    assert any(moved.values()) and not all(moved.values())
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(make_optimizer(config, 3).init(start)))
        for config in (tiny.OPTIMIZER, frozen)
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_patterns_that_match_nothing_or_everything_are_refused():
    params = {"policy": tiny.policy_params()}
    for pattern, message in (("block_7/", "'block_7/' matches no parameter"), (".", "leaves nothing to train")):
        with pytest.raises(RlhfError, match=re.escape(message)):
            make_optimizer(dataclasses.replace(tiny.OPTIMIZER, freeze=(pattern,)), 3).init(params)
    with pytest.raises(ValueError, match="is not a regular expression"):
        dataclasses.replace(tiny.OPTIMIZER, freeze=("(",))
