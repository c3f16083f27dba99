"""Ratios are exact where float32 can hold and square them, and finite everywhere; so are the losses made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import kl, policy_losses, ratios
from rlhf_jax.core.policy_losses import POLICY_LOSSES

BOUNDS = {"clip_ratio": 0.2, "clip_ratio_high": 0.3, "dual_clip": np.inf}
BOUNDS |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
TOP = np.exp(ratios.LARGEST)
FAR = [92.0, 1e4]


@given(st.floats(-100, ratios.LARGEST, width=32))
def test_ratios_and_their_derivatives_are_exact_up_to_the_largest(x):
    value, slope = jax.value_and_grad(ratios.ratio)(jnp.float32(x))
    np.testing.assert_allclose([value, slope], np.exp(x), rtol=1e-5, atol=1e-30)
    value, slope = jax.value_and_grad(ratios.ratio_minus_one)(jnp.float32(x))
    np.testing.assert_allclose([value, slope], [np.expm1(x), np.exp(x)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", FAR)
def test_beyond_the_largest_ratios_follow_the_tangent(x):
    expected = [TOP * (1 + x - ratios.LARGEST), TOP]
    for function in (ratios.ratio, ratios.ratio_minus_one):
        np.testing.assert_allclose(jax.value_and_grad(function)(jnp.float32(x)), expected, rtol=1e-5)


MASK = jnp.ones((1, 2), bool)


def value_and_gradient(name, log_ratio, advantage):
    """Inputs of a loss: two tokens whose log-ratios sum to log_ratio, or are log_ratio each for token ratios."""
    function, reads, _ = POLICY_LOSSES[name]
    each = log_ratio / 2 if name == "sequence" else log_ratio
    old, advantages = jnp.full((1, 2), -1.0), jnp.full((1, 2), advantage)
    bounds = {bound: BOUNDS[bound] for bound in reads}

    def loss(logprobs):
        return jnp.sum(function(logprobs, old, advantages, MASK, **bounds).losses)

    return jax.device_get(jax.value_and_grad(loss)(old + each))


@pytest.mark.parametrize("x", FAR)
@pytest.mark.parametrize("name", ["ppo", "sequence", "gspo"])
def test_a_clip_has_no_gradient_however_far_the_ratio_is(name, x):
    """Both bounds: a ratio too high to gain from, and one too low to lose from; and an advantage of 0."""
    value, gradient = value_and_gradient(name, x, 1.5)
    np.testing.assert_allclose(value, -2 * 1.3 * 1.5, rtol=1e-5)
    np.testing.assert_array_equal(gradient, 0)
    value, gradient = value_and_gradient(name, -x, -1.5)
    np.testing.assert_allclose(value, 2 * 0.8 * 1.5, rtol=1e-5)
    np.testing.assert_array_equal(gradient, 0)
    for way in (x, -x):
        value, gradient = value_and_gradient(name, way, 0.0)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("x", FAR)
@pytest.mark.parametrize("name", ["ppo", "sequence", "gspo"])
def test_an_unclipped_ratio_is_large_finite_and_keeps_the_sign_of_its_gradient(name, x):
    value, gradient = value_and_gradient(name, x, -1.5)
    np.testing.assert_allclose(value, 2 * 1.5 * TOP * (1 + x - ratios.LARGEST), rtol=1e-5)
    each = 2 if name == "sequence" else 1  # a sum of two, of which each token moves both losses
    np.testing.assert_allclose(gradient, np.full((1, 2), each * 1.5 * TOP), rtol=1e-5)
    assert np.isfinite(np.float32(np.sum(np.square(gradient))))
    value, gradient = value_and_gradient(name, -x, 1.5)  # towards 0, where it has no slope
    np.testing.assert_allclose(value, 0, atol=1e-30)
    np.testing.assert_allclose(gradient, 0, atol=1e-30)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("x", [*FAR, -92.0, -1e4])
def test_a_soft_gate_is_shut_however_far_the_ratio_is(x, advantage):
    tau = 1.0 if advantage > 0 else 1.05
    value, gradient = value_and_gradient("sapo", x, advantage)
    gate = 1.0 if x > 0 else 1 / (1 + np.exp(tau))
    np.testing.assert_allclose(value, -2 * 4 / tau * gate * advantage, rtol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-30)


@pytest.mark.parametrize("x", [*FAR, -92.0, -1e4])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_weights_without_a_gradient_stay_within_their_bound(x, advantage):
    value, gradient = value_and_gradient("cispo", x, advantage)
    weight = min(np.exp(min(x, 80.0)), 1.3)
    np.testing.assert_allclose(value, -2 * weight * advantage * (x - 1), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(gradient, np.full((1, 2), -weight * advantage), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("x", [*FAR, -92.0, -1e4])
@pytest.mark.parametrize("name", ["k2", "k3", "k3+", "k3_weighted"])
def test_penalties_are_finite_and_their_gradient_points_to_the_reference(name, x):
    """x is how much likelier a token is under the policy than under the reference."""
    reference = jnp.full((1, 1), -1.0)

    def penalty(logprobs):
        return kl.ESTIMATORS[name](logprobs, reference, jax.lax.stop_gradient(logprobs))[0, 0]

    value, gradient = jax.device_get(jax.value_and_grad(penalty)(reference + x))
    assert np.isfinite(value) and value >= 0
    assert np.isfinite(np.float32(np.square(gradient[0, 0]))) and np.sign(gradient[0, 0]) == np.sign(x)


def test_metrics_of_ratios_are_finite():
    x = jnp.array([[92.0, -92.0], [1e4, -1e4]])
    metrics = policy_losses.ratio_metrics(x, 0 * x, jnp.ones(x.shape, bool), jnp.ones(x.shape, bool), ())
    np.testing.assert_allclose(metrics["val/ratio"].value, TOP / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["val/ratio_var"].value, TOP**2 / 4, rtol=1e-5)
