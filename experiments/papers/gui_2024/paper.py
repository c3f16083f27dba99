r"""Gui, Gârbacea & Veitch 2024 (arXiv:2406.00832): Best-of-N almost maximises the win rate at its KL divergence.

Figure: win rate against divergence, of Best-of-N and of the best policy at each divergence.
Command: rlhf-jax reproduce gui_2024
Hardware and cost: two CPU cores, seconds.
Seeds: 10, a million groups of samples per size each; they only serve the claim on IPO's beta. The win rates are exact.
Judge and batch: none; the rank of a response among the policy's is uniform, as responses do not repeat.
Data: none.
Deviations: the abstract was read, not the paper's proofs; the formulas are derived here. No language model is trained.

With u the share of the policy's responses that are worse, a win rate depends on the distribution of u alone. Best-of-N
has the density $n u^{n-1}$: win rate $n/(n+1)$, divergence $\log n - (n-1)/n$. At a given divergence, the density
$\propto e^{c u}$ has the greatest win rate. On the best and the worst of n samples, the mean difference in
$\log \pi_n / \pi$ of Best-of-N is $(n-1) \sum_{k<n} 1/k$, which is IPO's target $1/(2 \beta)$ for
$\beta = 1 / (2 (n-1) \sum_{k<n} 1/k)$.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.optimize import root_scalar

from rlhf_jax.core.selection import best_of_n_kl, best_of_n_win_rate_bound
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

SIZES = (2, 4, 8, 16, 64, 256, 1024)
PAIRED = (2, 4, 16)
GROUPS = 1_000_000


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Compute win rates at equal divergence, and sample the margins of best and worst responses."""
    del scale, workdir
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for n in SIZES:
            divergence = float(best_of_n_kl(n))
            row = {"seed": seed, "n": n, "kl": divergence, "best_of_n": float(best_of_n_win_rate_bound(n))}
            row |= {"greatest": greatest_win_rate(divergence), "unrelated": unrelated_win_rate(n)}
            if n in PAIRED:
                row["margin"] = float(np.mean(margins(rng, n, GROUPS)))
                row["beta"] = 1 / (2 * (n - 1) * float(np.sum(1 / np.arange(1, n))))
            rows.append(row)
    return pd.DataFrame(rows)


def greatest_win_rate(divergence: float) -> float:
    r"""Win rate of the density $\propto e^{c u}$ whose divergence from the uniform one is given."""

    def mean(c: float) -> float:
        return 1 / -np.expm1(-c) - 1 / c

    def excess(c: float) -> float:
        return np.log(c) - c - np.log1p(-np.exp(-c)) + c * mean(c) - divergence

    return mean(root_scalar(excess, bracket=(1e-3, 1e6), xtol=1e-12).root)


def unrelated_win_rate(n: int, points: int = 4096) -> float:
    """Win rate of the best of n by a score that is independent of the rank: the mean rank, by the midpoint rule."""
    ranks = (np.arange(points) + 0.5) / points
    density_of_score = n * ranks ** (n - 1)
    return float(np.mean(density_of_score[:, None] * ranks[None, :]) / np.mean(density_of_score))


def margins(rng: np.random.Generator, n: int, groups: int) -> np.ndarray:
    r"""Difference in $\log \pi_n / \pi = \log n + (n-1) \log u$ between the best and the worst of n samples."""
    ranks = rng.random((groups, n))
    return (n - 1) * np.log(ranks.max(axis=1) / ranks.min(axis=1))


def draw(table: pd.DataFrame) -> Figure:
    """Draw win rates over the divergence, and the gap between the two."""
    figure, (left, right) = style.panels(2, 2.8)
    rows = table[table["seed"] == table["seed"].min()]
    divergences = np.linspace(0.01, rows["kl"].max(), 200)
    greatest = [greatest_win_rate(divergence) for divergence in divergences]
    left.plot(divergences, greatest, color=style.PALETTE["orange"], label="greatest win rate")
    left.plot(rows["kl"], rows["best_of_n"], "o", ms=4, color=style.PALETTE["blue"], label="Best-of-N")
    left.plot(rows["kl"], rows["unrelated"], "o", ms=4, color=style.MUTED, label="by an unrelated score")
    left.set_xlabel("KL divergence, nats")
    left.set_title("Win rate against one sample")
    left.legend(fontsize=7, frameon=False)
    right.plot(rows["n"], 100 * (rows["greatest"] - rows["best_of_n"]), "o-", ms=4, color=style.PALETTE["blue"])
    right.set_xscale("log", base=2)
    right.set_xticks(SIZES, [str(n) for n in SIZES])
    right.set_xlabel("n")
    right.set_ylim(bottom=0)
    right.set_title("Best-of-N's distance from it, points")
    return figure


PAPER = Paper(
    title="BoNBoN alignment for large language models and the sweetness of best-of-n sampling",
    source="arXiv:2406.00832",
    figure="win rate against KL divergence",
    question="foundations",
    scales={
        "cpu": Scale(
            seeds=10, settings={"sizes": list(SIZES), "paired": list(PAIRED), "groups": GROUPS}, cost="seconds"
        )
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="Best-of-N is almost the best policy at its divergence",
            statement="best-of-n is essentially optimal in the trade-off of win rate and KL divergence",
            number="-",
            statistic=lambda table: (table["greatest"] - table["best_of_n"]).groupby(table["n"]).max().to_numpy(),
            unit="share of wins below the greatest possible, for each n",
            criterion=Below(0.01),
            null=lambda table: table.assign(best_of_n=table["unrelated"]),
            sampled=False,
        ),
        Claim(
            name="tilting by the exponential of the rank is never worse",
            statement="the exponential tilting of the rank is optimal",
            number="-",
            statistic=lambda table: (table["greatest"] - table["best_of_n"]).groupby(table["n"]).min().to_numpy(),
            unit="share of wins of the exponential tilting above Best-of-N, for each n",
            criterion=Above(-1e-9),
            null=lambda table: table.assign(greatest=table["best_of_n"], best_of_n=table["greatest"]),
            sampled=False,
        ),
        Claim(
            name="selecting by an unrelated score wins nothing",
            statement="-",
            number="negative control",
            statistic=lambda table: table.groupby("n")["unrelated"].max().to_numpy(),
            unit="win rate at Best-of-N's divergence",
            criterion=Within(0.5, 1e-6),
            null=lambda table: table.assign(unrelated=table["best_of_n"]),
            sampled=False,
        ),
        *(
            Claim(
                name=f"IPO's beta for the best and the worst of {n}",
                statement="IPO on the best and the worst of n has Best-of-N as its optimum at beta_n",
                number=f"{1 / (2 * (n - 1) * float(np.sum(1 / np.arange(1, n)))):.4g}",
                statistic=lambda table, n=n: (2 * table["beta"] * table["margin"])[table["n"] == n].to_numpy(),
                unit="mean margin of Best-of-N over IPO's target",
                criterion=Within(1.0, 0.01),
                null=lambda table: table.assign(beta=2 * table["beta"]),
            )
            for n in PAIRED
        ),
    ),
)
