"""Differences between methods with 95 % intervals: paired over seeds where there are several, else over prompts.

Two methods are compared seed by seed, because what a seed draws (data order, initial weights, samples) is a larger part
of a score's uncertainty than the prompts are. The interval is the paired t test's (`core.statistics.t_interval`). A
method with one seed, such as the reference that all others start from, is held fixed. Where both methods have one seed
the interval is over prompts, and does not contain the spread between seeds.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from rlhf_jax.core.statistics import t_interval
from rlhf_jax.reports import frames
from rlhf_jax.reports.run import Run

LEVEL = 0.95


class Difference(NamedTuple):
    """One method's score less another's: the mean, its interval, and how many seeds it is over (1: over prompts)."""

    mean: float
    low: float
    high: float
    seeds: int


def over_seeds(own: pd.Series, other: pd.Series) -> Difference | None:
    """Mean difference of scores by seed, paired where both have a seed; None where both have one seed only.

    Args: own and other are the scores of two methods, indexed by seed.
    """
    common = own.index.intersection(other.index)
    if len(common) > 1:
        apart = own[common] - other[common]
    elif len(other) == 1 < len(own):
        apart = own - other.iloc[0]
    elif len(own) == 1 < len(other):
        apart = own.iloc[0] - other
    else:
        return None
    values = apart.to_numpy(np.float64)
    return Difference(float(values.mean()), *t_interval(values, level=LEVEL), len(values))


def differences(run: Run) -> pd.DataFrame:
    """Every method less every other, in the score of `frames.comparison`: the judge's, or else the reward model's.

    Returns: `method, against, difference, low, high, over, seeds, n_prompts`, where `over` is "seeds" or "prompts".
    Intervals are left out (NaN) where there is one seed and one prompt.
    """
    results, samples = frames.comparison(run), run.samples(run.evaluation())
    column = "gold" if frames.judged_by_gold(results) else "score"
    answers = samples.assign(value=samples[column].astype(float)).pivot(
        index="step", columns=["method", "seed"], values="value"
    )
    names = list(dict.fromkeys(results["method"]))
    rows = []
    for own in names:
        for other in (name for name in names if name != own):
            found = over_seeds(answers[own].mean(), answers[other].mean())
            if found is None:
                found = _over_prompts((answers[own].iloc[:, 0] - answers[other].iloc[:, 0]).to_numpy(np.float64))
            over = "prompts" if found.seeds == 1 else "seeds"
            rows.append((own, other, found.mean, found.low, found.high, over, found.seeds, len(answers)))
    names = ["method", "against", "difference", "low", "high", "over", "seeds", "n_prompts"]
    return pd.DataFrame(rows, columns=names)


def at_equal_kl(scores: pd.DataFrame) -> pd.DataFrame:
    """Every method less every other at each divergence, over the seeds with which both reached it.

    Args: scores has `method, seed, kl, gold`, NaN where a run did not reach the divergence.

    Returns: `kl, method, against, difference, low, high, seeds`; pairs with fewer than two seeds are left out.
    """
    rows = []
    for kl, table in scores.dropna(subset="gold").groupby("kl"):
        wide = {str(method): rows.set_index("seed")["gold"] for method, rows in table.groupby("method", sort=False)}
        for own, its in wide.items():
            for other, others in wide.items():
                common = its.index.intersection(others.index)
                found = over_seeds(its[common], others[common]) if own != other else None
                if found is not None:
                    rows.append((kl, own, other, found.mean, found.low, found.high, found.seeds))
    return pd.DataFrame(rows, columns=["kl", "method", "against", "difference", "low", "high", "seeds"])


def _over_prompts(values: np.ndarray) -> Difference:
    low, high = t_interval(values, level=LEVEL) if len(values) > 1 else (np.nan, np.nan)
    return Difference(float(values.mean()), low, high, 1)
