"""Standard errors, confidence intervals, length-controlled win rates and repetition statistics."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike


class LengthControlled(NamedTuple):
    """Length-controlled win rate and its standard error."""

    rate: float
    se: float


def standard_error(x: ArrayLike) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    x = np.asarray(x, np.float64)
    return float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def wilson_interval(wins: float, n: int, *, z: float) -> tuple[float, float]:
    r"""Wilson's score interval for the proportion wins / n (Wilson 1927); ties may count as half a win.

    $(\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4n^2}) / (1 + z^2/n)$; z = 1.96 covers 95 %.
    """
    p, scale = wins / n, 1 + z**2 / n
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return min((centre - half) / scale, p), max((centre + half) / scale, p)  # rounding must not leave p outside


def bootstrap_interval(x: Float[np.ndarray, "N"], *, level: float, rounds: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of independent rows (Efron & Tibshirani 1993).

    The rows (prompts) are resampled with replacement `rounds` times; the interval consists of the quantiles
    (1 - level)/2 and (1 + level)/2 of the means. Unlike Wilson's interval, it applies to any values, such as half wins
    for ties. The same seed gives the same interval.

    Returns: the lower and the upper end; NaN for fewer than two rows.
    """
    if len(x) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = [x[rng.integers(len(x), size=len(x))].mean() for _ in range(rounds)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(x: Float[np.ndarray, "N"], *, level: float) -> tuple[float, float]:
    r"""Student's t interval for the mean of independent values, such as one difference per seed (Student 1908).

    $\bar x \pm t_{N-1, (1 + \text{level})/2} \, s / \sqrt N$. For differences between two methods trained with the same
    seeds, it is the interval of the paired t-test. It is exact for normal values even if N is small, whereas the
    percentile bootstrap of five values covers only about 84 % at a level of 95 %.

    Returns: the lower and the upper end. Raises ValueError for fewer than two values.

    Examples:
        >>> low, high = t_interval(np.array([0.9, 1.1, 1.3]), level=0.95)  # three seeds
        >>> print(f"{low:.2f} to {high:.2f}")
        0.60 to 1.60
    """
    from scipy import special  # takes half a second

    if len(x) < 2:
        raise ValueError(f"a t interval needs at least two values, but there are {len(x)}")
    half = float(special.stdtrit(len(x) - 1, (1 + level) / 2)) * standard_error(x)
    return float(np.mean(x)) - half, float(np.mean(x)) + half


def length_controlled_win_rate(
    wins: Float[np.ndarray, "N"], lengths: Int[np.ndarray, "N"], other_lengths: Int[np.ndarray, "N"]
) -> LengthControlled:
    r"""Length-controlled win rate by logistic regression (Dubois et al. 2024, arXiv:2404.04475).

    $P(\text{win}) = \sigma(\theta + \phi \tanh(\Delta / \mathrm{std}(\Delta)))$ with $\Delta$ the answer's length minus
    the other answer's; the rate is $\sigma(\theta)$, i.e. without the length term. Wins lie in 0 .. 1; a tie is 1/2 and
    counts as half of each outcome.

    The paper's model has a third term for the difficulty of each prompt. We omit it, because its parameters can only be
    estimated if very many models answer the same prompts. Without it nothing varies over prompts at equal lengths, so
    that the paper's mean over prompts is $\sigma(\theta)$. $\phi$ has the penalty $\phi^2 / 2$ (the default of
    scikit-learn's `LogisticRegression`), which keeps it finite if lengths separate wins from losses; $\theta$ has no
    penalty. The authors' code uses an L1 penalty on all parameters, chosen by cross-validation, and divides by the
    sample standard deviation instead of the population's.

    Returns: the rate and its standard error from the curvature of the penalised likelihood. If all pairs are won or
    lost, or all lengths are equal, the plain win rate with its binomial standard error.
    """
    mean, count, difference = float(wins.mean()), len(wins), (lengths - other_lengths).astype(np.float64)
    if mean in (0.0, 1.0) or not difference.std():
        return LengthControlled(mean, math.sqrt(mean * (1 - mean) / count))
    inputs = np.stack([np.ones(count), np.tanh(difference / difference.std())], axis=1)
    penalty, weights = np.array([0.0, 1.0]), np.zeros(2)
    for _ in range(50):  # Newton's method: about one step per unit of the log-odds, plus a few
        chances = 1 / (1 + np.exp(-inputs @ weights))
        curvature = inputs.T @ (inputs * (chances * (1 - chances))[:, None]) + np.diag(penalty)
        weights = weights + np.linalg.solve(curvature, inputs.T @ (wins - chances) - penalty * weights)
    rate = 1 / (1 + math.exp(-weights[0]))
    return LengthControlled(rate, rate * (1 - rate) * math.sqrt(np.linalg.inv(curvature)[0, 0]))


def repetition(token_lists: list[list[str]], n: int) -> float:
    r"""Mean share of repeated n-grams within a text: seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319).

    $1 - |\text{unique n-grams}| / |\text{n-grams}|$: 0 means no repetition. Texts with fewer than n tokens are skipped.
    """
    shares = []
    for tokens in token_lists:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else math.nan


def distinct_n(token_lists: list[list[str]], n: int) -> float:
    """Distinct n-grams over all n-grams of a set of texts (Li et al. 2016, arXiv:1510.03055); 1 means no repetition."""
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
