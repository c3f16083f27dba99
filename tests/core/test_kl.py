import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import kl
from tests.core.cases import normal, seeds

VOCABULARY = 6


def two_distributions(seed, distance=1.0):
    """Log-probabilities [1, V] of every token under two models, and the exact divergence."""
    policy = jax.nn.log_softmax(normal(seed, 1, VOCABULARY))
    reference = jax.nn.log_softmax(policy + distance * normal(seed + 1, 1, VOCABULARY))
    return policy, reference, scipy.stats.entropy(np.exp(policy[0]), np.exp(reference[0]))


@given(seeds)
def test_k1_and_k3_have_the_divergence_as_their_mean_over_samples_of_the_policy(seed):
    policy, reference, divergence = two_distributions(seed)
    for estimator in (kl.k1, kl.k3):
        mean = np.sum(np.exp(policy) * estimator(policy, reference))
        np.testing.assert_allclose(mean, divergence, rtol=1e-4, atol=1e-6)


@given(seeds)
def test_the_bias_of_k2_vanishes_as_the_models_approach_each_other(seed):
    policy, reference, divergence = two_distributions(seed, distance=0.01)
    np.testing.assert_allclose(np.sum(np.exp(policy) * kl.k2(policy, reference)), divergence, rtol=0.05, atol=1e-7)


@given(seeds)
def test_k2_is_half_the_square_and_k3_the_gap_of_the_logarithm_to_its_tangent(seed):
    policy, reference, _ = two_distributions(seed)
    log_ratio = np.asarray(reference, np.float64) - np.asarray(policy, np.float64)
    np.testing.assert_allclose(kl.k1(policy, reference), -log_ratio, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kl.k2(policy, reference), 0.5 * log_ratio**2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kl.k3(policy, reference), np.exp(log_ratio) - 1 - log_ratio, rtol=1e-4, atol=1e-6)


@given(st.floats(-20, 20, width=32))
def test_k2_and_k3_are_never_negative(log_ratio):
    policy = jnp.full((1, 1), -3.0)
    for estimator in (kl.k2, kl.k3):
        assert estimator(policy, policy + log_ratio) >= 0


def test_all_are_zero_where_the_models_agree():
    policy = -jnp.abs(normal(0, 3, 4))
    for estimator in (kl.k1, kl.k2, kl.k3):
        np.testing.assert_array_equal(estimator(policy, policy), 0)


def test_k3_keeps_its_digits_where_the_models_almost_agree():
    # exp(x) - 1 in float32 would leave none of them.
    np.testing.assert_allclose(kl.k3(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-3)), 1e-6 / 2, rtol=1e-3)


def mean_estimate(estimator, policy, reference):
    # The samples' distribution is fixed: no gradient through it.
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(policy)) * estimator(jax.nn.log_softmax(policy), reference))


def divergence(policy, reference):
    logprobs = jax.nn.log_softmax(policy)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - reference))


gradient_of_k1, gradient_of_k2 = (
    jax.jit(jax.grad(functools.partial(mean_estimate, estimator))) for estimator in (kl.k1, kl.k2)
)
gradient_of_kl = jax.jit(jax.grad(divergence))


@given(seeds)
def test_the_mean_gradient_of_k2_is_that_of_the_divergence_and_of_k1_is_nothing(seed):
    policy, reference, _ = two_distributions(seed)
    np.testing.assert_allclose(gradient_of_k2(policy, reference), gradient_of_kl(policy, reference), atol=1e-5)
    np.testing.assert_allclose(gradient_of_k1(policy, reference), 0, atol=1e-6)
