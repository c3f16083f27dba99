r"""Claims of papers, criteria, and the verdicts that measurements give.

A claim has one statistic with a value per unit: a seed, or a cluster of rows with one source, such as a topic. Where
runs share a seed, the value is the difference of the two runs, so that the test is paired. The units are independent;
their mean is tested with Student's t, which is exact for normal values however few they are.

The claims that a question has are tested together: Holm's method (Holm 1979) holds the chance of any wrong verdict
among them at `LEVEL`. Claims without sampling error, such as identities on enumerated responses, are decided by their
criterion alone and take no part in it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from rlhf_jax.core.statistics import standard_error, t_interval

Verdict = Literal["reproduced", "contradicted", "inconclusive", "not run"]

LEVEL = 0.05
"""Chance of any wrong verdict among the claims of a question, two-sided."""

POWER = 0.8
"""Probability with which an effect of the stated size would be found."""


class Evidence(NamedTuple):
    """Two-sided p-values: the chance of values as extreme if the claim's boundary were the truth, in each direction."""

    supports: float
    contradicts: float


@dataclasses.dataclass(frozen=True)
class Above:
    """The mean exceeds a bound."""

    bound: float

    def holds(self, mean: float) -> bool:
        """Decide for a mean without sampling error."""
        return mean > self.bound

    def evidence(self, values: Float[np.ndarray, "units"]) -> Evidence:
        """Test the mean against the bound."""
        greater = _p_greater(values, self.bound)
        return Evidence(min(1.0, 2 * greater), min(1.0, 2 * (1 - greater)))

    def __str__(self) -> str:
        return f"> {self.bound:g}"


@dataclasses.dataclass(frozen=True)
class Below:
    """The mean is less than a bound."""

    bound: float

    def holds(self, mean: float) -> bool:
        """Decide for a mean without sampling error."""
        return mean < self.bound

    def evidence(self, values: Float[np.ndarray, "units"]) -> Evidence:
        """Test the mean against the bound."""
        contradicts, supports = Above(self.bound).evidence(values)
        return Evidence(supports, contradicts)

    def __str__(self) -> str:
        return f"< {self.bound:g}"


@dataclasses.dataclass(frozen=True)
class Within:
    """The mean lies within a margin of a target: equivalence, by two one-sided tests (Schuirmann 1987)."""

    target: float
    margin: float

    def holds(self, mean: float) -> bool:
        """Decide for a mean without sampling error."""
        return abs(mean - self.target) <= self.margin

    def evidence(self, values: Float[np.ndarray, "units"]) -> Evidence:
        """Test the mean against both ends."""
        above_lower = _p_greater(values, self.target - self.margin)
        above_upper = _p_greater(values, self.target + self.margin)
        inside = max(above_lower, 1 - above_upper)
        outside = min(1 - above_lower, above_upper)
        return Evidence(min(1.0, 2 * inside), min(1.0, 2 * outside))

    def __str__(self) -> str:
        return f"{self.target:g} ± {self.margin:g}"


Criterion = Above | Below | Within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of a paper, and the criterion that our statistic has to meet.

    `null` makes a table for which the claim is false: the criterion has to refuse it.
    """

    name: str  # unique within the paper
    statement: str  # what the paper says
    number: str  # the paper's own number, with figure or table; "-" without one
    # Our statistic: the table of results -> one value per unit.
    statistic: Callable[[pd.DataFrame], Sequence[float] | np.ndarray]
    unit: str  # of the statistic, such as "points of accuracy"
    criterion: Criterion
    null: Callable[[pd.DataFrame], pd.DataFrame]
    sampled: bool = True  # False: an identity, or an expectation computed exactly


class Outcome(NamedTuple):
    """A claim's statistic over its units, and the verdict."""

    claim: Claim
    verdict: Verdict
    units: int
    mean: float
    low: float  # ends of the t interval at 1 - LEVEL, not adjusted; NaN without sampling error
    high: float
    p: float  # adjusted by Holm's method within the question; NaN without sampling error
    smallest: float  # smallest effect that these units show with probability POWER; NaN without sampling error


def judge(measured: Sequence[tuple[Claim, pd.DataFrame | None]]) -> list[Outcome]:
    """Give the verdicts on all claims of one question, from the table of results of each (None: not run).

    A sampled claim with fewer than two units is inconclusive. Raises ValueError if a statistic is not finite.
    """
    found = [None if table is None else _values(claim, table) for claim, table in measured]
    evidence = {
        i: claim.criterion.evidence(values)
        for i, ((claim, _), values) in enumerate(zip(measured, found, strict=True))
        if claim.sampled and values is not None and len(values) > 1
    }
    adjusted = dict(zip(evidence, holm([min(each) for each in evidence.values()]), strict=True))
    return [
        _outcome(claim, values, evidence.get(i), adjusted.get(i, math.nan))
        for i, ((claim, _), values) in enumerate(zip(measured, found, strict=True))
    ]


def _outcome(claim: Claim, values: np.ndarray | None, evidence: Evidence | None, p: float) -> Outcome:
    nothing = math.nan
    if values is None:
        return Outcome(claim, "not run", 0, nothing, nothing, nothing, nothing, nothing)
    mean = float(np.mean(values))
    if not claim.sampled:
        kept = all(claim.criterion.holds(float(value)) for value in values)
        verdict = "reproduced" if kept else "contradicted"
        return Outcome(claim, verdict, len(values), mean, nothing, nothing, nothing, nothing)
    if evidence is None:
        return Outcome(claim, "inconclusive", len(values), mean, nothing, nothing, nothing, nothing)
    verdict: Verdict = "inconclusive"
    if p <= LEVEL:
        verdict = "reproduced" if evidence.supports < evidence.contradicts else "contradicted"
    low, high = t_interval(values, level=1 - LEVEL)
    return Outcome(claim, verdict, len(values), mean, low, high, p, smallest_effect(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the family-wise error by Holm's step-down method (Holm 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def smallest_effect(values: Float[np.ndarray, "units"]) -> float:
    r"""Distance of the true mean from the bound that a two-sided t-test at `LEVEL` would find with `POWER`.

    $(t_{N-1, 1 - \alpha/2} + t_{N-1, \text{power}}) s / \sqrt N$, without the adjustment for other claims.
    """
    freedom = len(values) - 1
    quantiles = stats.t.ppf(1 - LEVEL / 2, freedom) + stats.t.ppf(POWER, freedom)
    return float(quantiles) * standard_error(values)


def _p_greater(values: np.ndarray, bound: float) -> float:
    """One-sided p-value of a mean above the bound."""
    difference, error = float(np.mean(values)) - bound, standard_error(values)
    if error == 0:
        return 0.5 if difference == 0 else float(difference < 0)
    return float(stats.t.sf(difference / error, len(values) - 1))


def _values(claim: Claim, table: pd.DataFrame) -> np.ndarray:
    values = np.asarray(claim.statistic(table), np.float64)
    if not (values.ndim == 1 and len(values) and np.isfinite(values).all()):
        raise ValueError(f"the statistic of claim {claim.name!r} should give finite numbers, one per unit: {values}")
    return values
