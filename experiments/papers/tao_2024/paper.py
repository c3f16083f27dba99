"""Tao & Li 2024 (arXiv:2409.08813), "Your weak LLM is secretly a strong teacher for alignment".

Figure: Figure 2: quality of a policy aligned by labels of weak judges of several sizes, and by human labels.
Command: rlhf-jax reproduce tao_2024
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 5, each with its own tokenizer, SFT policy, gold pairs and judges. Differences are paired within a seed.
Judge and batch: gold judge (TF-IDF ridge on people's ratings); 64 pairs per update; tokens per update are in
record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: the judges are reward models from scratch of 2 to 77 thousand parameters, trained on half of the pairs that
have gold labels, instead of OPT-125M to 13B aligned on half of the human labels; they label as many new pairs as there
are gold pairs. The policy has 77 thousand parameters. Gold labels are drawn from Bradley-Terry probabilities, as those
of a noisy person; the weak judge's have no added noise, as in the paper. DPO at beta 0.1 for half an epoch.

Pilot, before the run: with the quickstart's learning rate of 3e-4, DPO at beta 0.1 moved by only 0.2 to 0.5 nats in the
60 updates of this smaller task (one seed, judges of tao_2024), and gained 0.1, twice the standard error of a point. The
rate of all policies was then raised to 1e-3.

Power, before the run: three seeds of the quickstart differ with a standard deviation of 0.11 in DPO's gain. If
differences between judges within a seed vary as much, five seeds show 0.18 alone, and about 0.3 as one of six claims
(Holm); the slope of four judges over 1.5 decades of size has about that error, so that equivalence within 0.15 per
decade is shown only if judges vary less than this within a seed.

Found: the gain rises by 0.19 [0.10, 0.28] per factor 10 of the judge's size, and the smallest judge's labels gain 0.24
[0.17, 0.32] less than gold labels; neither is outside its margin once six claims share an error rate. Labels of a
judge of the policy's size and gold labels do not differ significantly.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Claim, Within
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper
from rlhf_jax.reports import style
from rlhf_jax.reports.run import Run

REVIEWS = runpy.run_path(str(Path(__file__).parents[1] / "movie_reviews.py"))

WIDTHS = (2, 8, 24, 48)
"""Widths of the judges; the policy's is 48."""


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    found = REVIEWS["task"](smoke=smoke)
    add, with_fields = REVIEWS["add"], REVIEWS["with_fields"]
    add(found, "dpo_people", REVIEWS["dpo"](smoke=smoke, checkpoints=1000))
    for width in WIDTHS:
        judge = with_fields(found.reward_model, {"epochs": 0.5})
        judge.model.update({"d_model": width, "d_ff": 4 * width, "n_heads": min(4, width // 2)})
        add(found, f"judge_{width}", judge)
        by_judge = {"judge": None, "reward_model": f"judge_{width}", "label_beta": None}
        add(found, f"labels_{width}", with_fields(found.preferences, by_judge))
        add(found, f"dpo_{width}", REVIEWS["dpo"](smoke=smoke, checkpoints=1000, preferences=f"labels_{width}"))
    add(found, "coin", with_fields(found.preferences, {"label_beta": 0.0}))
    add(found, "dpo_coin", REVIEWS["dpo"](smoke=smoke, checkpoints=1000, preferences="coin"))
    policies = ("dpo_people", *(f"dpo_{width}" for width in WIDTHS), "dpo_coin")
    add(found, "frontier", REVIEWS["frontier"](policies, smoke=smoke, prompts=400))
    REVIEWS["set_rate"](found, 1e-3)
    return found


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train judges, and a policy on the labels of each."""
    runs = training.run_each(config(smoke=scale == "smoke"), seeds, workdir, shared=REVIEWS["SHARED"])
    return pd.concat([rows(seed, run) for seed, run in runs.items()], ignore_index=True)


def rows(seed: int, run: Run) -> pd.DataFrame:
    """Collect each policy's gold score, with its judge's parameters and agreement with the gold judge."""
    points = run.points("frontier")
    policy = parameters(run.load_policy("sft").params)
    for width in WIDTHS:
        model = run.load_reward_model(f"judge_{width}")
        own = points["method"] == f"dpo_{width}"
        points.loc[own, "share"] = parameters(model.params) / policy
        points.loc[own, "agreement"] = run.metrics(f"judge_{width}")["eval/judge_agreement"].dropna().iloc[-1]
    return points.assign(seed=seed)[["seed", "method", "kl", "gold", "gold_se", "share", "agreement"]]


def parameters(tree: object) -> int:
    """Count the parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def values(table: pd.DataFrame, method: str, column: str = "gold") -> np.ndarray:
    """Select one method's values, one per seed."""
    return per_seed(table, column, method=method)


def slopes(table: pd.DataFrame) -> np.ndarray:
    """Least-squares slope of the gold score over the logarithm of the judge's size, for each seed."""
    judged = table[table["share"].notna()]
    return np.array([np.polyfit(np.log10(own["share"]), own["gold"], 1)[0] for _, own in judged.groupby("seed")])


def without_effect(table: pd.DataFrame) -> pd.DataFrame:
    """Give every policy the gold score of SFT, and every judge the same agreement."""
    return REVIEWS["without_effect"](table).assign(agreement=0.5)


def by_size(table: pd.DataFrame) -> pd.DataFrame:
    """Add the judge's size in decades to every score, and lower those of the smallest judge and raise the coin's."""
    shift = np.log10(table["share"].fillna(1.0)) - (table["method"] == "dpo_2") + (table["method"] == "dpo_coin")
    return table.assign(gold=table["gold"] + shift)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the gold score over the size of the judge, and the judges' agreement with the gold judge."""
    figure, (left, right) = style.panels(2, 3.0)
    judged = table[table["share"].notna()]
    for _, own in judged.groupby("seed"):
        left.plot(own["share"], own["gold"], "o-", ms=4, lw=0.8, alpha=0.6, color=style.PALETTE["blue"])
        right.plot(own["share"], own["agreement"], "o-", ms=4, lw=0.8, alpha=0.6, color=style.PALETTE["pink"])
    for method, colour, label in (
        ("dpo_people", "orange", "gold labels"),
        ("dpo_coin", "sky", "labels by a coin"),
        ("sft", "grey", "SFT"),
    ):
        left.axhline(values(table, method).mean(), ls="--", lw=1.2, color=style.PALETTE[colour], label=label)
    left.plot([], [], "o-", ms=4, lw=0.8, color=style.PALETTE["blue"], label="labels by a judge, one line a seed")
    left.set_title("Gold score of DPO")
    right.set_title("Judge agrees with gold")
    for panel in (left, right):
        panel.set_xscale("log")
        panel.set_xticks((0.03, 0.1, 0.3, 1.0), ("3 %", "10 %", "30 %", "100 %"))
        panel.minorticks_off()
        panel.set_xlabel("parameters of the judge / policy's")
    left.legend(fontsize=7, frameon=False, loc="center right")
    return figure


PAPER = Paper(
    title="Your weak LLM is secretly a strong teacher for alignment",
    source="arXiv:2409.08813",
    figure="Figure 2",
    question="weak judge",
    scales=training.scales(config, seeds=5, cost="about a minute of one core per seed, an estimate"),
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="labels of the smallest judge improve on SFT",
            statement="feedback of a weak model aligns a stronger one",
            number="abstract",
            statistic=lambda table: values(table, "dpo_2") - values(table, "sft"),
            unit="gain in gold score",
            criterion=Above(0.0),
            null=without_effect,
        ),
        Claim(
            name="labels of the smallest judge rival gold labels",
            statement="feedback of a weak model rivals or exceeds fully human-annotated feedback",
            number="abstract",
            statistic=lambda table: values(table, "dpo_2") - values(table, "dpo_people"),
            unit="difference in gold score",
            criterion=Above(-0.15),
            null=by_size,
        ),
        Claim(
            name="labels of a judge of the policy's size rival gold labels",
            statement="feedback of a weak model rivals or exceeds fully human-annotated feedback",
            number="abstract",
            statistic=lambda table: values(table, "dpo_48") - values(table, "dpo_people"),
            unit="difference in gold score",
            criterion=Above(-0.15),
            null=lambda table: table.assign(gold=table["gold"] - (table["method"] == "dpo_48")),
        ),
        Claim(
            name="the judge's size hardly matters",
            statement="the size of the model that gives feedback has a minimal effect",
            number="abstract",
            statistic=slopes,
            unit="gold score per decade of the judge's size",
            criterion=Within(0.0, 0.15),
            null=by_size,
        ),
        Claim(
            name="larger judges agree more with the gold judge",
            statement="judges of different size differ in quality (our check that the comparison is not empty)",
            number="-",
            statistic=lambda table: values(table, "dpo_48", "agreement") - values(table, "dpo_2", "agreement"),
            unit="difference in the share of held-out pairs",
            criterion=Above(0.0),
            null=without_effect,
        ),
        Claim(
            name="labels by a coin gain nothing",
            statement="labels without a judge carry no preference (our control)",
            number="-",
            statistic=lambda table: values(table, "dpo_coin") - values(table, "sft"),
            unit="gain in gold score",
            criterion=Within(0.0, 0.2),
            null=by_size,
        ),
    ),
)
