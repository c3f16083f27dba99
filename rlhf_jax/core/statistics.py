"""What a table reports beside a mean."""

import math

import numpy as np
from numpy.typing import ArrayLike


def standard_error(x: ArrayLike) -> float:
    """Standard error of the mean of independent rows: the sample deviation over the root of their number."""
    x = np.asarray(x, np.float64)
    return float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def wilson_interval(wins: float, n: int, *, z: float) -> tuple[float, float]:
    r"""Wilson's score interval for a proportion (Wilson 1927), wins of n; a tie may count as half a win.

    $(\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4n^2}) / (1 + z^2/n)$; z = 1.96 covers 95 %.
    """
    p, scale = wins / n, 1 + z**2 / n
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / scale, (centre + half) / scale


def distinct_n(token_lists: list[list[str]], n: int) -> float:
    """Distinct n-grams over all n-grams of a set of texts (Li et al. 2016, arXiv:1510.03055): 1 is no repetition."""
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
