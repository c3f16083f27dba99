r"""Huang et al. 2025 (arXiv:2503.21878): Best-of-N degrades with N if the reward model errs; pessimism does not.

Figure: true reward over N, of Best-of-N and of inference-time pessimism.
Command: rlhf-jax reproduce huang_2025_exact
Hardware and cost: two CPU cores, seconds.
Seeds: 10 random policies and reward models over 2,000 responses; Best-of-N's expectation is a sum, pessimism's a mean
over 2,000 repetitions.
Judge and batch: true rewards, uniform in [0, 1]; the reward model's mean squared error under the policy is 0.04.
Data: none.
Deviations: the abstract was read; the algorithm is written from its published description. The paper's instances are
worst cases of its theorems; ours are random, with the errors of the reward model larger on rarer responses. The paper's
language models are not run; huang_2025 trains reward models. beta is 0.2 for all N.

Found: Best-of-N falls from N = 64 on by 0.08, but by very different amounts in the 10 instances, so that its claims are
inconclusive among all claims of the question. Pessimism does not fall; at this beta it also gains less than Best-of-N.

Pessimism samples from $\pi_0 \, \mathrm{relu}((\hat r - \lambda) / \beta)$, the optimum of the estimated reward with a
$\chi^2$ penalty of strength beta, by rejection sampling from N samples. $\lambda$ is solved on those samples, and their
greatest weight is the bound of the rejection, so that one is always accepted. A response's error has standard deviation
$\epsilon / \sqrt{\pi_0 |Y|}$: each response has the same part in the mean squared error. Estimates are clipped to
[0, 1].
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core.selection import best_of_n_distribution
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.columns import exchanged
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

RESPONSES = 2000
SIZES = (1, 4, 16, 64, 256, 1024, 4096)
ERROR, BETA = 0.2, 0.2
REPETITIONS = 2000
METHODS = ("best_of_n", "pessimism", "unrelated")


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Compute the true reward and the win rate of the response that each method returns."""
    del scale, workdir
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        policy = rng.dirichlet(np.ones(RESPONSES))
        truth = rng.random(RESPONSES)
        error = ERROR / np.sqrt(np.maximum(policy * RESPONSES, 1e-6))
        estimate = np.clip(truth + error * rng.normal(size=RESPONSES), 0, 1)
        estimate += 1e-9 * rng.random(RESPONSES)  # clipped estimates are equal: break ties at random
        unrelated = rng.random(RESPONSES)
        wins = 0.5 * (1 + np.sign(truth[:, None] - truth[None, :])) @ policy
        for n in SIZES:
            returned = {
                "best_of_n": best_of_n_distribution(policy, estimate, n),
                "pessimism": pessimism(rng, policy, estimate, n),
                "unrelated": best_of_n_distribution(policy, unrelated, n),
            }
            for method, chances in returned.items():
                found = {"truth": float(chances @ truth), "estimate": float(chances @ estimate)}
                rows.append({"seed": seed, "n": n, "method": method, **found, "win_rate": float(chances @ wins)})
    return pd.DataFrame(rows)


def pessimism(rng: np.random.Generator, policy: np.ndarray, estimate: np.ndarray, n: int) -> np.ndarray:
    """Estimate the distribution of the response returned: frequencies over repetitions, of n samples each."""
    counts = np.zeros(len(policy))
    cumulative = np.cumsum(policy)
    for _ in range(REPETITIONS):
        drawn = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
        weights = np.maximum(estimate[drawn] - normaliser(estimate[drawn]), 0) / BETA
        accepted = rng.random(n) < weights / weights.max()
        counts[drawn[np.argmax(accepted)]] += 1  # the first accepted; the sample of weight max always is
    return counts / REPETITIONS


def normaliser(scores: np.ndarray) -> float:
    r"""Solve $\frac1N \sum_i \mathrm{relu}((r_i - \lambda) / \beta) = 1$ for $\lambda$, exactly."""
    descending = np.sort(scores)[::-1]
    counts = np.arange(1, len(scores) + 1)
    candidates = (np.cumsum(descending) - BETA * len(scores)) / counts
    below = descending > candidates  # the samples with positive weight are the greatest k, for the last such k
    return float(candidates[np.flatnonzero(below)[-1]])


def curve(table: pd.DataFrame, method: str, column: str = "truth") -> pd.DataFrame:
    """One method's values, a row for each seed and a column for each N."""
    return table[table["method"] == method].pivot(index="seed", columns="n", values=column).sort_index(axis=1)


def late_fall(table: pd.DataFrame, method: str, column: str = "truth") -> np.ndarray:
    """Greatest value over N minus the value at the largest N, for each seed."""
    values = curve(table, method, column).to_numpy()
    return values.max(axis=1) - values[:, -1]


def draw(table: pd.DataFrame) -> Figure:
    """Draw true and estimated reward over N."""
    figure, axes = style.panels(2, 2.8)
    colours = dict(zip(METHODS, (style.PALETTE["blue"], style.PALETTE["green"], style.MUTED), strict=True))
    labels = dict(zip(METHODS, ("Best-of-N", "pessimism", "by an unrelated score"), strict=True))
    for panel, column, heading in zip(axes, ("truth", "estimate"), ("True reward", "Estimated reward"), strict=True):
        for method in METHODS:
            values = curve(table, method, column)
            for _, row in values.iterrows():
                panel.plot(values.columns, row, color=colours[method], lw=0.5, alpha=0.4)
            panel.plot(values.columns, values.mean(), "o-", ms=3, color=colours[method], label=labels[method])
        panel.set_xscale("log", base=2)
        panel.set_xticks(SIZES, [str(n) for n in SIZES])
        panel.set_xlabel("N")
        panel.set_title(heading)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


PAPER = Paper(
    title="Is best-of-N the best of them? Coverage, scaling, and optimality: random tabular instances",
    source="arXiv:2503.21878",
    figure="true reward over N",
    question="foundations",
    scales={
        "cpu": Scale(
            seeds=10,
            settings={
                "responses": RESPONSES,
                "sizes": list(SIZES),
                "error": ERROR,
                "beta": BETA,
                "repetitions": REPETITIONS,
            },
            cost="a minute",
        )
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="the true reward of Best-of-N falls at large N",
            statement="Best-of-N provably suffers from reward hacking when N is large",
            number="-",
            statistic=lambda table: late_fall(table, "best_of_n"),
            unit="true reward, its greatest value over N minus that at N = 4,096",
            criterion=Above(0.02),
            null=lambda table: table.assign(truth=table["estimate"]),
        ),
        Claim(
            name="the win rate of Best-of-N falls at large N",
            statement="Best-of-N provably suffers from reward hacking when N is large",
            number="-",
            statistic=lambda table: late_fall(table, "best_of_n", "win_rate"),
            unit="share of wins, its greatest value over N minus that at N = 4,096",
            criterion=Above(0.02),
            null=lambda table: table.assign(win_rate=table["estimate"]),
        ),
        Claim(
            name="the true reward of pessimism does not fall",
            statement="InferenceTimePessimism is scaling-monotonic: it does not degrade as N increases",
            number="0",
            statistic=lambda table: late_fall(table, "pessimism"),
            unit="true reward, its greatest value over N minus that at N = 4,096",
            criterion=Below(0.02),
            null=lambda table: table.assign(truth=-table["estimate"]),
        ),
        Claim(
            name="pessimism is better than Best-of-N at the largest N",
            statement="pessimism mitigates reward hacking",
            number="-",
            statistic=lambda table: (curve(table, "pessimism") - curve(table, "best_of_n"))[SIZES[-1]].to_numpy(),
            unit="true reward at N = 4,096, paired by seed",
            criterion=Above(0.0),
            null=exchanged("method", "best_of_n", "pessimism"),
        ),
        Claim(
            name="selecting by an unrelated score gains nothing",
            statement="-",
            number="negative control",
            statistic=lambda table: (curve(table, "unrelated")[SIZES[3]] - curve(table, "unrelated")[1]).to_numpy(),
            unit="true reward at N = 64 minus that of one sample",
            criterion=Within(0.0, 0.1),
            null=lambda table: table.assign(truth=table["estimate"] + (table["method"] == "unrelated") * table["n"]),
        ),
    ),
)
