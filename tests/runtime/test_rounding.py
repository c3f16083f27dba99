"""Weights in bfloat16: what masters, stochastic and plain rounding keep of small updates, on any devices and seeds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runtime import rounding
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import make_optimizer, update
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.runtime.rounding import LowPrecision
from tests.support import tiny
from tests.support.programs import PLACEMENTS

STEPS, WEIGHTS, RATE = 50, 128, 1e-6
KEY = jax.random.key(0)
ADAM = dataclasses.replace(tiny.OPTIMIZER, learning_rate=RATE, epsilon=1e-8)
START = jnp.asarray(0.02 * np.random.default_rng(0).normal(size=(8, WEIGHTS // 8)), jnp.bfloat16)
STEADY = jnp.asarray(np.random.default_rng(1).normal(size=START.shape), jnp.float32)


def train(mode: Any, dtype: str, key=KEY, frozen: bool = False):
    """Fifty updates by noisy gradients: weights, state and shares that survived."""
    config = dataclasses.replace(ADAM, low_precision=mode, freeze=("still",) if frozen else ())
    optimizer = make_optimizer(config, STEPS)
    params = {"policy": {"w": START.astype(dtype)}} | ({"other": {"still": START}} if frozen else {})

    def step(carry, number):
        params, state = carry
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(9), number), START.shape)
        grads = jax.tree.map(lambda leaf: STEADY + 0.3 * noise, params)
        params, state, said = update(optimizer, grads, params, state, (), key=rounding.update_key(key, number))
        return (params, state), said["update_survived"]

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(STEPS))


def moved(weights) -> np.ndarray:
    return np.asarray(weights, np.float64) - np.asarray(START, np.float64)


@functools.cache
def in_float32() -> np.ndarray:
    return moved(jax.jit(functools.partial(train, "masters", "float32"))()[0][0]["policy"]["w"])


def apart(found: np.ndarray) -> float:
    return float(np.linalg.norm(found - in_float32()) / np.linalg.norm(in_float32()))


def test_masters_hold_what_float32_would_be_and_weights_are_their_rounding():
    (params, state), survived = jax.jit(functools.partial(train, "masters", "bfloat16"))()
    assert apart(moved(state.masters["policy"]["w"])) < 1e-6
    np.testing.assert_array_equal(params["policy"]["w"], state.masters["policy"]["w"].astype(jnp.bfloat16))
    np.testing.assert_allclose(survived, 1, atol=0.01)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {"float32"}


def test_rounding_to_nearest_loses_small_updates():
    (params, state), survived = jax.jit(functools.partial(train, "nearest", "bfloat16"))()
    assert apart(moved(params["policy"]["w"])) > 0.9 and np.mean(survived) < 0.2
    assert state.masters == ()


@pytest.mark.nightly
def test_stochastic_rounding_moves_as_float32_does_in_expectation():
    """The mean of many seeds; one seed's error is several times the movement, and falls as one over the root of seeds.

    The bound is 0.05 where the mean's own standard error, measured over the seeds, is below 0.03.
    """
    seeds = 4000
    run = jax.jit(jax.vmap(lambda key: train("stochastic", "bfloat16", key)[0][0]["policy"]["w"]))
    each = moved(run(jax.random.split(jax.random.key(3), seeds)))
    mean, error = each.mean(axis=0), each.std(axis=0) / np.sqrt(seeds)
    assert np.linalg.norm(error) < 0.03 * np.linalg.norm(in_float32())
    assert apart(mean) <= 0.05
    assert apart(each[0]) > 0.5  # a single seed's is noise: the test has the power to tell
    share = np.sum(each * in_float32(), axis=(1, 2)) / np.sum(in_float32() ** 2)
    np.testing.assert_allclose(share.mean(), 1, atol=0.01)


def test_stochastic_rounding_gives_one_of_two_neighbours_without_bias():
    values = jnp.float32([1.001, -1.001, 3e-5, -0.02, 1.0, 0.0, 65537.0])
    drawn = jax.vmap(lambda key: rounding.stochastic_bfloat16(values, key))(jax.random.split(jax.random.key(0), 20_000))
    drawn = np.asarray(drawn, np.float64)
    for value, draws in zip(np.asarray(values, np.float64), drawn.T, strict=True):
        spacing = 2.0 ** (np.floor(np.log2(abs(value))) - 7) if value else 1.0
        assert np.all(np.abs(draws - value) < spacing), value
        assert abs(draws.mean() - value) < 4 * spacing / np.sqrt(len(draws)), value
    assert set(drawn[:, 4]) == {1.0} and set(drawn[:, 5]) == {0.0}  # what bfloat16 has stays
    odd = rounding.stochastic_bfloat16(jnp.float32([np.nan, np.inf, -np.inf]), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(odd, np.float32), np.array([np.nan, np.inf, -np.inf], np.float32))


def test_a_key_is_one_runs_and_one_updates():
    keys = [jax.random.key_data(rounding.update_key(jax.random.key(s), n)) for s in range(3) for n in range(3)]
    assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 9


@pytest.mark.parametrize("mode", ["masters", "stochastic", "nearest"])
def test_frozen_weights_stay_and_have_no_state(mode):
    (params, state), _ = jax.jit(functools.partial(train, mode, "bfloat16", frozen=True))()
    np.testing.assert_array_equal(params["other"]["still"], START)
    assert params["policy"]["w"].dtype == params["other"]["still"].dtype == jnp.bfloat16
    assert sum(leaf.size for leaf in jax.tree.leaves(state.inner)) < 2 * START.size + 10


def test_shares_are_measured_where_weights_are_rounded():
    def share(dtype: str, low_precision: LowPrecision, gradient: float) -> float:
        config = dataclasses.replace(ADAM, learning_rate=1e-11, low_precision=low_precision)
        optimizer, params = make_optimizer(config, 1), {"policy": {"w": jnp.full((8, 8), 0.1, dtype)}}
        grads = {"policy": {"w": jnp.full((8, 8), gradient)}}
        said = update(optimizer, grads, params, optimizer.init(params), (), key=jax.random.key(0))[2]
        return float(said["update_survived"])

    assert share("bfloat16", "nearest", 1) == 0
    assert np.isnan(share("bfloat16", "nearest", 0))
    assert share("bfloat16", "masters", 1) == share("float32", "nearest", 1) == 1


def test_the_network_that_loses_most_is_the_one_that_counts():
    before = {"policy": {"w": jnp.ones(4)}, "value": {"w": jnp.ones(4)}}
    updates = {"policy": {"w": jnp.full(4, 1e-3)}, "value": {"w": jnp.full(4, 10.0)}}
    after = {"policy": {"w": jnp.float32([1.001, 1, 1, 1])}, "value": {"w": jnp.full(4, 11.0)}}
    np.testing.assert_allclose(rounding.survived(before, after, updates), 0.25, rtol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("mode", ["masters", "stochastic"])
def test_all_devices_and_seeds_round_alike(mode, seeds):
    """Replicas stay equal under pmap, a mesh's parts are the whole's, and a seed is the run it would be alone."""
    optimizer = make_optimizer(dataclasses.replace(ADAM, low_precision=mode, learning_rate=1e-3), 4)

    def run(where, keys):
        placement = make_placement(where, seeds=len(keys))

        def step(state, frozen, batch, run_key):
            grads = jax.tree.map(lambda leaf: jnp.mean(batch) * STEADY, state.params)
            key = rounding.update_key(run_key, state.step)
            params, opt_state, said = update(optimizer, grads, state.params, state.opt_state, placement.axes, key=key)
            return TrainState(state.step + 1, params, opt_state), said, ()

        params = {"policy": {"up": {"kernel": START}}}
        start = TrainState(jnp.int32(0), params, optimizer.init(params))
        batch = np.ones((3, 8), np.float32)
        if len(keys) > 1:
            start = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(keys)), start)
            batch = np.ones((3, len(keys), 8), np.float32)
        state = placement.put_state(start)
        state = placement.compile(step, state)(state, {}, batch, keys if len(keys) > 1 else keys[0])[0]
        if placement.axes:
            jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[0], leaf[-1]), state)
        return jax.device_get(placement.whole(state)).params["policy"]["up"]["kernel"].astype(np.float32)

    keys = jax.random.split(jax.random.key(4), seeds)
    alone = np.squeeze(np.stack([run(tiny.ONE_DEVICE, keys[k : k + 1]) for k in range(seeds)]))
    for where in PLACEMENTS.values():
        np.testing.assert_array_equal(np.squeeze(run(where, keys)), alone)
    if seeds > 1:
        assert np.array_equal(alone[0], alone[1]) == (mode == "masters")


def test_moments_in_bfloat16_take_half_the_memory_and_average_as_in_float32():
    """At b2 = 0.999, a thousandth of the gradient's square is below half of bfloat16's last bit."""
    steps, params = 2000, {"policy": {"w": jnp.zeros((4, 64))}}
    grads = jax.tree.map(jnp.ones_like, params)

    def moments(dtype):
        optimizer = make_optimizer(dataclasses.replace(ADAM, moments=dtype, max_grad_norm=1e6), steps)
        start = optimizer.init(params)

        def step(carry, number):
            params, state = carry
            params, state, _ = update(optimizer, grads, params, state, (), key=rounding.update_key(KEY, number))
            return (params, state), None

        (_, state), _ = jax.jit(lambda: jax.lax.scan(step, (params, start), jnp.arange(steps)))()
        jax.tree.map(lambda a, b: np.testing.assert_equal((a.dtype, a.shape), (b.dtype, b.shape)), state, start)
        return [leaf for leaf in jax.tree.leaves(state.inner) if leaf.ndim > 1]

    half, full = moments("bfloat16"), moments("float32")
    assert sum(leaf.nbytes for leaf in half) * 2 == sum(leaf.nbytes for leaf in full) > 0
    for found, expected in zip(half, full, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32).mean(), expected.mean(), rtol=0.01)
