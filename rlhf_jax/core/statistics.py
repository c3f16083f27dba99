"""What a table reports beside a mean."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import special


class LengthControlled(NamedTuple):
    """A win rate had the answers been equally long, and its standard error."""

    rate: float
    se: float


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
    return min((centre - half) / scale, p), max((centre + half) / scale, p)  # rounding must not leave p outside


def bootstrap_interval(x: Float[np.ndarray, "N"], *, level: float, rounds: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of independent rows (Efron & Tibshirani 1993).

    The rows (prompts) are drawn with replacement, `rounds` times; the interval lies between the quantiles (1 - level)/2
    and (1 + level)/2 of their means. Unlike Wilson's it takes rows of any value, ties as half wins among them, as they
    are. The same seed gives the same interval.

    Returns: the lower and the upper end, NaN for a single row, which says nothing of the spread.
    """
    if len(x) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = [x[rng.integers(len(x), size=len(x))].mean() for _ in range(rounds)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(x: Float[np.ndarray, "N"], *, level: float) -> tuple[float, float]:
    r"""Student's t interval for the mean of independent values, such as one difference a seed (Student 1908).

    $\bar x \pm t_{N-1, (1 + \text{level})/2} \, s / \sqrt N$. Of the differences between two methods that were trained
    with the same seeds this is the paired t test's interval. It is exact for normal values however few there are, where
    the percentile bootstrap of five values covers about 84 % at a level of 95 %: N values hardly show their own spread.

    Returns: the lower and the upper end. Raises ValueError for a single value, which has no spread.
    """
    if len(x) < 2:
        raise ValueError(f"an interval over {len(x)} values: at least two are needed")
    half = float(special.stdtrit(len(x) - 1, (1 + level) / 2)) * standard_error(x)
    return float(np.mean(x)) - half, float(np.mean(x)) + half


def length_controlled_win_rate(
    wins: Float[np.ndarray, "N"], lengths: Int[np.ndarray, "N"], other_lengths: Int[np.ndarray, "N"]
) -> LengthControlled:
    r"""The win rate had the answers been equally long, by logistic regression (Dubois et al. 2024, arXiv:2404.04475).

    $P(\text{win}) = \sigma(\theta + \phi \tanh(\Delta / \mathrm{std}(\Delta)))$ with $\Delta$ the answer's length less
    the other's; the rate is $\sigma(\theta)$, the length term being set to 0. Wins lie in 0 .. 1, and one half is a
    tie, which counts as half of each outcome.

    The paper's model has a third term, of the instruction's difficulty. It is left out: its one parameter a prompt is
    known only where very many models answer the same prompts, and only it varies over prompts once the lengths are
    equal, so that the paper's mean over prompts is $\sigma(\theta)$ here. $\phi$ has the penalty $\phi^2 / 2$ (that of
    scikit-learn's `LogisticRegression` at its default), without which it would be infinite where lengths tell all wins
    from all losses; $\theta$ has none. The authors' code has an L1 penalty on all, chosen by cross-validation, and
    divides by the sample's deviation, which is that of the population here.

    Returns: the rate and its standard error, by the curvature of the penalised likelihood. Where all is won or lost, or
    all answers are as long as the others, the plain rate (its standard error is then the binomial one).
    """
    mean, count, difference = float(wins.mean()), len(wins), (lengths - other_lengths).astype(np.float64)
    if mean in (0.0, 1.0) or not difference.std():
        return LengthControlled(mean, math.sqrt(mean * (1 - mean) / count))
    inputs = np.stack([np.ones(count), np.tanh(difference / difference.std())], axis=1)
    penalty, weights = np.array([0.0, 1.0]), np.zeros(2)
    for _ in range(50):  # Newton's method: one step or so for each unit of the log odds, and a few more
        chances = 1 / (1 + np.exp(-inputs @ weights))
        curvature = inputs.T @ (inputs * (chances * (1 - chances))[:, None]) + np.diag(penalty)
        weights = weights + np.linalg.solve(curvature, inputs.T @ (wins - chances) - penalty * weights)
    rate = 1 / (1 + math.exp(-weights[0]))
    return LengthControlled(rate, rate * (1 - rate) * math.sqrt(np.linalg.inv(curvature)[0, 0]))


def repetition(token_lists: list[list[str]], n: int) -> float:
    r"""Repeated n-grams within a text, the mean over texts: seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319).

    $1 - |\text{unique n-grams}| / |\text{n-grams}|$: 0 is no repetition. Texts with fewer than n tokens do not count.
    """
    shares = []
    for tokens in token_lists:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else math.nan


def distinct_n(token_lists: list[list[str]], n: int) -> float:
    """Distinct n-grams over all n-grams of a set of texts (Li et al. 2016, arXiv:1510.03055): 1 is no repetition."""
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
