r"""Huang et al. 2025 (arXiv:2503.21878), "Is Best-of-N the best of them?": large N, and pessimism.

Figure: Figure 1, performance of Best-of-N and of inference-time pessimism against N.
Command: rlhf-jax reproduce huang_2025
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 5, each with its own policy, comparisons, reward models and samples. Methods are compared on the same samples.
Judge and batch: gold judge (TF-IDF ridge on people's ratings); 64 comparisons per update, two passes; tokens per update
are in record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: a reward model of one layer and width 48, trained on 300 comparisons, so that it is a poor one; n to 256
for 32 prompts; the gold judge's scores are real numbers, and the win rate is against one sample of the policy. Instead
of rejection sampling, the distribution that it aims at is used: the expectation over n samples, weighted.

Inference-time pessimism selects y with probability proportional to $\max(0, (r(y) - \lambda) / \beta)$ times the
policy's, where $\lambda$ makes the weights $\max(0, (r - \lambda) / \beta)$ have mean 1 over the n samples: the optimum
of the reward under a $\chi^2$ penalty. The reward has standard deviation 1 over all samples, and $\beta = 0.5$.

Pilot, before the run: that of gao_2022 (seed 100, 40 prompts, n to 1,024; not among the seeds) had been seen. There,
Best-of-n by 300 comparisons still rose at large n: gains of 0.42, 0.63 and 0.67 at n = 32, 256 and 1,024. Pessimism had
not been tried.

Power, before the run: deviations of about 0.1 in a gain mean that five seeds show a difference of 0.16 alone, and of
about 0.35 as one of 18 claims (Holm).

Found: with 300 comparisons Best-of-N still rises on average from n = 32 to 256; from 128 to 256 it falls in
two seeds of five, and rises steeply in one. Pessimism does not change with n, as stated, but at beta = 0.5 it stays at
a win rate of 0.55 where Best-of-N reaches 0.65. That contradicts the claim alone, but not among all claims of the
question: inconclusive. Beta was not tuned; a smaller one approaches Best-of-N.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core.selection import best_of_n, best_of_n_win_rate
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style
from rlhf_jax.stages.kinds import Colour

SELECTION = runpy.run_path(str(Path(__file__).parents[1] / "selection.py"))
MODEL, BETA = str(SELECTION["PAIRS"][0]), 0.5
SIZES: tuple[int, ...] = SELECTION["SIZES"]
MIDDLE, LAST = 32, 256
"""Values of n that are compared; the win rate needs a sample that is not among the n."""
COLOURS: dict[str, Colour] = {"Best-of-n": "orange", "pessimism": "green"}


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Compute gold score and win rate of Best-of-n and of pessimism, by the reward model of the fewest comparisons."""
    rows = []
    for seed, run in SELECTION["run_each"](scale, seeds, workdir).items():
        pool = SELECTION["pool"](run)
        reward, gold = pool[MODEL], pool["gold"]
        wins = win_chances(gold)
        for n in (n for n in SIZES if n < gold.shape[1]):
            best = (best_of_n(reward, gold, n), best_of_n_win_rate(reward, gold, n))
            cautious = (pessimistic(reward, gold, n), pessimistic(reward, wins, n))
            for name, (got, won) in (("Best-of-n", best), ("pessimism", cautious)):
                rows.append({"seed": seed, "method": name, "n": n, "gold": got.mean(), "win_rate": won.mean()})
    return pd.DataFrame(rows)


def win_chances(gold: np.ndarray) -> np.ndarray:
    """Share of a prompt's other samples with a lower gold score, ties counting half: [prompts, samples]."""
    shares = []
    for row in gold:
        ordered = np.sort(row)
        below, up_to = np.searchsorted(ordered, row, "left"), np.searchsorted(ordered, row, "right")
        shares.append((below + (up_to - below - 1) / 2) / (len(row) - 1))
    return np.array(shares)


def pessimistic(reward: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Expected value of the pessimistic choice for each prompt, averaged over disjoint groups of n samples."""
    groups = reward.shape[1] // n
    shape = (len(reward), groups, n)
    scores, kept = reward[:, : groups * n].reshape(shape), values[:, : groups * n].reshape(shape)
    return np.mean(np.sum(weights(scores) * kept, axis=2), axis=1)


def weights(scores: np.ndarray) -> np.ndarray:
    r"""Probability of each of n samples, proportional to $\max(0, r - \lambda)$ with mean $\beta$ over the n.

    With the k highest scores above $\lambda$, $\sum_{i \le k} (r_i - \lambda) = n \beta$: the largest k is taken for
    which its lowest score is still above $\lambda$.
    """
    n = scores.shape[-1]
    ordered = -np.sort(-scores, axis=-1)
    count = np.arange(1, n + 1)
    thresholds = (np.cumsum(ordered, axis=-1) - n * BETA) / count
    largest = np.sum(ordered > thresholds, axis=-1, keepdims=True) - 1
    excess = np.maximum(0.0, scores - np.take_along_axis(thresholds, largest, axis=-1))
    return excess / excess.sum(axis=-1, keepdims=True)


def at(table: pd.DataFrame, method: str, n: int, column: str = "gold") -> np.ndarray:
    """Gold gain or win rate with n samples, for each seed."""
    return per_seed(table, column, method=method, n=n)


def change(table: pd.DataFrame, method: str, column: str = "gold") -> np.ndarray:
    """Change from 32 to 256 samples, for each seed."""
    return at(table, method, LAST, column) - at(table, method, MIDDLE, column)


def exchanged(table: pd.DataFrame) -> pd.DataFrame:
    """Exchange the methods, and let both rise with n."""
    other = {"Best-of-n": "pessimism", "pessimism": "Best-of-n"}
    rising = np.log(table["n"])
    return table.assign(method=table["method"].map(other), gold=rising, win_rate=0.5 + rising / 20)


def draw(table: pd.DataFrame) -> Figure:
    """Draw gold gain and win rate of both methods against n, a thin line for each seed."""
    figure, axes = style.panels(2, 3.0)
    for panel, column, heading in zip(axes, ("gold", "win_rate"), ("Gold gain", "Win rate"), strict=True):
        for method, colour in COLOURS.items():
            own = table[table["method"] == method]
            for _, rows in own.groupby("seed"):
                panel.plot(rows["n"], rows[column], lw=0.7, alpha=0.5, color=style.PALETTE[colour])
            mean = own.groupby("n")[column].mean()
            panel.plot(mean.index, mean, "o-", ms=3, color=style.PALETTE[colour], label=method)
        panel.set_xscale("log", base=2)
        shown = (1, 4, 16, 64, 256)
        panel.set_xticks(shown, [str(n) for n in shown])
        panel.set_xlabel("n")
        panel.set_title(heading)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


PAPER = Paper(
    title="Is Best-of-N the best of them? Coverage, scaling, and optimality in inference-time alignment",
    source="arXiv:2503.21878",
    figure="Figure 1",
    question="reward model alone",
    scales={
        "cpu": Scale(
            seeds=5,
            settings=training.settings_of(SELECTION["config"](smoke=False)),
            cost="as gao_2022, which shares its stages",
        ),
        "smoke": Scale(seeds=2, settings=training.settings_of(SELECTION["config"](smoke=True)), cost="a minute or two"),
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="Best-of-N by a poor reward model falls at large N",
            statement="the performance of Best-of-N degrades when N is large",
            number="Figure 1",
            statistic=lambda table: change(table, "Best-of-n"),
            unit="change in gold gain from n = 32 to 256",
            criterion=Below(0.0),
            null=exchanged,
        ),
        Claim(
            name="pessimism does not fall at large N",
            statement="inference-time pessimism does not degrade with more computation",
            number="Figure 1",
            statistic=lambda table: change(table, "pessimism"),
            unit="change in gold gain from n = 32 to 256",
            criterion=Within(0.0, 0.1),
            null=exchanged,
        ),
        Claim(
            name="pessimism beats Best-of-N at large N",
            statement="pessimism is better than Best-of-N where the reward model is poor",
            number="Figure 1",
            statistic=lambda table: at(table, "pessimism", LAST, "win_rate") - at(table, "Best-of-n", LAST, "win_rate"),
            unit="difference in win rate at n = 256",
            criterion=Above(0.0),
            null=lambda table: table.assign(win_rate=0.5),
        ),
    ),
)
