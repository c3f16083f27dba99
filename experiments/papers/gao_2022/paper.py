r"""Gao et al. 2022 (arXiv:2210.10760), "Scaling laws for reward model overoptimization": Best-of-N, and data.

Figure: Figure 1a, gold and proxy score of Best-of-N against the root of the divergence, for several amounts of data.
Command: rlhf-jax reproduce gao_2022
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 5, each with its own policy, comparisons, reward models and samples. Sizes are compared within a seed.
Judge and batch: gold judge (TF-IDF ridge on people's ratings); 64 comparisons per update, two passes; tokens per update
are in record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: reward models of one layer and width 48, of one size; a gold judge that is nearly additive in words instead
of a reward model of 6B parameters; n to 512 instead of 60,000, for 32 prompts, by the same unbiased estimator; with
few comparisons there are also few updates, because the passes are fixed. Gains are in standard deviations of the gold
score of the policy's samples. Only Best-of-N is measured, not reinforcement learning.

For the paper, $R_{bon}(d) = d (\alpha - \beta d)$ with d the root of the divergence; the fit is by least squares over
n = 2 to 512.

Power, before the run: a pilot (seed 100, 40 prompts, n to 1,024; not among the seeds) gave gains at n = 512 of 0.95,
1.33 and 1.68 with 900, 2,700 and 8,100 comparisons. With deviations between seeds of 0.1, five seeds show a difference
of 0.16 alone, and of about 0.35 as one of 20 claims (Holm).

Found: the form fits (R² 0.998), and alpha rises by 0.42 per factor 10 of comparisons: 0.20 at 300, 0.81 at 8,100.
Contradicted: 900 comparisons give 44 % of the gain of 8,100, and 300 give 27 %, so that the threshold of 2,000 does not
hold here. The judge is nearly additive in words, of which a small model learns some from few comparisons. Beta is
0.03, too close to 0 to tell: up to n = 512 the gold score does not fall with any number of comparisons.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

SELECTION = runpy.run_path(str(Path(__file__).parents[1] / "selection.py"))
PAIRS: tuple[int, ...] = SELECTION["PAIRS"]
FEWEST, MOST = str(PAIRS[0]), str(PAIRS[-1])


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train the reward models, and compute gold and proxy scores of Best-of-n by each, and by a random selector."""
    rows = []
    for seed, run in SELECTION["run_each"](scale, seeds, workdir).items():
        pool = SELECTION["pool"](run)
        gold = pool["gold"]
        selectors = {name: pool[name] for name in (*map(str, PAIRS), "shuffled")}
        selectors["random"] = SELECTION["random_scores"](gold.shape, seed)
        for name, proxy in selectors.items():
            curves = zip(
                SELECTION["SIZES"], SELECTION["gains"](proxy, gold), SELECTION["gains"](proxy, proxy), strict=True
            )
            rows += [{"seed": seed, "model": name, "n": n, "gold": got, "proxy": its} for n, got, its in curves]
    return pd.DataFrame(rows)


def curve(table: pd.DataFrame, model: str) -> np.ndarray:
    """Gold gains of one selector, [seeds, sizes]."""
    return table[table["model"] == model].pivot(index="seed", columns="n", values="gold").to_numpy()


def fits(table: pd.DataFrame, model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit alpha and beta, and compute the share of variance explained (about the mean), for each seed."""
    gains, root = curve(table, model)[:, 1:], np.sqrt(SELECTION["KL"][1:])
    inputs = np.stack([root, -(root**2)], axis=1)
    alpha, beta = np.linalg.lstsq(inputs, gains.T, rcond=None)[0]
    rest = gains - (inputs @ np.stack([alpha, beta])).T
    return alpha, beta, 1 - np.var(rest, axis=1) / np.var(gains, axis=1)


def slope(table: pd.DataFrame) -> np.ndarray:
    """Slope of alpha in the decimal logarithm of the number of comparisons, for each seed."""
    alphas = np.stack([fits(table, str(pairs))[0] for pairs in PAIRS])
    return np.polyfit(np.log10(PAIRS), alphas, 1)[0]


def at(table: pd.DataFrame, model: str, n: int) -> np.ndarray:
    """Gold gain of Best-of-n, for each seed."""
    return curve(table, model)[:, SELECTION["SIZES"].index(n)]


def renamed(table: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """Exchange selectors."""
    return table.assign(model=table["model"].replace(names))


def draw(table: pd.DataFrame) -> Figure:
    """Draw mean gold and proxy gains against the divergence, and alpha of every seed against the comparisons."""
    figure, (left, right) = style.panels(2, 3.4, width_ratios=(1.5, 1))
    divergence = SELECTION["KL"]
    labels = []
    shown = dict(zip(map(str, PAIRS), style.shades(len(PAIRS), style.PALETTE["blue"]), strict=True))
    shown |= {"shuffled": style.PALETTE["orange"], "random": style.PALETTE["grey"]}
    for name, colour in shown.items():
        gold = curve(table, name).mean(axis=0)
        left.plot(divergence, gold, "o-" if name.isdigit() else "s-", ms=3, color=colour)
        labels.append(style.EndLabel(gold[-1], f"{int(name):,} pairs" if name.isdigit() else name, colour))
        if name.isdigit():
            alpha, beta, _ = (values.mean() for values in fits(table, name))
            root = np.sqrt(np.linspace(0, divergence[-1]))
            left.plot(root**2, root * (alpha - beta * root), ":", lw=1, color=colour)
    style.scale_by_root(left)
    left.set_xlabel("KL of Best-of-n (bound), nats")
    left.set_title("Gold gain (dots) and fit (dotted)")
    style.label_ends(left, labels)
    for pairs in PAIRS:
        alphas = fits(table, str(pairs))[0]
        right.plot(np.full(len(alphas), pairs), alphas, "o", ms=4, alpha=0.6, color=shown[str(pairs)])
    right.axvline(2000, ls="--", lw=1, color=style.PALETTE["orange"])
    right.text(2000, right.get_ylim()[0], " Gao et al.:\n little gain below", fontsize=7, va="bottom", color=style.INK)
    right.set_xscale("log")
    right.set_xticks(PAIRS, [f"{pairs:,}" for pairs in PAIRS])
    right.minorticks_off()
    right.set_xlabel("comparisons")
    right.set_title("alpha, one dot a seed")
    return figure


PAPER = Paper(
    title="Scaling laws for reward model overoptimization",
    source="arXiv:2210.10760",
    figure="Figure 1a",
    question="reward model alone",
    scales={
        "cpu": Scale(
            seeds=5,
            settings=training.settings_of(SELECTION["config"](smoke=False)),
            cost="a minute of one core per seed",
        ),
        "smoke": Scale(seeds=2, settings=training.settings_of(SELECTION["config"](smoke=True)), cost="a minute or two"),
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="the gold score of Best-of-N is d(alpha - beta d)",
            statement="the gold score as a function of the root of the divergence has the form d(alpha - beta d)",
            number="Figure 1a",
            statistic=lambda table: fits(table, MOST)[2],
            unit="R² with 8,100 comparisons",
            criterion=Above(0.95),
            null=lambda table: renamed(table, {MOST: "random", "random": MOST}),
        ),
        Claim(
            name="beta is above 0",
            statement="the gold score falls behind a straight line, and falls at last",
            number="above 0 at every size",
            statistic=lambda table: fits(table, MOST)[1],
            unit="beta with 8,100 comparisons",
            criterion=Above(0.0),
            null=lambda table: table.assign(gold=-table["gold"]),
        ),
        Claim(
            name="alpha rises with the number of comparisons",
            statement="more comparisons give a higher gold score at every divergence",
            number="Figure 6",
            statistic=slope,
            unit="slope of alpha per factor 10 of comparisons",
            criterion=Above(0.0),
            null=lambda table: renamed(table, dict(zip(map(str, PAIRS), map(str, reversed(PAIRS)), strict=True))),
        ),
        Claim(
            name="few comparisons give hardly any gain",
            statement="below about 2,000 comparisons the reward model is little better than chance",
            number="2,000",
            statistic=lambda table: at(table, "900", 512) / at(table, MOST, 512),
            unit="gain of Best-of-512 with 900 comparisons, as a share of that with 8,100",
            criterion=Below(0.25),
            null=lambda table: renamed(table, {"900": MOST, MOST: "900"}),
        ),
        Claim(
            name="a reward model of shuffled labels selects worse",
            statement="the gain is from the labels (our control)",
            number="-",
            statistic=lambda table: at(table, "2700", 64) - at(table, "shuffled", 64),
            unit="difference in gold gain of Best-of-64",
            criterion=Above(0.0),
            null=lambda table: renamed(table, {"2700": "shuffled", "shuffled": "2700"}),
        ),
        Claim(
            name="a random selector gains nothing",
            statement="Best-of-N gains by its selector alone (our control)",
            number="-",
            statistic=lambda table: at(table, "random", 16),
            unit="gold gain of Best-of-16",
            criterion=Within(0.0, 0.1),
            null=lambda table: renamed(table, {MOST: "random", "random": MOST}),
        ),
    ),
)
