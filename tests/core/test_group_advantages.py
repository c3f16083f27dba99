"""Advantages without a value function, and what is done to scores and rewards before them, against the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import advantages, kl
from tests.support.padded_arrays import WIDTH, assert_padding_is_inert, normal, prefix_mask, seeds

GROUP, ROWS = 3, 6
lengths_of_rows = st.lists(st.integers(1, WIDTH), min_size=ROWS, max_size=ROWS)


def gamma_of(name, gamma=1.0):
    return {"gamma": gamma} if advantages.CRITIC_FREE[name].discounted else {}


COMPUTE = {
    name: jax.jit(functools.partial(function, num_generations=GROUP, axes=(), **gamma_of(name)))
    for name, (function, *_) in advantages.CRITIC_FREE.items()
}


def slow(name, rewards, lengths, gamma=1.0):
    """From the papers, one response at a time."""
    rewards = np.asarray(rewards, np.float64)
    result = np.zeros_like(rewards)
    total = [rewards[row, :length].sum() for row, length in enumerate(lengths)]
    if name == "reinforce_plus_plus":
        to_go = [
            [sum(gamma ** (i - t) * rewards[row, i] for i in range(t, length)) for t in range(length)]
            for row, length in enumerate(lengths)
        ]
        every = np.concatenate(to_go)
        for row, length in enumerate(lengths):
            result[row, :length] = (to_go[row] - every.mean()) / every.std()
        return result
    means = np.repeat(np.reshape(total, (-1, GROUP)).mean(axis=1), GROUP)
    others = (GROUP * means - total) / (GROUP - 1)
    tokens = np.repeat(total - means, lengths)
    for row, length in enumerate(lengths):
        first = row // GROUP * GROUP
        group = total[first : first + GROUP]
        result[row, :length] = {
            "rloo": total[row] - others[row],
            "rloo_normalized": (total[row] - others[row]) / (np.std(total - others, ddof=1) + 1e-4),
            "grpo_batch_std": (total[row] - np.mean(group)) / (np.std(total, ddof=1) + 1e-4),
            "reinforce_plus_plus_baseline": (total[row] - means[row] - tokens.mean()) / np.sqrt(tokens.var() + 1e-8),
            "dr_grpo": total[row] - np.mean(group),
            "grpo": (total[row] - np.mean(group)) / (np.std(group, ddof=1) + 1e-4),
        }[name]
    return result


@pytest.mark.parametrize("name", COMPUTE)
@given(seed=seeds, lengths=lengths_of_rows)
def test_advantages_are_the_papers_formulas(name, seed, lengths):
    rewards, mask = normal(seed, ROWS, WIDTH), prefix_mask(lengths)
    got = COMPUTE[name](rewards, mask)
    np.testing.assert_allclose(got, slow(name, rewards, lengths), rtol=1e-5, atol=1e-5)
    # A constant added to all scores, and what is in the padding, change nothing; the sums have fewer digits for it.
    shifted = COMPUTE[name](jnp.where(mask, rewards, np.nan) + _on_last(5.0, mask), mask)
    np.testing.assert_allclose(shifted, got, rtol=1e-5, atol=5e-5)


@given(seed=seeds, lengths=lengths_of_rows)
def test_a_discount_is_of_rewards_to_come(seed, lengths):
    rewards, mask = normal(seed, ROWS, WIDTH), prefix_mask(lengths)
    got = advantages.reinforce_plus_plus(rewards, mask, num_generations=1, axes=(), gamma=0.8)
    expected = slow("reinforce_plus_plus", rewards, lengths, gamma=0.8)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    if max(lengths) > 2:
        assert np.abs(got - COMPUTE["reinforce_plus_plus"](rewards, mask)).max() > 1e-3


def test_groups_whose_scores_hardly_differ_are_not_blown_up_by_the_batchs_deviation():
    """Scores of one group a thousandth of the other's apart: its own deviation hides it, the batch's does not."""
    scores, mask = jnp.array([0.0, 0.001, 0.002, 0.0, 1.0, 2.0]), prefix_mask([WIDTH] * ROWS)
    rewards = advantages.token_rewards(scores, jnp.zeros(mask.shape), mask, kl_coef=0.0)
    size = {name: np.abs(compute(rewards, mask)).reshape(2, -1).max(axis=1) for name, compute in COMPUTE.items()}
    assert size["grpo"][0] > 0.9 * size["grpo"][1]
    for name in ("grpo_batch_std", "reinforce_plus_plus_baseline", "rloo_normalized"):
        assert size[name][0] < 0.01 * size[name][1]


def _on_last(score, mask):
    return advantages.token_rewards(
        jnp.full(mask.shape[0], score, jnp.float32), jnp.zeros(mask.shape), mask, kl_coef=0.0
    )


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo"])
@given(seed=seeds)
def test_groups_do_not_see_each_other_and_sum_to_nothing(name, seed):
    rewards, mask = normal(seed, ROWS, WIDTH), prefix_mask([WIDTH] * ROWS)
    got = np.asarray(COMPUTE[name](rewards, mask))
    np.testing.assert_allclose(got[:GROUP].sum(axis=0), 0, atol=1e-4)
    other = COMPUTE[name](rewards.at[GROUP:].multiply(7), mask)
    np.testing.assert_array_equal(other[:GROUP], got[:GROUP])


def test_a_group_of_equals_teaches_nothing_and_is_finite():
    rewards, mask = jnp.full((ROWS, WIDTH), 0.3), prefix_mask([WIDTH] * ROWS)
    for name, compute in COMPUTE.items():
        if name != "reinforce_plus_plus":
            # A deviation of 0 divides the rounding of the sums by the little that is added to it.
            np.testing.assert_allclose(compute(rewards, mask), 0, atol=1e-5 if name in ("rloo", "dr_grpo") else 1e-2)
    scores = jnp.array([0.3, 0.3, 0.3, 0.0, 1.0, 0.0])
    assert advantages.informative_groups(scores, num_generations=GROUP).tolist() == [False, True]


@pytest.mark.parametrize("rows, group", [(6, 4), (6, 1)])
def test_groups_that_are_none_are_refused(rows, group):
    with pytest.raises(ValueError, match=f"6 responses cannot be split into groups of {group}"):
        advantages.rloo(jnp.zeros((rows, 2)), jnp.ones((rows, 2), bool), num_generations=group, axes=())


def test_overlong_responses_lose_up_to_one():
    """Eq. 13 of DAPO with L_max = 10 and L_cache = 4, at every length."""
    got = advantages.overlong_penalty(jnp.arange(11, dtype=jnp.int32), max_tokens=10, buffer=4)
    np.testing.assert_allclose(got, [0] * 7 + [-0.25, -0.5, -0.75, -1.0], rtol=1e-6)


def test_clipped_scores():
    scores = jnp.array([-3.0, 0.5, 9.0])
    np.testing.assert_array_equal(advantages.clip_scores(scores, clip=None), scores)
    np.testing.assert_array_equal(advantages.clip_scores(scores, clip=2.0), [-2.0, 0.5, 2.0])


@given(seed=seeds, lengths=lengths_of_rows)
def test_whitened_rewards_keep_their_mean(seed, lengths):
    mask, rewards = prefix_mask(lengths), 3 * normal(seed, ROWS, WIDTH) + 2
    got = np.asarray(advantages.whiten_rewards(rewards, mask, ()))
    tokens = np.asarray(rewards, np.float64)[np.asarray(mask)]
    expected = (tokens - tokens.mean()) / tokens.std() + tokens.mean()
    np.testing.assert_allclose(got[np.asarray(mask)], expected, rtol=1e-3, atol=1e-3)
    assert not got[~np.asarray(mask)].any()


MASKED = {
    "whiten_rewards": lambda x, mask: advantages.whiten_rewards(x, mask, ()),
    **{
        name: lambda x, mask, name=name, function=function: function(
            x, mask, num_generations=5, axes=(), **gamma_of(name)
        )
        for name, (function, *_) in advantages.CRITIC_FREE.items()
    },
}


@pytest.mark.parametrize("function", MASKED.values(), ids=MASKED)
@given(seed=seeds)
def test_padding_is_inert(function, seed):
    lengths = np.random.default_rng(seed).integers(1, WIDTH + 1, 5).tolist()
    assert_padding_is_inert(function, [normal(seed, 5, WIDTH)], prefix_mask(lengths), seed)


@given(st.floats(0.01, 2), st.floats(0, 40))
def test_the_controller_is_zieglers(kl_coef, divergence):
    got = kl.adaptive_kl_coef(jnp.float32(kl_coef), jnp.float32(divergence), target=6.0, horizon=10_000.0, episodes=512)
    error = min(max((divergence - 6.0) / 6.0, -0.2), 0.2)
    np.testing.assert_allclose(got, kl_coef * (1 + error * 512 / 10_000), rtol=1e-5)
