r"""Amini, Vieira, Ash & Cotterell 2024 (arXiv:2407.06057), "Variational Best-of-N": its optimum and its invariance.

Figure: win rate against divergence of Best-of-N, of vBoN's optimum and of the optimum of KL-regularised reward.
Command: rlhf-jax reproduce amini_2024
Hardware and cost: two CPU cores, seconds.
Seeds: 10 random policies over 2,000 responses with log-normal rewards; every expectation is a sum.
Judge and batch: none.
Data: none.
Deviations: the objectives are solved in closed form instead of training; the paper's experiments are not reproduced.
Source: the objective and its beta (n = 1/beta + 1) were read in the paper's text, the statement on the frontier in its
abstract, and the invariance in a summary; its proofs were not read.

vBoN maximises $\mathbb{E}_\pi[\log F] - \beta \, \mathrm{KL}(\pi \| \pi_0)$ with F the share of samples of $\pi_0$
whose reward is at most as high. Its optimum is $\propto \pi_0 F^{1/\beta}$, with $1/\beta = N - 1$ nearly Best-of-N.
The optimum of KL-regularised reward is $\propto \pi_0 e^{r/\beta}$.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.optimize import root_scalar

from rlhf_jax.core.selection import best_of_n_distribution
from rlhf_jax.papers.claims import Above, Below, Claim
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

RESPONSES = 2000
SIZES = (2, 4, 16, 64, 256)


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Compute the three distributions for random policies and rewards, and how a monotone transform changes them."""
    del scale, workdir
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        policy, reward = rng.dirichlet(np.ones(RESPONSES)), rng.lognormal(size=RESPONSES)
        for n in SIZES:
            best = best_of_n_distribution(policy, reward, n)
            variational = tilted(policy, (n - 1) * np.log(rank(policy, reward)))
            strength = strength_at(divergence(variational, policy), policy, reward)
            regularised = tilted(policy, strength * reward)
            transformed = tilted(policy, strength * np.log(reward))
            variational_transformed = tilted(policy, (n - 1) * np.log(rank(policy, np.log(reward))))
            rows.append(
                {
                    "seed": seed,
                    "n": n,
                    "kl": divergence(variational, policy),
                    "kl_to_best_of_n": divergence(variational, best),
                    "best_of_n": win_rate(best, policy, reward),
                    "variational": win_rate(variational, policy, reward),
                    "regularised": win_rate(regularised, policy, reward),
                    "variational_moved": distance(variational, variational_transformed),
                    "regularised_moved": distance(regularised, transformed),
                }
            )
    return pd.DataFrame(rows)


def rank(policy: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Probability that a sample's reward is at most that of each response."""
    order = np.argsort(reward)
    found = np.empty_like(policy)
    found[order] = np.minimum(np.cumsum(policy[order]), 1.0)  # log-normal rewards have no ties
    return found


def tilted(policy: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """Normalise the policy times exp(log_weights)."""
    weights = policy * np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def strength_at(kl: float, policy: np.ndarray, reward: np.ndarray) -> float:
    """Find the inverse beta at which the optimum of KL-regularised reward has a given divergence."""
    return root_scalar(lambda c: divergence(tilted(policy, c * reward), policy) - kl, bracket=(1e-6, 1e3)).root


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL divergence of p from q in nats."""
    likely = p > 0
    return float(np.sum(p[likely] * np.log(p[likely] / q[likely])))


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation distance."""
    return float(np.abs(p - q).sum() / 2)


def win_rate(chosen: np.ndarray, policy: np.ndarray, reward: np.ndarray) -> float:
    """Probability that a response of `chosen` has a higher reward than one of the policy; equal ones count half."""
    return float(chosen @ (rank(policy, reward) - policy / 2))


def of_seeds(table: pd.DataFrame, column: str) -> np.ndarray:
    """Mean of a column over n, for each seed."""
    return table.groupby("seed")[column].mean().to_numpy()


def exchanged(table: pd.DataFrame) -> pd.DataFrame:
    """Exchange the two objectives."""
    names = {"variational": "regularised", "variational_moved": "regularised_moved"}
    return table.rename(columns=names | {new: old for old, new in names.items()})


def draw(table: pd.DataFrame) -> Figure:
    """Draw win rates over the divergence, and the distance of vBoN from Best-of-N."""
    figure, (left, right) = style.panels(2, 2.8)
    means = table.groupby("n").mean()
    for column, label, colour in (
        ("best_of_n", "Best-of-N", style.PALETTE["orange"]),
        ("variational", "vBoN", style.PALETTE["blue"]),
        ("regularised", "KL-regularised reward", style.PALETTE["green"]),
    ):
        marker = "x" if column == "best_of_n" else "o-"
        left.plot(means["kl"], means[column], marker, ms=5, color=colour, label=label)
    left.set_xlabel("KL divergence, nats")
    left.set_title("Win rate against one sample")
    left.legend(fontsize=7, frameon=False)
    for _, rows in table.groupby("seed"):
        right.plot(rows["n"], rows["kl_to_best_of_n"], color=style.PALETTE["blue"], lw=0.8, alpha=0.7)
    right.set_xscale("log", base=2)
    right.set_xticks(SIZES, [str(n) for n in SIZES])
    right.set_xlabel("n")
    right.set_title("KL(vBoN || Best-of-N), nats")
    return figure


PAPER = Paper(
    title="Variational best-of-N alignment",
    source="arXiv:2407.06057",
    figure="reward against KL divergence, as win rate",
    question="foundations",
    scales={"cpu": Scale(seeds=10, settings={"responses": RESPONSES, "sizes": list(SIZES)}, cost="seconds")},
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="vBoN's optimum is Best-of-N",
            statement="with beta = 1/(N-1) the objective's optimum approximates the Best-of-N distribution",
            number="-",
            statistic=lambda table: table.groupby("seed")["kl_to_best_of_n"].max().to_numpy(),
            unit="nats from Best-of-N, the largest over n",
            criterion=Below(0.05),
            null=lambda table: table.assign(kl_to_best_of_n=table["kl"]),
            sampled=False,
        ),
        Claim(
            name="vBoN ignores the scale of the reward",
            statement="vBoN is invariant to strictly increasing transforms of the reward",
            number="0",
            statistic=lambda table: table.groupby("seed")["variational_moved"].max().to_numpy(),
            unit="total variation between the optima for r and log r, the largest over n",
            criterion=Below(1e-9),
            null=exchanged,
            sampled=False,
        ),
        Claim(
            name="KL-regularised reward depends on the scale of the reward",
            statement="the standard objective is not invariant to transforms of the reward",
            number="-",
            statistic=lambda table: table.groupby("seed")["regularised_moved"].min().to_numpy(),
            unit="total variation between the optima for r and log r, the smallest over n",
            criterion=Above(0.05),
            null=exchanged,
            sampled=False,
        ),
        Claim(
            name="vBoN wins more than KL-regularised reward at equal divergence",
            statement="vBoN is more often on the frontier of win rate and KL divergence",
            number="-",
            statistic=lambda table: of_seeds(table, "variational") - of_seeds(table, "regularised"),
            unit="share of wins, mean over n, paired by seed",
            criterion=Above(0.0),
            null=exchanged,
        ),
    ),
)
