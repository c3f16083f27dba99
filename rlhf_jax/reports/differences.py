"""Differences between methods with 95 % intervals: paired over seeds if there are several, otherwise over prompts.

Methods are compared seed by seed, because a seed (data order, initial weights, samples) contributes more to the
uncertainty of a score than the choice of prompts does. The interval is that of the paired t-test
(`core.statistics.t_interval`). A method with one seed, such as the common reference, is treated as fixed. If both
methods have one seed, the interval is over prompts and excludes the variation between seeds.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from rlhf_jax.core.statistics import t_interval
from rlhf_jax.reports import frames
from rlhf_jax.reports.run import Run

LEVEL = 0.95


class PairedDifference(NamedTuple):
    """Mean difference of two methods' scores with its interval and number of seeds (1: interval over prompts)."""

    mean: float
    low: float
    high: float
    seeds: int


def over_seeds(own: pd.Series, other: pd.Series) -> PairedDifference | None:
    """Mean difference of scores over seeds, paired on common seeds; None if fewer than two seeds can be compared.

    Args: own and other are the scores of two methods, indexed by seed.
    """
    common = own.index.intersection(other.index)
    if len(common) > 1:
        by_seed = own[common] - other[common]
    elif len(other) == 1 < len(own):
        by_seed = own - other.iloc[0]
    elif len(own) == 1 < len(other):
        by_seed = own.iloc[0] - other
    else:
        return None
    values = by_seed.to_numpy(np.float64)
    return PairedDifference(float(values.mean()), *t_interval(values, level=LEVEL), len(values))


def differences(run: Run) -> pd.DataFrame:
    """Differences of all ordered pairs of methods in the score of `frames.comparison` (gold judge or reward model).

    Returns: `method, against, difference, low, high, over, seeds, n_prompts`, where `over` is "seeds" or "prompts".
    Intervals are NaN with one seed and one prompt.
    """
    results, samples = frames.comparison(run), run.samples(run.evaluation())
    column = "gold" if frames.judged_by_gold(results) else "score"
    answers = samples.assign(value=samples[column].astype(float)).pivot(
        index="step", columns=["method", "seed"], values="value"
    )
    names = list(dict.fromkeys(results["method"]))
    by_seed = {name: answers[name].mean() for name in names}
    first = {name: answers[name].iloc[:, 0].to_numpy(np.float64) for name in names}
    rows = []
    for own in names:
        for other in (name for name in names if name != own):
            gap = over_seeds(by_seed[own], by_seed[other])
            if gap is None:
                gap = _over_prompts(first[own] - first[other])
            over = "prompts" if gap.seeds == 1 else "seeds"
            rows.append((own, other, gap.mean, gap.low, gap.high, over, gap.seeds, len(answers)))
    names = ["method", "against", "difference", "low", "high", "over", "seeds", "n_prompts"]
    return pd.DataFrame(rows, columns=names)


def leading_method(run: Run) -> str | None:
    """Method with the highest score, if the intervals of its differences from all others are above 0."""
    best, gaps = frames.best_method(frames.comparison(run)), differences(run)
    own = gaps[gaps["method"] == best]
    return best if len(own) and (own["low"] > 0).all() else None


def at_equal_kl(scores: pd.DataFrame) -> pd.DataFrame:
    """Differences of all ordered pairs of methods at each KL divergence, over the seeds of both that reached it.

    Args: scores has `method, seed, kl, gold`, NaN where a run did not reach the divergence.

    Returns: `kl, method, against, difference, low, high, seeds`; pairs with fewer than two seeds are left out.
    """
    rows = []
    for kl, table in scores.dropna(subset="gold").groupby("kl"):
        gold = {str(method): rows.set_index("seed")["gold"] for method, rows in table.groupby("method", sort=False)}
        for own, own_gold in gold.items():
            for other, other_gold in gold.items():
                common = own_gold.index.intersection(other_gold.index)
                gap = over_seeds(own_gold[common], other_gold[common]) if own != other else None
                if gap is not None:
                    rows.append((kl, own, other, gap.mean, gap.low, gap.high, gap.seeds))
    return pd.DataFrame(rows, columns=["kl", "method", "against", "difference", "low", "high", "seeds"])


def _over_prompts(values: np.ndarray) -> PairedDifference:
    low, high = t_interval(values, level=LEVEL) if len(values) > 1 else (np.nan, np.nan)
    return PairedDifference(float(values.mean()), low, high, 1)
