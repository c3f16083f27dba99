import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import advantages
from tests.support.padded_arrays import ROWS, WIDTH, assert_padding_is_inert, normal, prefix_mask, row_lengths, seeds

discounts = st.sampled_from([0.0, 0.9, 1.0])
gae = jax.jit(advantages.gae, static_argnames=("gamma", "gae_lambda"))


def slow_gae(rewards, values, lengths, gamma, gae_lambda):
    """The definition, a sum of discounted temporal differences from each token to the end of its response."""
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    result = np.zeros_like(rewards)
    for row, length in enumerate(lengths):
        for start in range(length):
            for t in range(start, length):
                next_value = values[row, t + 1] if t + 1 < length else 0.0
                delta = rewards[row, t] + gamma * next_value - values[row, t]
                result[row, start] += (gamma * gae_lambda) ** (t - start) * delta
    return result


@given(seeds, row_lengths, discounts, discounts)
def test_gae_is_what_a_slow_loop_over_the_definition_gives(seed, lengths, gamma, gae_lambda):
    rewards, values, mask = normal(seed, ROWS, WIDTH), normal(seed + 1, ROWS, WIDTH), prefix_mask(lengths)
    got, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    expected = slow_gae(rewards, values, lengths, gamma, gae_lambda)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + np.asarray(values), 0), rtol=1e-4, atol=1e-5)


def test_gradients_of_gae_are_those_of_the_slow_loop():
    lengths, gamma, gae_lambda = [0, 1, 4, 6, 3], 0.9, 0.8
    rewards, values, mask = normal(0, ROWS, WIDTH), normal(1, ROWS, WIDTH), prefix_mask(lengths)
    got = jax.jacobian(lambda *x: gae(*x, mask, gamma=gamma, gae_lambda=gae_lambda)[0], argnums=(0, 1))(rewards, values)

    # Advantages are linear in rewards and in values: the derivative is the advantage of a unit vector.
    expected = np.zeros((2, ROWS, WIDTH, ROWS, WIDTH))
    for row, t in np.ndindex(ROWS, WIDTH):
        unit, zeros = np.zeros((ROWS, WIDTH)), np.zeros((ROWS, WIDTH))
        unit[row, t] = 1
        expected[0, :, :, row, t] = slow_gae(unit, zeros, lengths, gamma, gae_lambda)
        expected[1, :, :, row, t] = slow_gae(zeros, unit, lengths, gamma, gae_lambda)
    np.testing.assert_allclose(jnp.stack(got), expected, atol=1e-6)


@given(seeds, row_lengths, discounts)
def test_lambda_1_gives_discounted_returns_minus_values(seed, lengths, gamma):
    rewards, values, mask = normal(seed, ROWS, WIDTH), normal(seed + 1, ROWS, WIDTH), prefix_mask(lengths)
    got, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    discounted = np.zeros((ROWS, WIDTH + 1))
    for t in reversed(range(WIDTH)):
        discounted[:, t] = np.where(mask[:, t], rewards[:, t] + gamma * discounted[:, t + 1], 0)
    np.testing.assert_allclose(returns, discounted[:, :-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got, np.where(mask, discounted[:, :-1] - values, 0), rtol=1e-4, atol=1e-5)


@given(seeds, row_lengths, discounts)
def test_lambda_0_gives_temporal_differences(seed, lengths, gamma):
    rewards, values, mask = normal(seed, ROWS, WIDTH), normal(seed + 1, ROWS, WIDTH), prefix_mask(lengths)
    got, _ = gae(rewards, values, mask, gamma=gamma, gae_lambda=0.0)
    values = np.pad(np.where(mask, values, 0), ((0, 0), (0, 1)))
    expected = np.where(mask, rewards + gamma * values[:, 1:] - values[:, :-1], 0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@given(seeds, row_lengths)
def test_rows_do_not_see_each_other(seed, lengths):
    rewards, values, mask = normal(seed, ROWS, WIDTH), normal(seed + 1, ROWS, WIDTH), prefix_mask(lengths)
    order = np.random.default_rng(seed).permutation(ROWS)
    compute = functools.partial(gae, gamma=0.9, gae_lambda=0.8)
    permuted, whole = compute(rewards[order], values[order], mask[order]), compute(rewards, values, mask)
    for got, expected in zip(permuted, whole, strict=True):
        np.testing.assert_array_equal(got, expected[order])


@given(seeds, row_lengths, st.floats(0, 2))
def test_rewards_are_the_penalty_and_the_score_on_the_last_token(seed, lengths, kl_coef):
    scores, divergence, mask = normal(seed, ROWS), normal(seed + 1, ROWS, WIDTH), prefix_mask(lengths)
    rewards = np.asarray(advantages.token_rewards(scores, divergence, mask, kl_coef=kl_coef))
    expected = -kl_coef * np.asarray(divergence, np.float64)
    for row, length in enumerate(lengths):
        expected[row, length:] = 0
        if length:
            expected[row, length - 1] += scores[row]
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)


MASKED = {
    "advantages": lambda rewards, values, mask: advantages.gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)[0],
    "returns": lambda rewards, values, mask: advantages.gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)[1],
    "token_rewards": lambda kl, _, mask: advantages.token_rewards(normal(0, ROWS), kl, mask, kl_coef=0.5),
}


@pytest.mark.parametrize("function", MASKED.values(), ids=MASKED)
@given(seed=seeds, lengths=row_lengths)
def test_padding_is_inert(function, seed, lengths):
    arrays = [normal(seed, ROWS, WIDTH), normal(seed + 1, ROWS, WIDTH)]
    assert_padding_is_inert(function, arrays, prefix_mask(lengths), seed)
