import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core.preference_losses import Pairs
from rlhf_jax.stages.preference_loss import PreferenceLossConfig, preference_loss
from tests.core.cases import normal, seeds

PAIRS, BETA = 6, 0.3
TOKENS = jnp.ones(PAIRS, jnp.int32)


def of_sigmoid(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected, TOKENS, TOKENS)
    return preference_loss(PreferenceLossConfig(), pairs, beta=beta, axes=())


dpo_loss = jax.jit(functools.partial(of_sigmoid, beta=BETA))
gradients = jax.jit(jax.grad(lambda *args: dpo_loss(*args)[0], argnums=(0, 1, 2, 3)))


def case(seed):
    """Log-probabilities of the chosen and the rejected responses under the policy, then under the reference."""
    return [-20 + 5 * normal(seed + i, PAIRS) for i in range(4)]


def margins(chosen, rejected, ref_chosen, ref_rejected):
    return BETA * ((np.asarray(chosen, np.float64) - ref_chosen) - (np.asarray(rejected, np.float64) - ref_rejected))


@given(seeds)
def test_loss_and_gradients_are_those_of_logistic_regression_on_the_margins(seed):
    args = case(seed)
    loss, _ = dpo_loss(*args)
    np.testing.assert_allclose(loss, np.mean(np.logaddexp(0, -margins(*args))), rtol=1e-5)
    slope = BETA * scipy.special.expit(-margins(*args)) / PAIRS  # eq. 7's gradient: the weight of how wrong we are
    for got, sign in zip(gradients(*args), (-1, 1, 1, -1), strict=True):
        np.testing.assert_allclose(got, sign * slope, rtol=1e-4, atol=1e-7)


@given(seeds, st.floats(0.01, 5))
def test_loss_is_log_2_where_the_policy_is_the_reference_whatever_beta(seed, beta):
    chosen, rejected, *_ = case(seed)
    loss, metrics = of_sigmoid(chosen, rejected, chosen, rejected, beta=beta)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0


def test_beta_may_be_an_array_so_that_several_train_at_once():
    args, betas = case(0), jnp.asarray([0.05, 0.3, 1.0])
    losses = jax.vmap(lambda beta: of_sigmoid(*args, beta=beta)[0])(betas)
    alone = [of_sigmoid(*args, beta=float(beta))[0] for beta in betas]
    np.testing.assert_allclose(losses, alone, rtol=1e-6)


@given(seeds)
def test_swapping_the_responses_adds_the_mean_margin(seed):
    chosen, rejected, ref_chosen, ref_rejected = case(seed)
    loss, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    swapped, _ = dpo_loss(rejected, chosen, ref_rejected, ref_chosen)
    mean_margin = np.mean(margins(chosen, rejected, ref_chosen, ref_rejected))
    np.testing.assert_allclose(swapped - loss, mean_margin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_neither_overflow_nor_lose_the_gradient(margin):
    zeros = jnp.zeros(PAIRS)
    args = (jnp.full(PAIRS, margin), zeros, zeros, zeros)
    np.testing.assert_allclose(dpo_loss(*args)[0], max(0.0, -BETA * margin), rtol=1e-6)
    np.testing.assert_allclose(gradients(*args)[0], 0 if margin > 0 else -BETA / PAIRS, rtol=1e-6)


@given(seeds)
def test_metrics(seed):
    args = case(seed)
    chosen, rejected, ref_chosen, ref_rejected = map(np.asarray, args)
    _, metrics = dpo_loss(*args)
    expected = {
        "rewards/chosen": np.mean(BETA * (chosen - ref_chosen)),
        "rewards/rejected": np.mean(BETA * (rejected - ref_rejected)),
        "rewards/margins": np.mean(margins(*args)),
        "rewards/accuracies": np.mean(margins(*args) > 0),
        "logps/chosen": np.mean(chosen),
        "logps/rejected": np.mean(rejected),
    }
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_tie_is_half_right():
    zeros = jnp.zeros(4)
    _, metrics = dpo_loss(jnp.asarray([1.0, 0.0, -1.0, 0.0]), zeros, zeros, zeros)
    assert metrics["rewards/accuracies"] == 0.5
    _, metrics = dpo_loss(jnp.asarray([1.0, 0.0, 1.0, 0.0]), zeros, zeros, zeros)
    assert metrics["rewards/accuracies"] == 0.75


@given(seeds)
def test_permuting_the_pairs_permutes_the_gradients(seed):
    args = case(seed)
    order = np.random.default_rng(seed).permutation(PAIRS)
    permuted = [x[order] for x in args]
    np.testing.assert_allclose(dpo_loss(*permuted)[0], dpo_loss(*args)[0], rtol=1e-5)
    for got, whole in zip(gradients(*permuted), gradients(*args), strict=True):
        np.testing.assert_allclose(got, whole[order], rtol=1e-6)
