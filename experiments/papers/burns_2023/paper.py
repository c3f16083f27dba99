"""Burns et al. 2023 (arXiv:2312.09390), "Weak-to-strong generalization": a reward model trained on a weak one's labels.

Figure: Figure 3, right: accuracy of reward models, weak, strong with weak labels, and strong with true labels.
Command: rlhf-jax reproduce burns_2023
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 5, each with its own SFT policy and pairs. All models of a seed are tested on the same 900 held-out pairs of 150
prompts, so that differences are paired.
Judge and batch: gold judge (TF-IDF ridge on people's ratings), whose score decides which response of a held-out pair is
better; 64 pairs per update, one pass (the weak model half a pass); tokens per update are in record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: the weak model is a transformer of width 8 from scratch, trained on gold labels; the strong ones have width
48 and start from the SFT policy, as the paper's start from a pretrained model. The weak labels are the weak model's
choices on new pairs, without its confidence; there is no auxiliary confidence loss. Gold labels are drawn from
Bradley-Terry probabilities. The paper's numbers for reward models (about a tenth of the gap recovered) are from memory.

Power, before the run: in tao_2024 a judge of width 8 agrees with the gold judge on 60 % of held-out pairs, and one of
width 48 from scratch on 68 %, with deviations of 1.2 points between seeds. If differences deviate by 1.5 points, five
seeds show 2.5 points alone, and about 6 as one of 25 claims of this question (Holm).

Found: the weak model orders 61.6 % of the held-out pairs as the gold judge does, the strong one 62.6 % with weak
labels, 69.7 % with gold labels and 47.8 % with labels by a coin. The gap is 8.2 [3.9, 12.5] points, of which the
student recovers 1.0 [-1.4, 3.4]. Among all claims of the question everything is inconclusive, the gap itself and the
control included: five seeds are too few here, as accuracies deviate by 2 to 3 points between them.
"""

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax.inference.score import score
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper
from rlhf_jax.reports import style
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_rows
from rlhf_jax.types import Row

REVIEWS = runpy.run_path(str(Path(__file__).parents[1] / "movie_reviews.py"))

WIDTH = 8
"""Width of the weak model; the strong one's is 48."""

MODELS = {
    "weak": "weak",
    "student": "strong,\nweak labels",
    "ceiling": "strong,\ngold labels",
    "coin": "strong,\nby a coin",
}
SHARE = 0.2
"""Share of the gap that the paper's reward models rarely recover more of."""


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    found = REVIEWS["task"](smoke=smoke)
    add, with_fields = REVIEWS["add"], REVIEWS["with_fields"]
    weak = with_fields(found.reward_model, {"epochs": 0.5})
    weak.model.update({"d_model": WIDTH, "d_ff": 4 * WIDTH})
    add(found, "weak", weak)
    by_weak = {"judge": None, "reward_model": "weak", "label_beta": None}
    add(found, "weak_labels", with_fields(found.preferences, by_weak))
    add(found, "coin_labels", with_fields(found.preferences, {"label_beta": 0.0}))
    for name, labels in (("student", "weak_labels"), ("ceiling", "preferences"), ("coin", "coin_labels")):
        strong = with_fields(found.reward_model, {"preferences": labels, "policy": None, "model": {"init": "sft"}})
        strong.optimizer.learning_rate = 1e-3
        add(found, name, strong)
    return found


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train the models of every seed, and test them on held-out pairs."""
    runs = training.run_each(config(smoke=scale == "smoke"), seeds, workdir, shared=REVIEWS["SHARED"])
    return pd.DataFrame([row for seed, run in runs.items() for row in rows(seed, run)])


def rows(seed: int, run: Run) -> list[Row]:
    """Share of the held-out pairs that each model of one seed orders as the gold judge does."""
    pairs = pd.DataFrame(read_rows(run.directory("preferences") / "preferences_eval.jsonl"))
    better = np.sign(pairs["chosen_score"] - pairs["rejected_score"])
    found = []
    for name in MODELS:
        model = run.load_reward_model(name)
        chosen, rejected = (
            score(model, pairs[["prompt", side]].rename(columns={side: "completion"}))["score"]
            for side in ("chosen", "rejected")
        )
        agrees = np.mean(0.5 * (1 + better * np.sign(chosen - rejected)))
        found.append({"seed": seed, "model": name, "accuracy": 100 * float(agrees)})
    return found


def at(table: pd.DataFrame, model: str) -> np.ndarray:
    """Accuracy of one model in percent, for each seed."""
    return per_seed(table, "accuracy", model=model)


def with_accuracy(model: str, other: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Make a null that gives one model the accuracy of another."""

    def null(table: pd.DataFrame) -> pd.DataFrame:
        values = table[table["model"] == other].set_index("seed")["accuracy"]
        return table.assign(accuracy=table["accuracy"].where(table["model"] != model, table["seed"].map(values)))

    return null


def draw(table: pd.DataFrame) -> Figure:
    """Draw the accuracy of every model, one line a seed."""
    figure, (panel,) = style.panels(1, 3.2)
    for _, own in table.groupby("seed"):
        line = own.set_index("model")["accuracy"]
        panel.plot(range(3), line[["weak", "student", "ceiling"]], "o-", ms=4, alpha=0.6, color=style.PALETTE["blue"])
        panel.plot(3, line["coin"], "o", ms=4, alpha=0.6, color=style.PALETTE["grey"])
    means = [at(table, name).mean() for name in MODELS]
    panel.plot(range(len(MODELS)), means, "_", ms=16, mew=2, color=style.INK)
    panel.set_xticks(range(len(MODELS)), list(MODELS.values()))
    panel.set_title("Held-out pairs ordered as by the gold judge, %")
    return figure


PAPER = Paper(
    title="Weak-to-strong generalization: eliciting strong capabilities with weak supervision",
    source="arXiv:2312.09390",
    figure="Figure 3, right",
    question="weak judge",
    scales=training.scales(config, seeds=5, cost="a minute of one core per seed, after the shared stages"),
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="a strong model trained on weak labels is better than the weak model",
            statement="strong models finetuned on labels of weak ones perform better than their weak supervisors",
            number="a gap recovered of about 10 %",
            statistic=lambda table: at(table, "student") - at(table, "weak"),
            unit="points of accuracy",
            criterion=Above(0.0),
            null=with_accuracy("student", "weak"),
        ),
        Claim(
            name="reward models recover little of the gap",
            statement="for reward models little of the gap between weak and strong is recovered",
            number="rarely more than 20 %",
            statistic=lambda table: (
                at(table, "student") - at(table, "weak") - SHARE * (at(table, "ceiling") - at(table, "weak"))
            ),
            unit="points of accuracy above a recovery of 20 %",
            criterion=Below(0.0),
            null=with_accuracy("student", "ceiling"),
        ),
        Claim(
            name="a strong model trained on gold labels is better than the weak one",
            statement="there is a gap to recover (our check that the comparison is not empty)",
            number="-",
            statistic=lambda table: at(table, "ceiling") - at(table, "weak"),
            unit="points of accuracy",
            criterion=Above(0.0),
            null=with_accuracy("ceiling", "weak"),
        ),
        Claim(
            name="labels by a coin teach nothing",
            statement="the accuracy is from the labels (our control)",
            number="-",
            statistic=lambda table: at(table, "coin"),
            unit="% of held-out pairs",
            criterion=Within(50.0, 5.0),
            null=with_accuracy("coin", "ceiling"),
        ),
    ),
)
