"""Best-of-N where every pool can be listed: its estimators, its divergence and its win rate against their definitions.

Responses repeat within a pool, and some have the same score.
"""

import itertools

import numpy as np
import pytest

from rlhf_jax.core.selection import (
    best_of_n,
    best_of_n_kl,
    best_of_n_kl_estimate,
    best_of_n_win_rate,
    best_of_n_win_rate_bound,
    soft_best_of_n,
    soft_best_of_n_kl_bound,
)
from rlhf_jax.stages.rejection_sampling import KEEP, KeepAbove, KeepBest, KeepSoft
from tests.support import exact_world as exact
from tests.support.exact_world import world

POOL = 3
PROXY = exact.scores(40)
GOLD = PROXY + np.round(np.random.default_rng(1).normal(size=len(PROXY)), 1)


@pytest.fixture(scope="module")
def chances() -> np.ndarray:
    """The policy's, of each response."""
    return exact.chances(world(3).policy, world(3).responses)


def every_pool(chances: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pool of so many responses, int[K, size], and its probability."""
    pools = np.array(list(itertools.product(range(len(chances)), repeat=size)))
    return pools, np.prod(chances[pools], axis=1)


def of_best(chances: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """The probability of each response to be the best of n; those with one score share it as the policy has them."""
    below = (scores[None, :] < scores[:, None]) @ chances
    level = (scores[None, :] == scores[:, None]) @ chances
    return chances / level * ((below + level) ** n - below**n)


def of_soft(chances: np.ndarray, n: int, temperature: float) -> np.ndarray:
    """The probability of each response to be chosen of n in proportion to exp(score / temperature)."""
    drawn, weights = every_pool(chances, n)
    soft = np.exp(PROXY[drawn] / temperature)
    chosen = np.zeros(len(chances))
    np.add.at(chosen, drawn, weights[:, None] * soft / soft.sum(axis=1, keepdims=True))
    return chosen


def divergence(chosen: np.ndarray, chances: np.ndarray) -> float:
    return float(np.sum(chosen * np.log(np.where(chosen > 0, chosen, 1) / chances)))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_estimate_is_its_definitions_mean_over_pools(chances, n):
    pools, weights = every_pool(chances, POOL)
    chosen = of_best(chances, PROXY, n)
    np.testing.assert_allclose(chosen.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(weights @ best_of_n(PROXY[pools], GOLD[pools], n), chosen @ GOLD, rtol=1e-9)
    if n < POOL:  # or there is no other response
        wins = 0.5 * (1 + np.sign(GOLD[:, None] - GOLD[None, :]))
        found = weights @ best_of_n_win_rate(PROXY[pools], GOLD[pools], n)
        np.testing.assert_allclose(found, chosen @ wins @ chances, rtol=1e-9)
        against_itself = weights @ best_of_n_win_rate(PROXY[pools], PROXY[pools], n)
        assert against_itself <= best_of_n_win_rate_bound(n) + 1e-12
    estimate = weights @ best_of_n(PROXY[pools], best_of_n_kl_estimate(np.log(chances[pools]), n), n)
    assert divergence(chosen, chances) - 1e-9 <= estimate <= best_of_n_kl(n) + 1e-9


def test_the_best_kept_of_all_samples_is_the_best_of_n(chances):
    pools, weights = every_pool(chances, POOL)
    kept = KEEP[KeepBest](KeepBest(1), PROXY[pools], np.random.default_rng(0))
    found = np.zeros(len(chances))
    np.add.at(found, pools[kept], np.broadcast_to(weights[:, None], pools.shape)[kept])
    np.testing.assert_allclose(found, of_best(chances, PROXY, POOL), atol=1e-12)


def test_what_is_kept_above_a_threshold_is_the_policy_given_that_it_is_above(chances):
    pools, weights = every_pool(chances, 2)
    kept = KEEP[KeepAbove](KeepAbove(0.2), PROXY[pools], np.random.default_rng(0))
    found = np.zeros(len(chances))
    np.add.at(found, pools[kept], np.broadcast_to(weights[:, None], pools.shape)[kept])
    above = np.where(PROXY > 0.2, chances, 0)
    np.testing.assert_allclose(found / found.sum(), above / above.sum(), atol=1e-12)


class Fixed(np.random.Generator):
    """Gives one number in the place of random ones."""

    number = 0.0

    def random(self, size):  # type: ignore[override]
        return np.full(size, self.number)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_soft_best_of_n_is_its_definitions_mean_over_pools(chances, temperature):
    n, chosen = 2, of_soft(chances, 2, temperature)
    pools, weights = every_pool(chances, POOL)
    groups = np.array(list(itertools.combinations(range(POOL), n)))[:, None, None, :]
    groups = np.broadcast_to(groups, (len(groups), len(pools), 1, n))
    found = weights @ soft_best_of_n(PROXY[pools], GOLD[pools], groups, temperature=temperature)
    np.testing.assert_allclose(found, chosen @ GOLD, rtol=1e-9)
    bound = weights @ soft_best_of_n_kl_bound(PROXY[pools], groups, temperature=temperature)
    assert 0 < divergence(chosen, chances) < min(bound, best_of_n_kl(n))
    # Rejection sampling keeps the same: over all uniform numbers, to a 500th of them.
    pools, weights = every_pool(chances, n)
    kept, rng = np.zeros(len(chances)), Fixed(np.random.PCG64(0))
    for rng.number in (np.arange(500) + 0.5) / 500:
        mask = KEEP[KeepSoft](KeepSoft(temperature), PROXY[pools], rng)
        np.add.at(kept, pools[mask], weights / 500)
    np.testing.assert_allclose(kept, chosen, atol=1e-3)


@pytest.mark.parametrize("n", [2, 4, 64])
def test_the_divergence_reaches_its_bound_as_responses_stop_repeating_and_ties_keep_it_below(n):
    """The gap to log n - (n - 1) / n falls about as 1 / M^2 for M equally likely responses."""
    gaps = []
    for length in (4, 5, 6):  # four tokens, none of which ends a response
        count = 4**length
        chances, scores = np.full(count, 1 / count), np.arange(count)
        chosen = of_best(chances, scores, n)
        gaps.append(best_of_n_kl(n) - divergence(chosen, chances))
        tied = of_best(chances, scores // 64, n)
        assert divergence(tied, chances) < divergence(chosen, chances) < best_of_n_kl(n)
    assert 13 < gaps[0] / gaps[1] < 17 and 13 < gaps[1] / gaps[2] < 17
