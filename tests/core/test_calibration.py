import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from rlhf_jax.core import calibration

RNG = np.random.default_rng(0)


def test_a_perfectly_calibrated_model_has_next_to_no_error_and_an_overconfident_one_much():
    logits = RNG.normal(size=200_000) * 2
    p = 1 / (1 + np.exp(-logits))
    outcomes = RNG.random(len(p)) < p
    errors = [
        calibration.expected_calibration_error(
            calibration.reliability(1 / (1 + np.exp(-scale * logits)), outcomes, bins=10)
        )
        for scale in (1.0, 3.0)
    ]
    assert errors[0] < 0.005
    # Confidence less truth, in expectation, where the confidence is that of three times the logits.
    np.testing.assert_allclose(errors[1], np.mean(1 / (1 + np.exp(-3 * abs(logits))) - np.maximum(p, 1 - p)), atol=3e-3)


def test_reliability_is_that_of_scikit_learn_on_confidences():
    p, outcomes = RNG.uniform(0.5, 1, 1000), RNG.random(1000) < 0.7
    rows = calibration.reliability(p, outcomes, bins=5)
    # Its bins are equal parts of [0, 1], of which ours are the upper half.
    observed, predicted = calibration_curve(outcomes, p, n_bins=10)
    np.testing.assert_allclose([row["accuracy"] for row in rows], observed)
    np.testing.assert_allclose([row["confidence"] for row in rows], predicted)


def test_it_does_not_matter_which_of_a_pair_is_called_chosen():
    p, outcomes = RNG.random(500), RNG.random(500) < 0.6
    turned = calibration.reliability(1 - p, 1 - outcomes, bins=10)
    for one, other in zip(calibration.reliability(p, outcomes, bins=10), turned, strict=True):
        assert one == pytest.approx(other)


def test_groups_are_of_equal_size_in_order_and_equal_values_together():
    values = np.array([3, 1, 2, 2, 2, 9, 8, 7, 6, 5.0])
    correct = np.array([1, 0, 0, 0, 1, 1, 1, 1, 0.5, 1])
    rows = calibration.accuracy_by(values, correct, bins=2)
    assert [(row["from"], row["to"], row["n"]) for row in rows] == [(1, 3, 5), (5, 9, 5)]
    np.testing.assert_allclose([row["accuracy"] for row in rows], [2 / 5, 4.5 / 5])
    assert all(row["low"] < row["accuracy"] < row["high"] for row in rows)
    assert [row["n"] for row in calibration.accuracy_by(np.arange(100), np.ones(100), bins=5)] == [20] * 5
    tied = calibration.accuracy_by([1, 2, 2, 2, 2, 2, 7, 8, 9, 9], np.ones(10), bins=2)
    assert [row["n"] for row in tied] == [1, 9]
    (one,) = calibration.accuracy_by(np.zeros(4), np.ones(4), bins=5)
    assert (one["n"], one["accuracy"]) == (4, 1)


def test_histograms_share_their_edges_and_lose_nothing():
    found = calibration.histograms({"a": [0.0, 1.0, 1.0], "b": [4.0]}, bins=4)
    assert found == {"edges": [0, 1, 2, 3, 4], "a": [1, 2, 0, 0], "b": [0, 0, 0, 1]}


def test_certainty_is_in_the_last_interval_and_a_half_is_a_tie_whatever_comes_true():
    first, last = calibration.reliability([1.0, 0.95, 0.0, 0.5, 0.5], [1, 1, 0, 1, 1], bins=5)
    assert (first["n"], first["confidence"], first["accuracy"]) == (2, 0.5, 0.5)
    assert (last["n"], last["accuracy"]) == (3, 1)


def test_agreement_counts_ties_half():
    differences, labels = [1.0, -1.0, 0.0, 3.0, 0.0], [2.0, 2.0, 2.0, 0.0, 0.0]
    np.testing.assert_array_equal(calibration.agreement(differences, labels), [1, 0, 0.5, 0.5, 0.5])
