import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import kl
from rlhf_jax.methods import policy_config
from tests.support.padded_arrays import normal, seeds

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


def pairs(divergence, vocabulary=20, count=200):
    """Logits of policies, and log-probabilities of references at one divergence from them."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        logits, direction = rng.normal(size=(2, vocabulary))

        def excess(distance, logits=logits, direction=direction):
            policy, reference = (scipy.special.softmax(x) for x in (logits, logits + distance * direction))
            return scipy.stats.entropy(policy, reference) - divergence

        reference = logits + scipy.optimize.brentq(excess, 1e-6, 60) * direction
        found.append((logits, reference - scipy.special.logsumexp(reference)))
    return [jnp.asarray(part, jnp.float32) for part in zip(*found, strict=True)]


def exact_gradient(name, place, logits, reference):
    """The mean over samples of the policy, as training has it: of the score function, or of the estimate's own."""

    def surrogate(logits):
        logprobs = jax.nn.log_softmax(logits)[None]
        estimates = kl.ESTIMATORS[name](logprobs, reference[None], jax.lax.stop_gradient(logprobs))
        if place == "reward":
            estimates = jax.lax.stop_gradient(estimates) * logprobs
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * estimates)

    return jax.grad(surrogate)(logits)


ROWS = [*((name, "reward") for name in ("k1", "k2", "k3")), *((name, "loss") for name in kl.ESTIMATORS)]


@pytest.mark.nightly
def test_the_table_of_gradients_in_the_fields_docstring_is_what_they_are():
    cells = {row: [] for row in ROWS}
    gradients = {row: jax.jit(jax.vmap(functools.partial(exact_gradient, *row))) for row in ROWS}
    exact = jax.jit(jax.vmap(gradient_of_kl))
    for distance in (0.05, 2.1):
        logits, reference = pairs(distance)
        true = np.asarray(exact(logits, reference), np.float64)
        for row in ROWS:
            gradient = np.asarray(gradients[row](logits, reference), np.float64)
            if row == ("k1", "loss"):
                np.testing.assert_allclose(gradient, 0, atol=1e-6)
                cells[row].append("no gradient")
                continue
            norms = np.linalg.norm(gradient, axis=1) * np.linalg.norm(true, axis=1)
            cosines = np.sum(gradient * true, axis=1) / norms
            low, high = np.percentile(cosines, [5, 95])
            cells[row].append(f"{cosines.mean():.2f} ({low:.2f} to {high:.2f})")
            if row in (("k1", "reward"), ("k2", "loss"), ("k3+", "loss"), ("k3_weighted", "loss")):
                np.testing.assert_allclose(gradient, true, rtol=1e-4, atol=1e-5)
    table = ["| " + " | ".join(f"{cell:<21}" for cell in (f"{row[0]}, {row[1]}", *cells[row])) + " |" for row in ROWS]
    _, *documented = (line for line in inspect.getsource(policy_config).splitlines() if line.startswith("| k"))
    assert documented == table, "\n".join(table)


@given(seeds)
def test_straight_through_k3_is_k3_in_value_and_k2_in_gradient(seed):
    policy, reference, _ = two_distributions(seed)
    np.testing.assert_array_equal(kl.k3_straight_through(policy, reference), kl.k3(policy, reference))
    got = jax.grad(lambda x: jnp.sum(kl.k3_straight_through(x, reference)))(policy)
    np.testing.assert_allclose(got, policy - reference, rtol=1e-5, atol=1e-6)


@given(seeds)
def test_weighted_k3_has_the_value_and_gradient_of_the_divergence_over_samples_of_another_policy(seed):
    policy, reference, divergence = two_distributions(seed)
    old = jax.nn.log_softmax(policy + 0.5 * normal(seed + 2, 1, VOCABULARY))

    def mean(logits):
        return jnp.sum(jnp.exp(old) * kl.k3_weighted(jax.nn.log_softmax(logits), reference, old))

    value, gradient = jax.value_and_grad(mean)(policy)
    np.testing.assert_allclose(value, divergence, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient, gradient_of_kl(policy, reference), atol=1e-5)
    # The product, differentiated as it stands.
    product = jax.grad(lambda x: jnp.sum(jnp.exp(x - old) * kl.k3(x, reference)))(policy)
    direct = jax.grad(lambda x: jnp.sum(kl.k3_weighted(x, reference, old)))(policy)
    np.testing.assert_allclose(direct, product, rtol=1e-3, atol=1e-4)
