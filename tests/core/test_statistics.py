import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from rlhf_jax.core.statistics import (
    bootstrap_interval,
    distinct_n,
    length_controlled_win_rate,
    repetition,
    standard_error,
    t_interval,
    wilson_interval,
)
from tests.support.padded_arrays import seeds


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


def test_wilsons_interval_holds_the_proportion_also_where_nothing_or_everything_was_won():
    for n in range(1, 400):
        assert wilson_interval(n, n, z=1.959964)[1] >= 1
        assert wilson_interval(0, n, z=1.959964)[0] <= 0


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


def test_the_bootstrap_of_few_rows_has_the_quantiles_of_all_that_can_be_drawn():
    x = np.array([0.0, 0.5, 1.0, 1.0])
    every = [np.mean(drawn) for drawn in itertools.product(x, repeat=len(x))]
    for level in (0.5, 0.9):
        expected = np.quantile(every, [(1 - level) / 2, (1 + level) / 2])
        np.testing.assert_allclose(bootstrap_interval(x, level=level, rounds=20000, seed=0), expected, atol=1e-12)


def test_the_bootstrap_interval_is_scipys_and_follows_its_seed():
    x = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 200, p=[0.3, 0.2, 0.5])
    low, high = bootstrap_interval(x, level=0.95, rounds=5000, seed=1)
    theirs = scipy.stats.bootstrap((x,), np.mean, method="percentile", n_resamples=5000, rng=2).confidence_interval
    np.testing.assert_allclose((low, high), theirs, atol=0.006)
    assert bootstrap_interval(x, level=0.95, rounds=100, seed=1) == bootstrap_interval(
        x, level=0.95, rounds=100, seed=1
    )
    assert bootstrap_interval(x, level=0.95, rounds=100, seed=1) != bootstrap_interval(
        x, level=0.95, rounds=100, seed=2
    )


def judged(seed, n=60):
    """Wins, ties and losses that longer answers win more often, and the lengths."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.integers(1, 40, (2, n))
    chance = 1 / (1 + np.exp(-0.5 - 0.1 * (lengths - others)))
    wins = np.where(rng.random(n) < 0.2, 0.5, (rng.random(n) < chance).astype(float))
    return wins, lengths, others


@given(seeds)
def test_the_length_controlled_win_rate_is_scikit_learns_at_equal_lengths(seed):
    wins, lengths, others = judged(seed)
    delta = (lengths - others).astype(float)
    inputs = np.tanh(delta / delta.std())[:, None]
    model = LogisticRegression(C=1.0, tol=1e-12, max_iter=1000)  # a tie is half a win and half a loss
    outcomes, weights = np.repeat([1, 0], len(wins)), np.concatenate([wins, 1 - wins])
    model.fit(np.concatenate([inputs, inputs]), outcomes, sample_weight=weights)
    found = length_controlled_win_rate(wins, lengths, others)
    np.testing.assert_allclose(found.rate, model.predict_proba([[0.0]])[0, 1], atol=1e-6)
    other_way = length_controlled_win_rate(1 - wins, others, lengths)
    np.testing.assert_allclose((other_way.rate, other_way.se), (1 - found.rate, found.se), atol=1e-9)


def test_a_win_by_length_alone_is_controlled_away():
    rng = np.random.default_rng(0)
    delta = rng.integers(-10, 30, 2000)
    wins = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(delta / delta.std())))).astype(float)
    found = length_controlled_win_rate(wins, delta, np.zeros_like(delta))
    assert wins.mean() > 0.65
    assert abs(found.rate - 0.5) < 3 * found.se < 0.06
    never = length_controlled_win_rate(wins, np.roll(delta, 7), np.zeros_like(delta))
    assert abs(never.rate - wins.mean()) < 0.03, "lengths that have nothing to do with it change nothing"


def test_the_length_controlled_standard_error_is_that_of_samples():
    rates = [length_controlled_win_rate(*judged(seed, n=400)) for seed in range(200)]
    # A tie varies less than a win or a loss, and is counted as if it varied as much.
    spread = np.std([found.rate for found in rates])
    assert 0.8 * np.mean([found.se for found in rates]) < spread < 1.05 * np.mean([found.se for found in rates])


def test_a_win_rate_that_lengths_cannot_explain_or_explain_wholly_is_finite():
    longer = np.array([3, 4, 5, 1, 1, 1])
    wins = (longer > 2).astype(float)
    separated = length_controlled_win_rate(wins, longer, np.full(6, 2))
    assert 0 < separated.rate < 1 and np.isfinite(separated.se)
    assert length_controlled_win_rate(wins, longer, longer) == (0.5, pytest.approx(math.sqrt(0.25 / 6)))
    rare = (np.arange(10_000) == 0).astype(float)
    assert length_controlled_win_rate(rare, np.arange(10_000) % 2, np.zeros(10_000, int)).rate < 5e-4
    assert length_controlled_win_rate(np.ones(6), longer, np.full(6, 2)) == (1.0, 0.0)


def test_repetition_counts_within_each_text_and_leaves_short_texts_out():
    texts = [[*"abababab"], [*"abcdefgh"], [*"abc"], [*"aaaaa"]]
    assert repetition(texts, 4) == pytest.approx(np.mean([3 / 5, 0, 1 / 2]))
    assert repetition([[*"ab"], [*"ab"]], 1) == 0
    assert math.isnan(repetition([[*"abc"]], 4))


@given(seeds, st.integers(2, 12), st.floats(0.5, 0.999))
def test_the_t_interval_of_differences_is_the_paired_t_tests(seed, n, level):
    ours, theirs = np.random.default_rng(seed).normal(size=(2, n))
    low, high = scipy.stats.ttest_rel(ours, theirs).confidence_interval(level)
    np.testing.assert_allclose(t_interval(ours - theirs, level=level), (low, high))


@pytest.mark.nightly
def test_over_five_seeds_the_t_interval_covers_what_it_says_and_the_percentile_bootstrap_does_not():
    experiments = np.random.default_rng(0).normal(loc=0.3, size=(1000, 5))
    by_t = [t_interval(x, level=0.95) for x in experiments]
    by_bootstrap = [bootstrap_interval(x, level=0.95, rounds=200, seed=i) for i, x in enumerate(experiments)]
    covered = [np.mean([low < 0.3 < high for low, high in found]) for found in (by_t, by_bootstrap)]
    assert abs(covered[0] - 0.95) < 0.02, covered
    assert abs(covered[1] - 0.84) < 0.03, covered


def test_one_seed_has_no_interval_over_seeds():
    with pytest.raises(ValueError, match="at least two"):
        t_interval(np.array([1.0]), level=0.95)


def test_one_row_has_no_bootstrap_interval():
    assert np.isnan(bootstrap_interval(np.array([1.0]), level=0.95, rounds=100, seed=0)).all()
