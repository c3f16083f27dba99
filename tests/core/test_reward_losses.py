import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import reward_losses
from tests.support.padded_arrays import normal, seeds, with_values

PAIRS = 6
bradley_terry_loss = jax.jit(with_values(functools.partial(reward_losses.bradley_terry_loss, axes=())))
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


# ---- margins, flipped labels, several raters -------------------------------------------------------------------------


def log_sigmoid(x):
    return -np.logaddexp(0, -np.asarray(x, np.float64))


PAIR_LOSSES = {
    "margin": (
        lambda c, r, x: reward_losses.margin_loss(c, r, x[:, 0], axes=()),
        lambda c, r, x: -np.mean(log_sigmoid(c - r - x[:, 0])),
    ),
    "smoothed": (
        lambda c, r, x: reward_losses.smoothed_bradley_terry_loss(c, r, label_smoothing=0.2, axes=()),
        lambda c, r, x: -np.mean(0.8 * log_sigmoid(c - r) + 0.2 * log_sigmoid(r - c)),
    ),
    "classification": (
        lambda c, r, x: reward_losses.classification_loss(c, r, axes=()),
        lambda c, r, x: -np.mean(log_sigmoid(np.concatenate([c, -r]))),
    ),
    # As many rows as there are labels, each with an order of its own.
    "raters": (
        lambda c, r, x: reward_losses.raters_loss(c, r, x, axes=()),
        lambda c, r, x: (
            -np.mean(np.concatenate([np.repeat(log_sigmoid(c - r), x[:, 0]), np.repeat(log_sigmoid(r - c), x[:, 1])]))
        ),
    ),
}


@functools.cache
def with_gradients(name):
    return jax.jit(jax.value_and_grad(with_values(PAIR_LOSSES[name][0]), argnums=(0, 1), has_aux=True))


def numeric_gradient(function, x):
    """Central differences in float64."""
    grad = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[place] = 1e-5
        grad[place] = (function(x + step) - function(x - step)) / 2e-5
    return grad


@pytest.mark.parametrize("name", PAIR_LOSSES)
@given(seeds)
def test_losses_of_pairs_are_their_formulas(name, seed):
    votes = np.random.default_rng(seed).integers(0, 4, (PAIRS, 2))
    votes[0] = 2, 1
    chosen, rejected = 2 * normal(seed, PAIRS), 2 * normal(seed + 1, PAIRS)
    (loss, metrics), grads = with_gradients(name)(chosen, rejected, jnp.asarray(votes, jnp.float32))
    wide = [np.asarray(x, np.float64) for x in (chosen, rejected)]
    slow = PAIR_LOSSES[name][1]
    np.testing.assert_allclose(loss, slow(wide[0], wide[1], votes), rtol=1e-5)
    expected = (
        numeric_gradient(lambda x: slow(x, wide[1], votes), wide[0]),
        numeric_gradient(lambda x: slow(wide[0], x, votes), wide[1]),
    )
    for got, slope in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-6)
    if name == "raters":
        right = np.where(wide[0] > wide[1], votes[:, 0], votes[:, 1])
        np.testing.assert_allclose(metrics["accuracy"], right.sum() / votes.sum(), rtol=1e-5)


def test_a_smoothed_loss_is_least_where_the_model_believes_in_the_share_of_flipped_labels():
    margins = jnp.linspace(-4, 4, 1001)
    losses = jax.vmap(
        lambda m: reward_losses.smoothed_bradley_terry_loss(m[None], jnp.zeros(1), label_smoothing=0.1, axes=())[0]
    )(margins)
    np.testing.assert_allclose(scipy.special.expit(margins[jnp.argmin(losses)]), 0.9, atol=1e-3)


def test_centering_is_blind_to_margins_and_least_where_the_mean_score_is_0():
    chosen, rejected = normal(0, PAIRS), normal(1, PAIRS)

    def penalty(chosen, rejected):
        return reward_losses.centering(chosen, rejected, axes=()).value

    expected = np.mean((np.asarray(chosen, np.float64) + rejected) ** 2)
    np.testing.assert_allclose(penalty(chosen, rejected), expected, rtol=1e-5)
    np.testing.assert_allclose(penalty(chosen + 3, rejected - 3), expected, rtol=1e-4)
    mean = (chosen + rejected) / 2
    np.testing.assert_allclose(penalty(chosen - mean, rejected - mean), 0, atol=1e-12)


# ---- more than two responses -----------------------------------------------------------------------------------------

K = 4


def comparisons(seed):
    """Preferences among K responses, in rows with none to all of these responses."""
    rng = np.random.default_rng(seed)
    present = np.arange(K)[None] < rng.integers(2, K + 1, PAIRS)[:, None]
    present[1] = False
    ranks = rng.integers(0, 3, (PAIRS, K))  # with ties
    ranks[0] = np.arange(K)
    return (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]


def slow_k_wise(scores, wins, label_smoothing):
    rows = []
    for row, better in zip(scores, wins, strict=True):
        pairs = [
            (1 - label_smoothing) * log_sigmoid(row[i] - row[j]) + label_smoothing * log_sigmoid(row[j] - row[i])
            for i, j in np.argwhere(better)
        ]
        if pairs:
            rows.append(-np.mean(pairs))
    return np.mean(rows)


@functools.cache
def k_wise_gradients(label_smoothing):
    loss = functools.partial(reward_losses.k_wise_loss, label_smoothing=label_smoothing, axes=())
    return jax.jit(jax.value_and_grad(with_values(loss), has_aux=True))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@given(seeds)
def test_k_wise_comparisons_are_means_over_each_prompts_pairs(label_smoothing, seed):
    scores, wins = 2 * normal(seed, PAIRS, K), comparisons(seed)
    (loss, metrics), grad = k_wise_gradients(label_smoothing)(scores, jnp.asarray(wins))
    wide = np.asarray(scores, np.float64)
    np.testing.assert_allclose(loss, slow_k_wise(wide, wins, label_smoothing), rtol=1e-5)
    expected = numeric_gradient(lambda x: slow_k_wise(x, wins, label_smoothing), wide)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
    some = wins.any(axis=(1, 2))
    right = [
        np.mean([row[i] > row[j] for i, j in np.argwhere(b)]) for row, b in zip(wide[some], wins[some], strict=True)
    ]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-5)
    in_pairs = wide[wins.any(axis=1) | wins.any(axis=2)]
    np.testing.assert_allclose(metrics["min_reward"], in_pairs.min(), rtol=1e-5)
    np.testing.assert_allclose(metrics["max_reward"], in_pairs.max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_reward"], in_pairs.mean(), rtol=1e-4, atol=1e-6)


centering_gradient = jax.jit(
    jax.value_and_grad(lambda scores, wins: reward_losses.k_wise_centering(scores, wins, axes=()).value)
)


def test_two_responses_are_a_pair_and_what_is_missing_is_not_read():
    scores = 2 * normal(3, PAIRS, 3)
    wins = np.zeros((PAIRS, 3, 3), bool)
    wins[:, 0, 1] = True
    pairs, metrics = bradley_terry_loss(scores[:, 0], scores[:, 1])
    for missing in (0.0, 1e6, np.nan, np.inf):
        given = scores.at[:, 2].set(missing)
        (loss, found), grad = k_wise_gradients(0.0)(given, jnp.asarray(wins))
        np.testing.assert_allclose(loss, pairs, rtol=1e-6)
        np.testing.assert_allclose(grad[:, 2], 0)
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        ranking, _ = reward_losses.plackett_luce_loss(given, jnp.array([[True, True, False]] * PAIRS), axes=())
        np.testing.assert_allclose(ranking, pairs, rtol=1e-5)
        penalty, grad = centering_gradient(given, jnp.asarray(wins))
        np.testing.assert_array_equal(grad[:, 2], 0)
        np.testing.assert_allclose(
            penalty, reward_losses.centering(scores[:, 0], scores[:, 1], axes=()).value, rtol=1e-5
        )


def slow_ranking(scores, counts):
    each = []
    for row, count in zip(scores, counts, strict=True):
        if count > 1:
            each.append(-sum(row[k] - scipy.special.logsumexp(row[k:count]) for k in range(count)))
    return np.mean(each)


@given(seeds)
def test_rankings_have_the_likelihood_of_choosing_the_best_of_what_is_left(seed):
    scores, counts = 2 * normal(seed, PAIRS, K), np.random.default_rng(seed).integers(0, K + 1, PAIRS)
    counts[0] = K
    mask = jnp.arange(K)[None] < jnp.asarray(counts)[:, None]
    (loss, _), grad = ranking_gradients(jnp.where(mask, scores, jnp.nan), mask)
    wide = np.asarray(scores, np.float64)
    np.testing.assert_allclose(loss, slow_ranking(wide, counts), rtol=1e-5)
    expected = numeric_gradient(lambda x: slow_ranking(x, counts), wide)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


ranking_gradients = jax.jit(
    jax.value_and_grad(functools.partial(reward_losses.plackett_luce_loss, axes=()), has_aux=True)
)
