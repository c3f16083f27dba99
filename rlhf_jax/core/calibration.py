"""How far a model of preferences can be believed: accuracy by groups of pairs, and probabilities against outcomes."""

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.core.statistics import wilson_interval

Z_95 = 1.959964


def agreement(differences: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """For every pair 1 where two differences have the same sign, 0 where opposite ones, a half where either is 0."""
    return 0.5 * (1 + np.sign(differences) * np.sign(labels))


def accuracy(correct: ArrayLike) -> dict[str, float]:
    """`n, accuracy, low, high`: the share of pairs ranked correctly (a tie is half of one), Wilson's 95 % interval."""
    correct = np.asarray(correct, np.float64)
    low, high = wilson_interval(float(correct.sum()), len(correct), z=Z_95)
    return {"n": len(correct), "accuracy": float(correct.mean()), "low": low, "high": high}


def accuracy_by(values: ArrayLike, correct: ArrayLike, *, bins: int) -> list[dict[str, float]]:
    """The accuracy of pairs in `bins` groups of about equal size, by ascending value.

    Returns: for every group its least and greatest value (`from`, `to`), and what `accuracy` gives. Equal values are
    never in two groups, so that there may be fewer.
    """
    values, correct = np.asarray(values, np.float64), np.asarray(correct, np.float64)
    inner = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
    group = np.searchsorted(inner, values, side="right")
    found = [(values[group == g], correct[group == g]) for g in np.unique(group)]
    return [{"from": float(own.min()), "to": float(own.max()), **accuracy(right)} for own, right in found]


def reliability(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int) -> list[dict[str, float]]:
    """What was predicted against what was observed, in `bins` equal intervals of [0.5, 1].

    A pair's confidence is the probability of the response that the model prefers, $max(p, 1 - p)$.

    Args: probabilities are those that the label comes true; outcomes say whether it did (1), or not (0).
    Returns: for every interval with pairs in it `confidence` (their mean) and what `accuracy` gives.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    confidence, right = np.maximum(p, 1 - p), np.where(p > 0.5, y, np.where(p < 0.5, 1 - y, 0.5))
    group = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    found = [(confidence[group == g], right[group == g]) for g in np.unique(group)]
    return [{"confidence": float(own.mean()), **accuracy(observed)} for own, observed in found]


def expected_calibration_error(rows: list[dict[str, float]]) -> float:
    r"""$\mathrm{ECE} = \sum_m \frac{|B_m|}{n} |\mathrm{acc}(B_m) - \mathrm{conf}(B_m)|$ .

    Guo et al. 2017 (arXiv:1706.04599). Args: rows are those of `reliability`.
    """
    total = sum(row["n"] for row in rows)
    return float(sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / total)


def histograms(samples: dict[str, ArrayLike], *, bins: int) -> dict[str, list[float]]:
    """Counts of several samples over the same equal intervals: `edges`, and a list of counts by each name."""
    arrays = {name: np.asarray(values, np.float64) for name, values in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins=bins)
    return {"edges": edges.tolist()} | {
        name: np.histogram(values, edges)[0].tolist() for name, values in arrays.items()
    }
