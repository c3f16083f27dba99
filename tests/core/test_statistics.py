import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core.statistics import distinct_n, standard_error, wilson_interval
from tests.core.cases import seeds


@given(seeds, st.integers(2, 50))
def test_standard_error_is_the_sample_deviation_over_the_root_of_n(seed, n):
    x = np.random.default_rng(seed).normal(size=n)
    np.testing.assert_allclose(standard_error(x), scipy.stats.sem(x))


def test_one_row_has_no_standard_error():
    assert math.isnan(standard_error([1.0]))


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_the_published_values(wins, n, low, high):
    np.testing.assert_allclose(wilson_interval(wins, n, z=1.959964), (low, high), atol=5e-5)


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([1.0, 1.96, 2.58]))
def test_wilson_limits_are_where_the_score_test_just_rejects(n, share, z):
    wins = round(2 * share * n) / 2  # ties count half
    p = wins / n

    def score(limit):
        return abs(limit - p) - z * math.sqrt(limit * (1 - limit) / n)

    low, high = wilson_interval(wins, n, z=z)
    if p > 0:
        np.testing.assert_allclose(low, scipy.optimize.brentq(score, 0, min(p, 1 - 1e-9)), atol=1e-9)
    if p < 1:
        np.testing.assert_allclose(high, scipy.optimize.brentq(score, max(p, 1e-9), 1), atol=1e-9)
    assert -1e-12 <= low <= p + 1e-12 and p - 1e-12 <= high <= 1 + 1e-12
    np.testing.assert_allclose(wilson_interval(n - wins, n, z=z), (1 - high, 1 - low), atol=1e-12)


def test_distinct_n_counts_each_ngram_once_and_crosses_no_text():
    texts = [["a", "b", "a", "b"], ["b", "a"], ["c"]]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4  # ab, ba, ab, ba; not the pair across two texts
    assert math.isnan(distinct_n([["a"]], 2))
