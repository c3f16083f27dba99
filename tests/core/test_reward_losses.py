import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import reward_losses
from tests.core.cases import normal, seeds

PAIRS = 6
bradley_terry_loss = jax.jit(functools.partial(reward_losses.bradley_terry_loss, axes=()))
gradients = jax.jit(jax.grad(lambda *args: bradley_terry_loss(*args)[0], argnums=(0, 1)))


@given(seeds)
def test_loss_and_gradients_are_those_of_logistic_regression(seed):
    chosen, rejected = 2 * normal(seed, PAIRS), 2 * normal(seed + 1, PAIRS)
    margins = np.asarray(chosen, np.float64) - rejected
    np.testing.assert_allclose(bradley_terry_loss(chosen, rejected)[0], np.mean(np.logaddexp(0, -margins)), rtol=1e-5)
    slope = scipy.special.expit(-margins) / PAIRS
    for got, sign in zip(gradients(chosen, rejected), (-1, 1), strict=True):
        np.testing.assert_allclose(got, sign * slope, rtol=1e-4, atol=1e-7)


@given(seeds, st.floats(-100, 100))
def test_only_differences_of_scores_matter(seed, shift):
    chosen, rejected = normal(seed, PAIRS), normal(seed + 1, PAIRS)
    shifted = bradley_terry_loss(chosen + shift, rejected + shift)[0]
    np.testing.assert_allclose(shifted, bradley_terry_loss(chosen, rejected)[0], rtol=1e-4)


def test_equal_scores_give_log_2_and_count_half_right():
    scores = normal(0, PAIRS)
    loss, metrics = bradley_terry_loss(scores, scores)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == 0


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_neither_overflow_nor_lose_the_gradient(margin):
    args = jnp.full(PAIRS, margin), jnp.zeros(PAIRS)
    np.testing.assert_allclose(bradley_terry_loss(*args)[0], max(0.0, -margin), rtol=1e-6)
    np.testing.assert_allclose(gradients(*args)[0], 0 if margin > 0 else -1 / PAIRS, rtol=1e-6)


@given(seeds)
def test_metrics(seed):
    chosen, rejected = normal(seed, PAIRS), normal(seed + 1, PAIRS)
    _, metrics = bradley_terry_loss(chosen, rejected)
    both = np.concatenate([chosen, rejected])
    expected = {
        "accuracy": np.mean(np.asarray(chosen) > np.asarray(rejected)),
        "margin": np.mean(chosen - rejected),
        "min_reward": both.min(),
        "mean_reward": both.mean(),
        "max_reward": both.max(),
    }
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@given(seeds)
def test_permuting_the_pairs_permutes_the_gradients(seed):
    args = normal(seed, PAIRS), normal(seed + 1, PAIRS)
    order = np.random.default_rng(seed).permutation(PAIRS)
    permuted = [x[order] for x in args]
    np.testing.assert_allclose(bradley_terry_loss(*permuted)[0], bradley_terry_loss(*args)[0], rtol=1e-5)
    for got, whole in zip(gradients(*permuted), gradients(*args), strict=True):
        np.testing.assert_allclose(got, whole[order], rtol=1e-6)
