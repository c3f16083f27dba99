"""Arithmetic of papers on selection: pessimistic weights, gains within lengths, folds of topics."""

import runpy
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from rlhf_jax.core.selection import order_statistic_weights
from rlhf_jax.papers import suite

PAPERS = suite.papers_directory()
HUANG = runpy.run_path(str(PAPERS / "huang_2025" / "paper.py"))
SINGHAL = runpy.run_path(str(PAPERS / "singhal_2023" / "paper.py"))
CONVARG = runpy.run_path(str(PAPERS / "convarg.py"))


def test_pessimistic_weights_have_the_normalisation_of_the_paper():
    scores = np.random.default_rng(0).normal(size=(3, 2, 16))
    found = HUANG["weights"](scores)
    for row, weights in zip(scores.reshape(-1, 16), found.reshape(-1, 16), strict=True):

        def excess(threshold: float, row: np.ndarray = row) -> float:
            return float(np.mean(np.maximum(0, row - threshold) / HUANG["BETA"]) - 1)

        threshold = brentq(excess, row.min() - 1, row.max())
        expected = np.maximum(0, row - threshold)
        np.testing.assert_allclose(weights, expected / expected.sum(), atol=1e-9)
        assert 1 < np.count_nonzero(weights) < 16


def test_pessimism_is_the_weighted_mean_over_groups():
    rng = np.random.default_rng(1)
    reward, gold = rng.normal(size=(2, 4, 7))
    np.testing.assert_allclose(HUANG["pessimistic"](reward, gold, 1), gold.mean(axis=1))
    weights = [HUANG["weights"](reward[:, start : start + 3]) for start in (0, 3)]
    by_group = [np.sum(weights[i] * gold[:, 3 * i : 3 * i + 3], axis=1) for i in (0, 1)]
    np.testing.assert_allclose(HUANG["pessimistic"](reward, gold, 3), np.mean(by_group, axis=0))


def test_win_chances_compare_with_the_other_samples():
    gold = np.array([[0.0, 1.0, 1.0, 3.0]])
    np.testing.assert_allclose(HUANG["win_chances"](gold), [[0, 0.5, 0.5, 1]])


def test_a_gain_by_length_alone_has_no_part_within_lengths():
    words = np.array([5, 8, 30, 35, 50, 55, 70, 71])
    group = (words - 1) // SINGHAL["GROUP"]
    gain, within = SINGHAL["decomposed"](group.astype(float), words, 4)
    assert gain > 0.5
    np.testing.assert_allclose(within, 0, atol=1e-12)


def test_a_gain_among_equal_lengths_is_within_lengths():
    reward = np.array([0.3, -1.0, 2.0, 0.7])
    gain, within = SINGHAL["decomposed"](reward, np.full(4, 12), 2)
    np.testing.assert_allclose(gain, np.sort(reward) @ order_statistic_weights(4, 2) - 0.5)
    np.testing.assert_allclose(within, gain)


def test_ties_are_half_correct():
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": "b", "rejected": "c"}, {"chosen": "c", "rejected": "a"}]
    assert CONVARG["correct"](rows, {"a": 1.0, "b": 0.0, "c": 0.0}) == 0.5


def test_topics_are_divided_among_folds_and_never_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path))
    runs = {}

    def run_each(config, folds, workdir, *, shared):
        (fold,) = folds
        runs[fold] = [Path(config.data[split]).read_text() for split in ("train", "eval")]
        return {fold: None}

    monkeypatch.setattr(CONVARG["training"], "run_each", run_each)
    found = CONVARG["run_each"]("smoke", range(CONVARG["FOLDS"]), tmp_path)
    topics = [{row["topic"] for row in held_out} for _, held_out in found.values()]
    assert sorted(topic for own in topics for topic in own) == sorted(f"topic {i}" for i in range(16))
    assert [len(own) for own in topics] == [2] * CONVARG["FOLDS"]
    for fold, own in enumerate(topics):
        train, held_out = runs[fold]
        for topic in own:
            assert f'"{topic}"' not in train
            assert f'"{topic}"' in held_out
