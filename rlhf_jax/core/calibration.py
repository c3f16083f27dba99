"""Calibration of preference models: accuracy by groups of pairs, and reliability of predicted probabilities."""

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.core.statistics import wilson_interval

Z_95 = 1.959964


def agreement(differences: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Agreement of the signs of two differences per pair: 1 if equal, 0 if opposite, 1/2 if either is 0."""
    return 0.5 * (1 + np.sign(differences) * np.sign(labels))


def accuracy(correct: ArrayLike) -> dict[str, float]:
    """`n, accuracy, low, high`: share of pairs ranked correctly (ties count half) with Wilson's 95 % interval."""
    correct = np.asarray(correct, np.float64)
    low, high = wilson_interval(float(correct.sum()), len(correct), z=Z_95)
    return {"n": len(correct), "accuracy": float(correct.mean()), "low": low, "high": high}


def accuracy_by(values: ArrayLike, correct: ArrayLike, *, bins: int) -> list[dict[str, float]]:
    """Accuracy of pairs in up to `bins` groups of about equal size, by ascending value.

    Returns: for every group its smallest and largest value (`from`, `to`) and the fields of `accuracy`. Equal values
    are never split over groups, so there may be fewer groups than `bins`.
    """
    values, correct = np.asarray(values, np.float64), np.asarray(correct, np.float64)
    inner = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
    group = np.searchsorted(inner, values, side="right")
    groups = [(values[group == g], correct[group == g]) for g in np.unique(group)]
    return [{"from": float(own.min()), "to": float(own.max()), **accuracy(right)} for own, right in groups]


def reliability(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int) -> list[dict[str, float]]:
    """Observed accuracy against predicted confidence in `bins` equal intervals of [0.5, 1].

    A pair's confidence is the probability of the response that the model prefers, $max(p, 1 - p)$.

    Args: probabilities p are predictions that the outcome is 1; outcomes are 0 or 1.
    Returns: for every non-empty interval the mean `confidence` and the fields of `accuracy`.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    confidence, right = np.maximum(p, 1 - p), np.where(p > 0.5, y, np.where(p < 0.5, 1 - y, 0.5))
    group = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    groups = [(confidence[group == g], right[group == g]) for g in np.unique(group)]
    return [{"confidence": float(own.mean()), **accuracy(observed)} for own, observed in groups]


def expected_calibration_error(rows: list[dict[str, float]]) -> float:
    r"""$\mathrm{ECE} = \sum_m \frac{|B_m|}{n} |\mathrm{acc}(B_m) - \mathrm{conf}(B_m)|$ .

    Guo et al. 2017 (arXiv:1706.04599). Args: rows as returned by `reliability`.
    """
    total = sum(row["n"] for row in rows)
    return float(sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / total)


def histograms(samples: dict[str, ArrayLike], *, bins: int) -> dict[str, list[float]]:
    """Histograms of several samples over common intervals of equal width: `edges`, and a list of counts per name."""
    arrays = {name: np.asarray(values, np.float64) for name, values in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins=bins)
    return {"edges": edges.tolist()} | {
        name: np.histogram(values, edges)[0].tolist() for name, values in arrays.items()
    }
