import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.integrate
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core.selection import (
    best_of_n,
    best_of_n_distribution,
    best_of_n_kl,
    best_of_n_kl_estimate,
    best_of_n_win_rate,
    best_of_n_win_rate_bound,
    fit_over_optimisation,
    order_statistic_weights,
    random_groups,
    soft_best_of_n,
    soft_best_of_n_kl_bound,
    soft_choice,
)
from rlhf_jax.core.statistics import bootstrap_interval
from tests.support.padded_arrays import seeds


@pytest.mark.parametrize(("pool", "n"), [(pool, n) for pool in range(1, 8) for n in range(1, pool + 1)])
def test_weights_count_the_subsets_that_each_rank_is_the_best_of(pool, n):
    best = [max(subset) for subset in itertools.combinations(range(pool), n)]
    np.testing.assert_allclose(order_statistic_weights(pool, n), np.bincount(best, minlength=pool) / len(best))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 100, 128, 255, 256])
def test_weights_of_a_pool_of_256_are_the_exact_fractions(n):
    exact = [float(Fraction(math.comb(i - 1, n - 1), math.comb(256, n))) for i in range(1, 257)]
    weights = order_statistic_weights(256, n)
    np.testing.assert_allclose(weights, exact, rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-12)


@pytest.mark.parametrize("n", [0, -1, 5])
def test_more_than_the_pool_or_less_than_one_cannot_be_drawn(n):
    with pytest.raises(ValueError, match=f"best of n={n} from a pool of 4"):
        order_statistic_weights(4, n)


@given(seeds, st.integers(1, 6))
def test_best_of_n_is_the_mean_over_every_subset_of_what_the_proxy_prefers(seed, n):
    rng = np.random.default_rng(seed)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    expected = [
        np.mean([g[max(subset, key=lambda i: p[i])] for subset in itertools.combinations(range(6), n)])
        for p, g in zip(proxy, gold, strict=True)
    ]
    np.testing.assert_allclose(best_of_n(proxy, gold, n), expected)


def test_best_of_one_is_the_mean_and_best_of_all_the_favourite_of_the_proxy():
    proxy, gold = np.asarray([[1.0, 5.0, 3.0]]), np.asarray([[7.0, -2.0, 4.0]])
    np.testing.assert_allclose(best_of_n(proxy, gold, 1), 3.0)
    np.testing.assert_allclose(best_of_n(proxy, gold, 3), -2.0)


def test_among_ties_the_later_one_is_preferred():
    np.testing.assert_array_equal(best_of_n([[0.0, 2.0, 2.0, 1.0]], [[1.0, 2.0, 3.0, 4.0]], 4), 3.0)


@given(seeds)
def test_order_of_the_pool_does_not_matter_nor_a_rising_function_of_the_proxy(seed):
    rng = np.random.default_rng(seed)
    proxy, gold, order = rng.normal(size=(2, 9)), rng.normal(size=(2, 9)), rng.permutation(9)
    expected = best_of_n(proxy, gold, 4)
    np.testing.assert_allclose(best_of_n(proxy[:, order], gold[:, order], 4), expected)
    np.testing.assert_allclose(best_of_n(np.exp(proxy), gold, 4), expected)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 256])
def test_kl_is_that_of_the_best_of_n_of_a_continuous_score(n):
    # The best of n uniform numbers has density n x^(n-1) against 1.
    def integrand(x):
        density = n * x ** (n - 1)
        return density * math.log(density) if density > 0 else 0.0

    divergence, _ = scipy.integrate.quad(integrand, 0, 1, limit=200)
    np.testing.assert_allclose(best_of_n_kl(n), divergence, atol=1e-7)


def test_kl_of_several_n_at_once():
    np.testing.assert_allclose(best_of_n_kl([1, 2, 16]), [0, math.log(2) - 1 / 2, math.log(16) - 15 / 16])


def choices(chances, n: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every sequence of n independent samples of a small distribution, with its probability."""
    outcomes = itertools.product(range(len(chances)), repeat=n)
    return [(math.prod(chances[i] for i in drawn), drawn) for drawn in outcomes]


def divergence(chosen, chances) -> float:
    return sum(q * math.log(q / p) for q, p in zip(chosen, chances, strict=True) if q > 0)


DISTRIBUTIONS = [  # later responses have higher scores
    [1.0],
    [0.5, 0.5],
    [0.9, 0.1],
    [0.1, 0.9],
    [0.999, 0.001],
    [0.2, 0.3, 0.5],
    [0.98, 0.01, 0.01],
    [0.05, 0.25, 0.1, 0.6],
]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("chances", DISTRIBUTIONS, ids=str)
def test_with_repeats_the_estimate_lies_between_the_divergence_and_the_bound(chances, n):
    chosen = [0.0] * len(chances)
    for probability, drawn in choices(chances, n):
        chosen[max(drawn)] += probability
    estimate = float(np.dot(chosen, best_of_n_kl_estimate(np.log(chances), n)))
    assert divergence(chosen, chances) - 1e-12 <= estimate <= best_of_n_kl(n) + 1e-12


@pytest.mark.parametrize("n", [2, 7, 64])
@pytest.mark.parametrize("epsilon", [0.5, 0.1, 1e-3])
def test_the_estimate_is_exact_where_only_the_best_response_repeats(epsilon, n):
    cells = 100_000  # that the rest never repeats, within what they are wide
    chances = np.append(np.full(cells, (1 - epsilon) / cells), epsilon)
    above = np.append(np.cumsum(chances)[:-1], 1.0)
    chosen = above**n - np.append(0.0, above[:-1]) ** n
    exact = np.sum(chosen * np.log(np.where(chosen > 0, chosen, 1.0) / chances))
    np.testing.assert_allclose(best_of_n_kl_estimate(math.log(epsilon), n), exact, rtol=1e-4)


def test_a_response_that_never_repeats_is_told_the_bound_and_a_certain_one_nothing():
    np.testing.assert_allclose(best_of_n_kl_estimate([-40.0, -1000.0, -np.inf], 16), best_of_n_kl(16))
    np.testing.assert_allclose(best_of_n_kl_estimate([0.0, 1e-6], 16), 0, atol=1e-12)  # rounding can exceed 0
    np.testing.assert_allclose(best_of_n_kl_estimate(np.log([1e-12, 1.1e-12]), 16), best_of_n_kl(16), rtol=1e-9)


@given(seeds, st.integers(1, 5))
def test_win_rate_is_the_mean_over_every_subset_and_every_other_response(seed, n):
    rng = np.random.default_rng(seed)
    proxy, gold = rng.normal(size=(2, 6)), rng.integers(0, 3, (2, 6)).astype(float)  # with ties
    expected = [
        np.mean(
            [
                0.5 + 0.5 * np.sign(g[max(subset, key=lambda i: p[i])] - g[other])
                for subset in itertools.combinations(range(6), n)
                for other in set(range(6)) - set(subset)
            ]
        )
        for p, g in zip(proxy, gold, strict=True)
    ]
    np.testing.assert_allclose(best_of_n_win_rate(proxy, gold, n), expected)


@given(seeds, st.integers(1, 11))
def test_win_rate_by_the_score_that_chooses_is_its_bound_unless_responses_repeat(seed, n):
    proxy = np.random.default_rng(seed).normal(size=(2, 12))
    np.testing.assert_allclose(best_of_n_win_rate(proxy, proxy, n), best_of_n_win_rate_bound(n))
    coarse = np.round(proxy)
    assert (best_of_n_win_rate(coarse, coarse, n) <= best_of_n_win_rate_bound(n) + 1e-12).all()


def test_a_win_needs_a_response_to_win_against():
    with pytest.raises(ValueError, match="pool of 4 has no further response to compare the best of n=4 with"):
        best_of_n_win_rate(np.zeros((1, 4)), np.zeros((1, 4)), 4)


def softly_chosen(proxy, gold, n: int, temperature: float) -> tuple[float, float]:
    """Expected gold score and log n less the entropy of the choice, from the definition, over every subset."""
    golds, bounds = [], []
    for subset in map(list, itertools.combinations(range(len(proxy)), n)):
        chances = np.exp(proxy[subset] / temperature)
        chances /= chances.sum()
        golds.append(chances @ gold[subset])
        bounds.append(math.log(n) + chances @ np.log(chances))
    return float(np.mean(golds)), float(np.mean(bounds))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_soft_best_of_n_is_that_of_every_subset(n, temperature):
    rng = np.random.default_rng(n)
    proxy, gold = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    every = np.asarray(list(itertools.combinations(range(6), n)))[:, None, None, :].repeat(2, axis=1)
    drawn = random_groups(rng, 2, 6, n, 4000)
    expected = [softly_chosen(p, g, n, temperature) for p, g in zip(proxy, gold, strict=True)]
    for groups, close in ((every, 1e-12), (drawn, 0.02)):
        found = soft_best_of_n(proxy, gold, groups, temperature=temperature)
        bounds = soft_best_of_n_kl_bound(proxy, groups, temperature=temperature)
        np.testing.assert_allclose(np.stack([found, bounds], axis=1), expected, atol=close)


def test_groups_are_disjoint_and_every_subset_is_as_frequent():
    groups = random_groups(np.random.default_rng(0), 3, 5, 2, 2000)
    assert groups.shape == (2000, 3, 2, 2)
    assert all(len(set(row)) == 4 for row in groups.reshape(-1, 4).tolist())
    counts = [
        np.count_nonzero((np.sort(groups, axis=3) == pair).all(axis=3)) for pair in itertools.combinations(range(5), 2)
    ]
    np.testing.assert_allclose(counts, 12000 / 10, rtol=0.15)
    with pytest.raises(ValueError, match="groups of n=6 from a pool of 5"):
        random_groups(np.random.default_rng(0), 3, 5, 6, 1)


def test_soft_best_of_n_goes_from_best_of_n_to_one_sample():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    groups = np.asarray(list(itertools.combinations(range(4), 3)))[:, None, None, :].repeat(2, axis=1)
    cold, hot = (soft_best_of_n(proxy, gold, groups, temperature=temperature) for temperature in (1e-4, 1e6))
    np.testing.assert_allclose(cold, best_of_n(proxy, gold, 3))
    np.testing.assert_allclose(hot, gold.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(soft_best_of_n_kl_bound(proxy, groups, temperature=1e6), 0, atol=1e-9)
    np.testing.assert_allclose(soft_best_of_n_kl_bound(proxy, groups, temperature=1e-4), np.log(3))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("n", [2, 4])
def test_divergence_of_soft_best_of_n_is_below_both_bounds(n, temperature):
    chances, scores = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 1.0, 0.5, 2.0])
    chosen, bound = np.zeros(4), 0.0
    for probability, drawn in choices(chances, n):
        proxy = scores[None, list(drawn)]
        weights = np.exp(proxy[0] / temperature) / np.exp(proxy[0] / temperature).sum()
        np.add.at(chosen, list(drawn), probability * weights)
        groups = np.arange(n)[None, None, None]
        bound += probability * soft_best_of_n_kl_bound(proxy, groups, temperature=temperature)[0]
    exact = divergence(chosen, chances)
    assert 0 < exact < min(bound, best_of_n_kl(n))


def test_soft_choices_are_as_frequent_as_they_should_be():
    scores = np.array([[1.0, 3.0, 2.0], [1e4, 1e4 + 1, -1e4]])
    uniforms = np.tile((np.arange(10_000) + 0.5) / 10_000, (2, 1))
    for row, (score, uniform) in enumerate(zip(scores, uniforms, strict=True)):
        chosen = soft_choice(np.tile(score, (10_000, 1)), uniform, temperature=0.5)
        weights = np.exp((score - score.max()) / 0.5)
        np.testing.assert_allclose(
            np.bincount(chosen, minlength=3) / 10_000, weights / weights.sum(), atol=1e-4, err_msg=str(row)
        )
    assert soft_choice([[1.0, 2.0]], [1 - 1e-16], temperature=1.0).tolist() == [1]


def test_the_interval_over_prompts_covers_prompts_and_pools():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(100):
        proxy = rng.normal(size=(60, 1)) + rng.normal(size=(60, 8))
        low, high = bootstrap_interval(best_of_n(proxy, proxy, 4), level=0.95, rounds=200, seed=seed)
        covered.append(low <= 1.0293753730 <= high)  # the expected maximum of four standard normal numbers
    assert 0.86 < np.mean(covered) <= 0.99


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_distribution_of_the_best_is_that_of_all_sequences_of_samples(n):
    rng = np.random.default_rng(n)
    chances, scores = rng.dirichlet(np.ones(5)), np.array([2, 0, 2, 1, 2])
    chances[1] = 0.0
    chances /= chances.sum()
    expected = np.zeros(5)
    for samples in itertools.product(range(5), repeat=n):
        best = max(samples, key=lambda response: scores[response])  # the first of equals
        expected[best] += np.prod(chances[list(samples)])
    np.testing.assert_allclose(best_of_n_distribution(chances, scores, n), expected, atol=1e-14)


def test_the_fit_of_over_optimisation_is_exact_on_its_own_law_and_least_squares_elsewhere():
    kl = best_of_n_kl([1, 2, 8, 64, 512])
    root, rng = np.sqrt(kl), np.random.default_rng(0)
    alpha, beta = fit_over_optimisation(kl, root * (0.8 - 0.3 * root))
    assert (alpha, beta) == (pytest.approx(0.8), pytest.approx(0.3))
    gains = rng.normal(size=5)
    alpha, beta = fit_over_optimisation(kl, gains)
    errors = [np.sum((gains - root * (a - b * root)) ** 2) for a, b in ((alpha, beta), (alpha + 0.01, beta))]
    errors.append(np.sum((gains - root * (alpha - (beta + 0.01) * root)) ** 2))
    assert errors[0] < min(errors[1:])
