r"""Beirami et al. 2024 (arXiv:2401.01879): KL divergence and win rate of Best-of-N are below their usual formulas.

Figure: the gap between the divergence of Best-of-N and $\log n - (n-1)/n$, over n.
Command: rlhf-jax reproduce beirami_2024
Hardware and cost: two CPU cores, seconds.
Seeds: 10 random policies over 32 responses, with scores of which some are equal; every expectation is a sum.
Judge and batch: none.
Data: none.
Deviations: the paper's bound holds for scores without ties. With ties, the first of the best samples is selected, and
wins count one half, so that the win rate's bound n/(n+1) holds too.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core.selection import best_of_n_distribution, best_of_n_kl, best_of_n_win_rate_bound
from rlhf_jax.papers.claims import Above, Below, Claim
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

RESPONSES = 32
SIZES = (2, 4, 16, 64, 256, 1024)
ROUNDING = 1e-9


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Compute divergence and win rate of Best-of-N exactly, by enumerating the responses of random policies."""
    del scale, workdir
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        chances = rng.dirichlet(np.full(RESPONSES, 0.5))
        for ties, scores in (("none", rng.permutation(RESPONSES)), ("some", rng.integers(0, 8, RESPONSES))):
            for n in SIZES:
                best = best_of_n_distribution(chances, scores, n)
                first = chances[scores == scores.max()].sum()
                rows.append({"seed": seed, "ties": ties, "n": n, "first": first, **gaps(chances, scores, best, n)})
    return pd.DataFrame(rows)


def gaps(chances: np.ndarray, scores: np.ndarray, best: np.ndarray, n: int) -> dict[str, float]:
    """Compute divergence and win rate against one sample, and how far both are below their formulas."""
    likely = best > 0
    divergence = float(np.sum(best[likely] * np.log(best[likely] / chances[likely])))
    wins = np.sign(scores[:, None] - scores[None]) / 2 + 0.5
    rate = float(best @ wins @ chances)
    return {
        "kl": divergence,
        "win_rate": rate,
        "kl_gap": float(best_of_n_kl(n)) - divergence,
        "win_gap": float(best_of_n_win_rate_bound(n)) - rate,
    }


def smallest(table: pd.DataFrame, column: str, ties: str | None = None) -> np.ndarray:
    """Find the smallest gap of each policy."""
    rows = table if ties is None else table[table["ties"] == ties]
    return rows.groupby("seed")[column].min().to_numpy()


def of_twice_as_many(table: pd.DataFrame) -> pd.DataFrame:
    """Count only half of the samples, as if the divergence of Best-of-2N were that of Best-of-N."""
    return table.assign(kl_gap=table["kl_gap"] - np.log(2), win_gap=table["win_gap"] - 1 / (table["n"] + 1) - 0.01)


def draw(table: pd.DataFrame) -> Figure:
    """Draw divergence and win rate over n, with the formulas."""
    figure, (left, right) = style.panels(2, 2.8)
    sizes = np.array(SIZES)
    for panel, column, formula, heading in (
        (left, "kl", best_of_n_kl(sizes), "KL(Best-of-N || policy), nats"),
        (right, "win_rate", best_of_n_win_rate_bound(sizes), "Win rate against one sample"),
    ):
        for (_, ties), rows in table.groupby(["seed", "ties"]):
            colour = style.PALETTE["blue" if ties == "none" else "sky"]
            panel.plot(rows["n"], rows[column], color=colour, lw=0.8, alpha=0.7)
        panel.plot(sizes, formula, "--", color=style.PALETTE["orange"], label="the usual formula")
        panel.set_xscale("log", base=2)
        panel.set_xticks(SIZES, [str(n) for n in SIZES])
        panel.set_xlabel("n")
        panel.set_title(heading)
    left.legend(fontsize=7, frameon=False)
    return figure


PAPER = Paper(
    title="Theoretical guarantees on the best-of-n alignment policy",
    source="arXiv:2401.01879",
    figure="Figures 2 and 3",
    question="foundations",
    scales={"cpu": Scale(seeds=10, settings={"responses": RESPONSES, "sizes": list(SIZES)}, cost="seconds")},
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="the divergence is at most log n - (n-1)/n",
            statement="the usual formula is an upper bound of the divergence",
            number="never violated",
            statistic=lambda table: -smallest(table, "kl_gap"),
            unit="nats above the bound, the largest over n",
            criterion=Below(ROUNDING),
            null=of_twice_as_many,
            sampled=False,
        ),
        Claim(
            name="the bound is not tight for policies with few responses",
            statement="the gap can be arbitrarily large when n exceeds the inverse of the best response's probability",
            number="-",
            statistic=lambda table: table[table["n"] * table["first"] > 20].groupby("seed")["kl_gap"].min().to_numpy(),
            unit="nats below the bound, the smallest where n times the probability of the best score exceeds 20",
            criterion=Above(1.0),
            null=lambda table: table.assign(kl_gap=0.0),
            sampled=False,
        ),
        Claim(
            name="the win rate is at most n/(n+1)",
            statement="the win rate of Best-of-N against one sample is at most n/(n+1)",
            number="never violated",
            statistic=lambda table: -smallest(table, "win_gap"),
            unit="share of wins above the bound, the largest over n",
            criterion=Below(ROUNDING),
            null=of_twice_as_many,
            sampled=False,
        ),
        Claim(
            name="with ties, both are below their bounds",
            statement="the inequalities are strict where scores are equal",
            number="-",
            statistic=lambda table: np.minimum(smallest(table, "kl_gap", "some"), smallest(table, "win_gap", "some")),
            unit="the smallest gap, in nats or share of wins",
            criterion=Above(1e-6),
            null=lambda table: table.assign(kl_gap=0.0),
            sampled=False,
        ),
    ),
)
