"""Coste et al. 2023 (arXiv:2310.02743), "Reward model ensembles help mitigate overoptimization": Best-of-N.

Figure: Figure 3, gold score of Best-of-N for single reward models and for ensembles, with 25 % of labels flipped.
Command: rlhf-jax reproduce coste_2023
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 5, each with its own policy, comparisons, ensemble and samples. The selectors are compared on the same samples.
Judge and batch: gold judge (TF-IDF ridge on people's ratings); 64 comparisons per update, two passes; tokens per update
are in record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: reward models of one layer and width 48 on 2,700 comparisons instead of 44M to 1.3B parameters on 46,000;
members differ in initialisation and order of the data, without pretraining; n to 512 instead of 12,500; a gold judge
that is nearly additive in words. Scores are standardised by member; UWO subtracts half of the members' variance.
Only Best-of-N is measured, not PPO.

"Single" is the mean of the members' own curves. The late slope is the gold gain of Best-of-512 minus that of
Best-of-32, per nat of divergence.

Power, before the run: a pilot (seed 100, 40 prompts, n to 1,024; not among the seeds) gave gains at n = 512 of 0.77 for
a single model, 1.00 for the mean, 0.98 for WCO and 0.99 for UWO. With deviations between seeds of 0.1 in a difference,
five seeds show 0.16 alone, and about 0.35 as one of 20 claims (Holm).

Found: the gold score of single models does not fall up to n = 512 but rises by 0.08 per nat, so that there is no
over-optimisation to prevent: this claim is contradicted, and the differences of late slopes are inconclusive. All
combinations select better than single models on average (UWO 0.96, mean 0.90, WCO 0.81, single 0.72 at n = 512), but
WCO's advantage varies between seeds. The paper's n is 24 times larger.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core.ensembles import mean, uncertainty_weighted, worst_case
from rlhf_jax.core.selection import best_of_n_kl
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style
from rlhf_jax.stages.kinds import Colour

SELECTION = runpy.run_path(str(Path(__file__).parents[1] / "selection.py"))
COEFFICIENT = 0.5
COLOURS: dict[str, Colour] = {"single": "grey", "mean": "blue", "WCO": "green", "UWO": "violet"}
MIDDLE, LAST = 32, 512


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train the ensemble, and compute the gold score of Best-of-n by its members and by their combinations."""
    rows = []
    for seed, run in SELECTION["run_each"](scale, seeds, workdir).items():
        pool = SELECTION["pool"](run)
        gold, members = pool["gold"], pool["noisy"]
        by_row = jnp.asarray(members.reshape(len(members), -1), jnp.float32)
        combined = {
            "mean": mean(by_row),
            "WCO": worst_case(by_row),
            "UWO": uncertainty_weighted(by_row, variance_coefficient=COEFFICIENT),
        }
        curves = {name: SELECTION["gains"](np.reshape(scores, gold.shape), gold) for name, scores in combined.items()}
        curves["single"] = np.mean([SELECTION["gains"](scores, gold) for scores in members], axis=0)
        for name, gains in curves.items():
            rows += [
                {"seed": seed, "selector": name, "n": n, "gold": gain}
                for n, gain in zip(SELECTION["SIZES"], gains, strict=True)
            ]
    return pd.DataFrame(rows)


def at(table: pd.DataFrame, selector: str, n: int) -> np.ndarray:
    """Gold gain of Best-of-n, for each seed."""
    return per_seed(table, "gold", selector=selector, n=n)


def late_slope(table: pd.DataFrame, selector: str) -> np.ndarray:
    """Change of the gold gain per nat from Best-of-32 to Best-of-512, for each seed."""
    nats = float(best_of_n_kl(LAST) - best_of_n_kl(MIDDLE))
    return (at(table, selector, LAST) - at(table, selector, MIDDLE)) / nats


def same(table: pd.DataFrame) -> pd.DataFrame:
    """Give every selector the curve of the single models."""
    single = table[table["selector"] == "single"].set_index(["seed", "n"])["gold"]
    return table.assign(gold=[single[seed, n] for seed, n in zip(table["seed"], table["n"], strict=True)])


def draw(table: pd.DataFrame) -> Figure:
    """Draw mean curves against the divergence, and the late slope of every seed."""
    figure, (left, right) = style.panels(2, 3.2, width_ratios=(1.5, 1))
    divergence, labels = SELECTION["KL"], []
    for place, (name, colour) in enumerate(COLOURS.items()):
        gold = table[table["selector"] == name].groupby("n")["gold"].mean().to_numpy()
        left.plot(divergence, gold, "o-", ms=3, color=style.PALETTE[colour])
        labels.append(style.EndLabel(gold[-1], name, style.PALETTE[colour]))
        slopes = late_slope(table, name)
        right.plot(np.full(len(slopes), place), slopes, "o", ms=4, alpha=0.6, color=style.PALETTE[colour])
        right.plot(place, slopes.mean(), "_", ms=14, mew=2, color=style.INK)
    style.scale_by_root(left)
    left.set_xlabel("KL of Best-of-n (bound), nats")
    left.set_title("Gold gain, 25 % of labels flipped")
    style.label_ends(left, labels)
    right.axhline(0, lw=0.8, color=style.MUTED)
    right.set_xlim(-0.5, len(COLOURS) - 0.5)
    right.set_xticks(range(len(COLOURS)), list(COLOURS))
    right.set_title("Late slope, per nat")
    return figure


PAPER = Paper(
    title="Reward model ensembles help mitigate overoptimization",
    source="arXiv:2310.02743",
    figure="Figure 3",
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
            name="a single reward model is over-optimised",
            statement="with label noise, the gold score of Best-of-N by a single reward model falls at large n",
            number="Figure 3",
            statistic=lambda table: late_slope(table, "single"),
            unit="late slope of the gold gain, per nat",
            criterion=Below(0.0),
            null=lambda table: table.assign(gold=table["gold"] * np.where(table["n"] == LAST, 2, 1)),
        ),
        Claim(
            name="worst-case optimisation falls less",
            statement="WCO practically eliminates over-optimisation",
            number="Figure 3",
            statistic=lambda table: late_slope(table, "WCO") - late_slope(table, "single"),
            unit="difference of late slopes, per nat",
            criterion=Above(0.0),
            null=same,
        ),
        Claim(
            name="uncertainty-weighted optimisation falls less",
            statement="UWO practically eliminates over-optimisation",
            number="Figure 3",
            statistic=lambda table: late_slope(table, "UWO") - late_slope(table, "single"),
            unit="difference of late slopes, per nat",
            criterion=Above(0.0),
            null=same,
        ),
        Claim(
            name="an ensemble by its worst member selects better than a single model",
            statement="conservative optimisation improves Best-of-N, by up to 75 % with label noise",
            number="up to 75 %",
            statistic=lambda table: at(table, "WCO", LAST) - at(table, "single", LAST),
            unit="difference in gold gain of Best-of-512",
            criterion=Above(0.0),
            null=same,
        ),
        Claim(
            name="conservatism adds to averaging",
            statement="with label noise the mean of the ensemble is still over-optimised, WCO is not",
            number="Figure 3",
            statistic=lambda table: at(table, "WCO", LAST) - at(table, "mean", LAST),
            unit="difference in gold gain of Best-of-512",
            criterion=Above(0.0),
            null=same,
        ),
    ),
)
