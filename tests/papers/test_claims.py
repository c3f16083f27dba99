"""Verdicts: the t-test, equivalence, Holm's adjustment and power, each against numbers from elsewhere."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rlhf_jax.papers.claims import LEVEL, POWER, Above, Below, Claim, Within, holm, judge, smallest_effect

VALUES = np.array([0.3, 0.5, 0.2, 0.6, 0.4])


def claim(criterion, values=VALUES, *, sampled=True):
    """A claim whose statistic is the column `value`, and its table."""
    one = Claim(
        name="it",
        statement="",
        number="-",
        unit="points",
        statistic=lambda table: table["value"].to_numpy(),
        criterion=criterion,
        null=lambda table: table.assign(value=0.0),
        sampled=sampled,
    )
    return one, pd.DataFrame({"value": values})


def verdict(criterion, values=VALUES, *, sampled=True):
    return judge([claim(criterion, values, sampled=sampled)])[0].verdict


def test_p_values_are_those_of_scipys_t_tests():
    for bound in (0.0, 0.25, 0.45):
        expected = stats.ttest_1samp(VALUES, bound, alternative="greater").pvalue
        supports, contradicts = Above(bound).evidence(VALUES)
        np.testing.assert_allclose(supports, min(1, 2 * expected), rtol=1e-12)
        np.testing.assert_allclose(contradicts, min(1, 2 * (1 - expected)), rtol=1e-12)
        assert Below(bound).evidence(VALUES) == (contradicts, supports)


def test_a_verdict_needs_evidence_on_one_side():
    assert verdict(Above(0.0)) == "reproduced"
    assert verdict(Above(0.35)) == "inconclusive"
    assert verdict(Above(0.9)) == "contradicted"
    assert verdict(Below(0.9)) == "reproduced"
    assert verdict(Within(0.4, 0.5)) == "reproduced"
    assert verdict(Within(0.4, 0.1)) == "inconclusive"
    assert verdict(Within(2.0, 0.5)) == "contradicted"
    assert verdict(Above(0.0), VALUES[:1]) == "inconclusive"


def test_equivalence_is_shown_exactly_if_the_interval_lies_within_the_margin():
    low, high = stats.t.interval(0.95, 4, VALUES.mean(), stats.sem(VALUES))
    margin = max(high - 0.4, 0.4 - low)
    assert verdict(Within(0.4, margin + 1e-9)) == "reproduced"
    assert verdict(Within(0.4, margin - 1e-9)) == "inconclusive"


def test_a_claim_without_sampling_error_has_to_hold_in_every_unit():
    assert verdict(Above(0.1), sampled=False) == "reproduced"
    assert verdict(Above(0.25), sampled=False) == "contradicted"
    assert verdict(Within(0.4, 0.21), sampled=False) == "reproduced"


def test_claims_of_one_question_share_the_chance_of_an_error():
    # By hand: 0.01 x 3, then 0.02 x 2, then the largest so far.
    np.testing.assert_allclose(holm([0.04, 0.01, 0.02]), [0.04, 0.03, 0.04])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    alone = judge([claim(Above(0.2))])[0]
    among = judge([claim(Above(0.2))] * 4)
    assert alone.verdict == "reproduced"
    assert {outcome.verdict for outcome in among} == {"inconclusive"}
    np.testing.assert_allclose(among[0].p, 4 * alone.p)


def test_a_claim_without_results_is_not_run_and_takes_no_share():
    one, table = claim(Above(0.2))
    found = judge([(one, None), (one, table)])
    assert [outcome.verdict for outcome in found] == ["not run", "reproduced"]


def test_the_smallest_effect_is_found_as_often_as_it_says():
    rng = np.random.default_rng(0)
    # For each draw the effect that its own deviation gives: found with probability POWER on average, roughly.
    effect = smallest_effect(rng.normal(size=100_000)) * np.sqrt(100_000 / 20)
    draws = rng.normal(effect, 1, size=(4000, 20))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue <= LEVEL
    assert abs(found.mean() - POWER) < 0.05


@pytest.mark.nightly
def test_null_effects_are_rarely_called_reproduced():
    draws = np.random.default_rng(1).normal(size=(2000, 5))
    rate = np.mean([verdict(Above(0.0), values) == "reproduced" for values in draws])
    assert rate < LEVEL


def test_a_statistic_has_to_be_finite():
    one, table = claim(Above(0.0), np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="'it' should give finite numbers"):
        judge([(one, table)])
    with pytest.raises(ValueError, match="finite"):
        judge([(dataclasses.replace(one, statistic=lambda _: []), table)])
