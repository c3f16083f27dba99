import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from rlhf_jax.core import policy_losses
from tests.support.padded_arrays import (
    ROWS,
    WIDTH,
    assert_padding_is_inert,
    normal,
    ppo_loss,
    prefix_mask,
    random_mask,
    row_lengths,
    seeds,
    with_values,
)

EPSILON = 0.2
policy_loss = jax.jit(functools.partial(ppo_loss, clip_ratio=EPSILON, axes=()))
value_loss = jax.jit(with_values(functools.partial(policy_losses.value_loss, clip_range=EPSILON, axes=())))
policy_grad = jax.jit(jax.grad(lambda *args: policy_loss(*args)[0]))
value_grad = jax.jit(jax.grad(lambda *args: value_loss(*args)[0]))


def policy_case(seed):
    old = -jnp.abs(normal(seed, ROWS, WIDTH))
    return old + 0.3 * normal(seed + 1, ROWS, WIDTH), old, normal(seed + 2, ROWS, WIDTH), random_mask(seed)


def value_case(seed):
    old = normal(seed, ROWS, WIDTH)
    return old + 0.3 * normal(seed + 1, ROWS, WIDTH), old, old + normal(seed + 2, ROWS, WIDTH), random_mask(seed)


@given(seeds)
def test_policy_loss_against_a_loop_over_tokens(seed):
    logprobs, old, advantages, mask = policy_case(seed)
    losses, grads, clipped, ratios = [], np.zeros((ROWS, WIDTH)), [], []
    for b, t in np.argwhere(np.asarray(mask)):
        ratio, advantage = np.exp(float(logprobs[b, t]) - float(old[b, t])), float(advantages[b, t])
        # Pessimistic: the clip binds only where leaving the interval would have paid.
        bound = ratio > 1 + EPSILON if advantage > 0 else ratio < 1 - EPSILON
        limit = 1 + EPSILON if advantage > 0 else 1 - EPSILON
        losses.append(-advantage * (limit if bound else ratio))
        grads[b, t] = 0 if bound else -advantage * ratio
        clipped.append(bound)
        ratios.append(ratio)
    loss, metrics = policy_loss(logprobs, old, advantages, mask)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(policy_grad(logprobs, old, advantages, mask), grads / len(losses), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], np.mean(clipped), atol=1e-6)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], np.mean(np.log(ratios) ** 2) / 2, rtol=1e-4)
    np.testing.assert_allclose(metrics["val/ratio"], np.mean(ratios), rtol=1e-5)
    np.testing.assert_allclose(metrics["val/ratio_var"], np.var(ratios), rtol=1e-3, atol=1e-6)


@given(seeds)
def test_before_the_first_update_the_loss_is_the_policy_gradient(seed):
    _, old, advantages, mask = policy_case(seed)
    loss, metrics = policy_loss(old, old, advantages, mask)
    expected = -np.where(mask, advantages, 0) / np.count_nonzero(mask)
    np.testing.assert_allclose(loss, np.sum(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy_grad(old, old, advantages, mask), expected, rtol=1e-5, atol=1e-6)
    assert metrics["val/ratio"] == 1
    for key in ("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio_var"):
        assert metrics[key] == 0


@given(seeds)
def test_value_loss_against_a_loop_over_tokens(seed):
    values, old, returns, mask = value_case(seed)
    losses, grads, clipped = [], np.zeros((ROWS, WIDTH)), []
    for b, t in np.argwhere(np.asarray(mask)):
        value, before, target = float(values[b, t]), float(old[b, t]), float(returns[b, t])
        near = min(max(value, before - EPSILON), before + EPSILON)
        bound = (near - target) ** 2 > (value - target) ** 2
        losses.append(0.5 * ((near if bound else value) - target) ** 2)
        grads[b, t] = 0 if bound else value - target
        clipped.append(bound)
    loss, metrics = value_loss(values, old, returns, mask)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value_grad(values, old, returns, mask), grads / len(losses), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["val/clipfrac_avg"], np.mean(clipped), atol=1e-6)


def test_value_loss_of_values_that_have_not_moved_is_half_the_mean_square():
    _, old, returns, mask = value_case(0)
    loss, metrics = value_loss(old, old, returns, mask)
    np.testing.assert_allclose(loss, 0.5 * np.mean(np.asarray(returns - old)[mask] ** 2), rtol=1e-5)
    assert metrics["val/clipfrac_avg"] == 0


@given(seeds)
def test_explained_variance(seed):
    values, returns, mask = normal(seed, ROWS, WIDTH), normal(seed + 1, ROWS, WIDTH), random_mask(seed)
    residual = np.asarray(returns - values)
    expected = 1 - np.var(residual[mask]) / np.var(np.asarray(returns)[mask])
    got = policy_losses.explained_variance(values, returns, mask, ())
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(policy_losses.explained_variance(returns + 3, returns, mask, ()), 1, atol=1e-5)
    np.testing.assert_allclose(policy_losses.explained_variance(0 * values + 3, returns, mask, ()), 0, atol=1e-5)
    assert policy_losses.explained_variance(values, 0 * returns + 3, mask, ()) < 0


@pytest.mark.parametrize(("loss", "case"), [(policy_loss, policy_case), (value_loss, value_case)])
@given(seed=seeds)
def test_permuting_the_rows_changes_nothing_but_the_order_of_the_gradient(loss, case, seed):
    first, *others = case(seed)
    order = np.random.default_rng(seed).permutation(ROWS)
    value, grad = jax.value_and_grad(lambda *args: loss(*args)[0])(first, *others)
    permuted, permuted_grad = jax.value_and_grad(lambda *args: loss(*args)[0])(
        first[order], *(other[order] for other in others)
    )
    np.testing.assert_allclose(permuted, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(permuted_grad, grad[order], rtol=1e-5, atol=1e-7)


MASKED = {
    "policy_loss": lambda *args: policy_loss(*args)[0],
    "value_loss": lambda *args: value_loss(*args)[0],
    **{key: lambda *args, key=key: policy_loss(*args)[1][key] for key in ("val/ratio", "policy/approxkl_avg")},
    "val/clipfrac_avg": lambda *args: value_loss(*args)[1]["val/clipfrac_avg"],
    "policy/clipfrac_avg": lambda *args: policy_loss(*args)[1]["policy/clipfrac_avg"],
    "explained_variance": lambda a, b, c, mask: policy_losses.explained_variance(a + b, c, mask, ()),
}


@pytest.mark.parametrize("function", MASKED.values(), ids=MASKED)
@given(seed=seeds, lengths=row_lengths)
def test_padding_is_inert(function, seed, lengths):
    lengths[:2] = [WIDTH, 3]
    logprobs, old, advantages, _ = policy_case(seed)
    assert_padding_is_inert(function, [logprobs, old, advantages], prefix_mask(lengths), seed)


def test_a_batch_of_empty_responses_gives_zeros():
    arrays, mask = [normal(seed, ROWS, WIDTH) for seed in range(3)], prefix_mask([0] * ROWS)
    for loss, grad in ((policy_loss, policy_grad), (value_loss, value_grad)):
        assert loss(*arrays, mask)[0] == 0
        np.testing.assert_array_equal(grad(*arrays, mask), 0)
    assert jnp.isfinite(policy_losses.explained_variance(arrays[0], arrays[1], mask, ()))
