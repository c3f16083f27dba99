import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.integrate
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core.best_of_n import best_of_n, best_of_n_kl, order_statistic_weights
from tests.core.cases import seeds


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
