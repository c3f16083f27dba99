"""Huang et al. 2024 (arXiv:2403.17031), "The N+ implementation details of RLHF with PPO": each detail switched off.

Figure: details 19 and 22 to 25, and the clips, Adam's epsilon and the schedule of the table of PPO's settings.
Command: rlhf-jax reproduce huang_2024
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 5, each with its own tokenizer, SFT policy, preferences and reward model. Differences are paired within a seed:
all variants of PPO start from the same SFT policy and reward model.
Judge and batch: gold judge (TF-IDF ridge on people's ratings); 128 responses per iteration, four epochs of one
minibatch, as in the paper; 64 pairs per update of DPO; tokens per update are in record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: a transformer of 77 thousand parameters on sentences of at most 24 response tokens, not Pythia of 1 to 6.9B
on summaries of 53; temperature 1 instead of 0.7. The gold judge takes the place of GPT-3.5 in all win rates. The reward
model's scores are normalised to mean 0 and variance 1 on samples of the SFT policy; the paper shifts the mean of the
reference summaries to 0. 160 updates at a learning rate of 1e-3, the other papers' here, which was not tuned; DPO has
the rate that rafailov_2023_tuned selected. Details of tokenisation and padding, and the absence of dropout, are not
switched off. Source: the paper's list of details as other documents summarise it; the paper's text was not at hand.

The paper reports the effect of two details: whitened rewards give shorter responses that are preferred less often, but
as often at equal length; and DPO's implicit reward is less accurate than a reward model. The score of -1 for responses
without EOS makes it worth the policy's while to end. The other details are listed without an ablation. The criterion
for these is that PPO scores higher with the detail than without it, at the end of training. `no_details` lacks all of
them at once, but has the EOS trick, which changes the reward rather than how it is maximised.

Pilot, before the run: seed 100, which is not among the seeds, with scores that were not normalised. PPO with all
details ended at a gold score of 1.2 and 8 nats, and 98 % of its responses were shorter than 24 tokens; without any, the
EOS trick among them, at 1.6, 12 nats and 8 %. The EOS trick was then taken out of the comparison of all details.

Power, before the run: methods of ahmadian_2024 differ with a standard deviation of 0.06 to 0.3 between seeds. With
0.15, five seeds show a difference in gold score of 0.25 alone, and of 0.67 as one of 60 claims of this question (Holm).
If win rates deviate by 0.03, they show 0.05 alone and 0.13 among 60.

Found (5 seeds, commit 79c57ca, 2026-11-30, results/cpu): three effects are clear. The EOS trick raises the share of
responses under 24 tokens by 91 points [87, 95]. The decay of the learning rate costs 1.25 [1.03, 1.47] in gold score,
and all six details together cost 0.69 [0.56, 0.81]: contradicted, as 160 updates are too few for a rate that decays,
and a constant one moves 18 nats instead of 9, where the gold score still rises. In every seed, values from the reward
model add 0.26 [0.14, 0.38] and whitened advantages 0.37 [0.17, 0.57], and whitened rewards shorten responses by 3.1
tokens [1.8, 4.4]; these are inconclusive among this question's claims. Clips and Adam's epsilon have no visible effect.
Contrary to the paper, whitened rewards do not lose (54 % [49, 60] of prompts) and win at equal length (61 % [58, 64]),
both inconclusive. PPO wins 87 % [80, 94] against SFT at equal length. DPO's implicit reward is 3.4 points [2.2, 4.6]
less accurate than the reward model, at a selected rate too. Values of four seeds were seen while the fifth ran, after
the claims were committed.

Learning rate: 1e-3 was not tuned, and the first three details and the comparison of all depend on how far PPO moves in
its 40 iterations. With fewer nats, a variant without a detail may score less without being worse at equal divergence.
"""

import runpy
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper
from rlhf_jax.reports import style
from rlhf_jax.reports.run import Run

REVIEWS = runpy.run_path(str(Path(__file__).parents[1] / "movie_reviews.py"))

DETAILS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "values_from_policy": (
        "values start from the reward model",
        {"value_trunk": "policy", "value_head": "zero"},
        {},
    ),
    "plain_advantages": ("advantages are whitened", {"whiten_advantages": False}, {}),
    "constant_rate": ("the learning rate decays", {}, {"schedule": "constant"}),
    "small_epsilon": ("Adam's epsilon is 1e-5", {}, {"epsilon": 1e-8}),
    "free_values": ("values are clipped", {"value_clip": None}, {}),
    "free_ratios": ("ratios are clipped", {"clip_ratio": 1e6}, {}),
}
"""Variant of PPO -> the detail that it lacks, the fields that switch it off, and those of the optimiser."""

OTHERS: dict[str, dict[str, Any]] = {
    "no_eos_trick": {"missing_eos_score": None},
    "whitened_rewards": {"whiten_rewards": True},
}
LABELS = {
    "sft": "SFT",
    "ppo": "PPO, all details",
    "values_from_policy": "values from the policy",
    "plain_advantages": "advantages not whitened",
    "constant_rate": "constant learning rate",
    "small_epsilon": "Adam's epsilon 1e-8",
    "free_values": "values not clipped",
    "free_ratios": "ratios not clipped",
    "no_details": "none of these six",
    "no_eos_trick": "no EOS trick",
    "whitened_rewards": "whitened rewards",
    "dpo": "DPO",
}
ACCURACIES = {"1B": 62.8, "2.8B": 66.9, "6.9B": 68.9}
"""Accuracy of the paper's reward models in percent; it gives DPO's as a curve."""

TOKENS = 24


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    found, add = REVIEWS["task"](smoke=smoke), REVIEWS["add"]
    tokens = 12 if smoke else TOKENS
    found.data.max_response_tokens = tokens
    found.reward_model.normalise = ConfigDict({"policy": "sft", "prompts": 64 if smoke else 1000})
    variants = {name: (fields, optimizer) for name, (_, fields, optimizer) in DETAILS.items()}
    everything: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for fields, optimizer in variants.values():
        everything = everything[0] | fields, everything[1] | optimizer
    variants |= {"ppo": ({}, {}), "no_details": everything} | {name: (fields, {}) for name, fields in OTHERS.items()}
    for name, (fields, optimizer) in variants.items():
        add(found, name, ppo(fields, optimizer, smoke=smoke))
    add(found, "dpo", REVIEWS["dpo"](smoke=smoke, checkpoints=1000, epochs=1.0))
    found.dpo.optimizer.learning_rate = 3e-3
    evaluation = {
        "kind": "evaluate",
        "reference": "sft",
        "policies": (*(name for name in variants if name != "ppo"), "dpo"),
        "against": ("ppo",),
        "best_of": (),
        "reward_model": "reward_model",
        "judge": "gold",
        "prompts": 64 if smoke else 1000,
        "selection_prompts": 16,
        "temperature": 1.0,
    }
    add(found, "evaluate", ConfigDict(evaluation))
    return found


def ppo(fields: dict[str, Any], optimizer: dict[str, Any], *, smoke: bool) -> ConfigDict:
    """Section of PPO with all details, and some fields changed."""
    details = {"kl_coef": 0.05, "epochs": 4, "minibatches": 1, "missing_eos_score": -1.0, "value_head": "reward_model"}
    section = REVIEWS["ppo"](smoke=smoke, iterations=40, checkpoints=1000, **details | fields)
    section.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 0, **optimizer})
    return section


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train every variant of PPO, and DPO, and score one response of each policy to every test prompt."""
    runs = training.run_each(config(smoke=scale == "smoke"), seeds, workdir, shared=REVIEWS["SHARED"])
    return pd.concat([rows(seed, run) for seed, run in runs.items()], ignore_index=True)


def rows(seed: int, run: Run) -> pd.DataFrame:
    """Collect the results of one seed.

    Win rates are against the SFT policy, and in columns with `against` against PPO with all details; those with `lc`
    are at equal length. `ended` is the share of responses that are shorter than the limit.
    """
    found = run.results().rename(columns={"gold_score": "gold", "lc_win_rate": "lc_win"})
    other = run.win_rates()
    other = other[other["against"] == "ppo"].set_index("method")
    limit = run.data("evaluate").max_response_tokens
    short = run.samples("evaluate").groupby("method")["length"].apply(lambda lengths: float(np.mean(lengths < limit)))
    found["ended"] = found["method"].map(short)
    for name in ("win_rate", "lc_win_rate"):
        found[f"{name.removesuffix('_rate')}_against"] = found["method"].map(other[name])
    explicit = {"method": "reward_model", "accuracy": 100 * run.summary("reward_model")["accuracy"]}
    implicit = run.metrics("dpo")["eval/rewards/accuracies"].dropna().iloc[-1]
    found.loc[found["method"] == "dpo", "accuracy"] = 100 * implicit
    found = pd.concat([found, pd.DataFrame([explicit])], ignore_index=True).assign(seed=seed)
    columns = ["seed", "method", "gold", "gold_se", "kl", "length", "ended", "win_rate", "lc_win"]
    return found[[*columns, "win_against", "lc_win_against", "accuracy"]]


def of(table: pd.DataFrame, method: str, column: str = "gold") -> np.ndarray:
    """Value of a method, for each seed."""
    return per_seed(table, column, method=method)


def effect(table: pd.DataFrame, variant: str, column: str = "gold") -> np.ndarray:
    """PPO with all details minus a variant, for each seed."""
    return of(table, "ppo", column) - of(table, variant, column)


def without_effect(table: pd.DataFrame) -> pd.DataFrame:
    """Let all policies be alike, win half of all comparisons, and those at equal length with PPO nearly always."""
    alike = REVIEWS["without_effect"](table)
    same = {column: 0.5 for column in ("ended", "win_rate", "lc_win", "win_against")}
    return alike.assign(length=10.0, accuracy=65.0, lc_win_against=0.9, **same)


def details(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of every variant's results."""
    columns = {
        "gold score": ("gold", 1),
        "KL, nats": ("kl", 1),
        "tokens": ("length", 1),
        "under the limit, %": ("ended", 100),
        "wins against SFT, %": ("win_rate", 100),
        "against PPO, %": ("win_against", 100),
        "the same at equal length, %": ("lc_win_against", 100),
    }
    lines = []
    for name, label in LABELS.items():
        line = {"policy": label}
        for heading, (column, scale) in columns.items():
            values = scale * of(table, name, column)
            digits = 0 if scale == 100 else 2 if column == "gold" else 1
            known = np.isfinite(values).all()
            line[heading] = f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}" if known else ""
        lines.append(line)
    return pd.DataFrame(lines)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the gain by every detail, lengths, and accuracies, with a dot for each seed."""
    figure, (left, middle, right) = style.panels(3, 3.2, width_ratios=(1.2, 0.9, 0.8))
    gains = {textwrap.fill(detail, 20): effect(table, name) for name, (detail, _, _) in DETAILS.items()}
    gains["all of these"] = effect(table, "no_details")
    lengths = {
        textwrap.fill(LABELS[name], 10): of(table, name, "length")
        for name in ("sft", "ppo", "whitened_rewards", "no_eos_trick")
    }
    for panel, found in ((left, gains), (middle, lengths)):
        for place, values in enumerate(found.values()):
            panel.plot(values, np.full(len(values), place), "o", ms=4, alpha=0.6, color=style.PALETTE["blue"])
            panel.plot(values.mean(), place, "|", ms=14, mew=2, color=style.INK)
        panel.set_yticks(range(len(found)), list(found), fontsize=7)
        panel.set_ylim(len(found) - 0.5, -0.5)
    left.axvline(0, lw=0.8, color=style.MUTED)
    left.set_xlabel("gold score with - without")
    left.set_title("Details of PPO")
    middle.set_xlabel("tokens per response")
    middle.set_title("Length")
    for place, name in enumerate(("reward_model", "dpo")):
        values = of(table, name, "accuracy")
        right.plot(np.full(len(values), place), values, "o", ms=4, alpha=0.6, color=style.PALETTE["blue"])
    for size, accuracy in ACCURACIES.items():
        right.plot(0, accuracy, "_", ms=12, mew=2, color=style.PALETTE["orange"])
        right.annotate(f"paper, {size}", (0.16, accuracy), fontsize=6, va="center", color=style.PALETTE["orange"])
    right.set_xticks((0, 1), ("reward\nmodel", "DPO,\nimplicit"))
    right.set_xlim(-0.5, 1.5)
    right.set_title("Accuracy, %")
    return figure


PAPER = Paper(
    title="The N+ implementation details of RLHF with PPO: a case study on TL;DR summarization",
    source="arXiv:2403.17031",
    figure="Details 19 and 22 to 25, and the table of PPO's settings",
    question="foundations",
    scales=training.scales(config, seeds=5, cost="ten minutes of one core per seed beside other programs"),
    measure=measure,
    draw=draw,
    details=details,
    claims=(
        *(
            Claim(
                name=f"PPO is better if {detail}",
                statement="one of the details that RLHF's success depends on",
                number="-",
                statistic=lambda table, name=name: effect(table, name),
                unit="difference in gold score",
                criterion=Above(0.0),
                null=without_effect,
            )
            for name, (detail, _, _) in DETAILS.items()
        ),
        Claim(
            name="PPO with all of these details is better than with none",
            statement="details have a significant impact on training",
            number="-",
            statistic=lambda table: effect(table, "no_details"),
            unit="difference in gold score",
            criterion=Above(0.0),
            null=without_effect,
        ),
        Claim(
            name="the EOS trick makes responses end",
            statement="responses without EOS get a score of -1, so that scores are those of complete responses",
            number="-",
            statistic=lambda table: effect(table, "no_eos_trick", "ended"),
            unit="difference in the share of responses under the limit of tokens",
            criterion=Above(0.0),
            null=without_effect,
        ),
        Claim(
            name="whitened rewards make responses shorter",
            statement="reward whitening makes the outputs shorter",
            number="-",
            statistic=lambda table: -effect(table, "whitened_rewards", "length"),
            unit="difference in tokens",
            criterion=Below(0.0),
            null=without_effect,
        ),
        Claim(
            name="whitened rewards lose against plain ones",
            statement="reward whitening lowers the preference rate",
            number="-",
            statistic=lambda table: of(table, "whitened_rewards", "win_against"),
            unit="share of prompts won",
            criterion=Below(0.5),
            null=without_effect,
        ),
        Claim(
            name="at equal length whitened rewards are as good",
            statement="with length controlled, the preference rates are similar",
            number="-",
            statistic=lambda table: of(table, "whitened_rewards", "lc_win_against"),
            unit="length-controlled share of prompts won",
            criterion=Within(0.5, 0.1),
            null=without_effect,
        ),
        Claim(
            name="PPO beats SFT at equal length",
            statement="PPO models outperform SFT models at all lengths",
            number="-",
            statistic=lambda table: of(table, "ppo", "lc_win"),
            unit="length-controlled share of prompts won",
            criterion=Above(0.5),
            null=without_effect,
        ),
        Claim(
            name="DPO's implicit reward is less accurate than the reward model",
            statement="DPO's implicit reward modelling has a lower validation accuracy than a reward model",
            number="reward models .628, .669 and .689",
            statistic=lambda table: of(table, "dpo", "accuracy") - of(table, "reward_model", "accuracy"),
            unit="difference in points of accuracy on held-out pairs",
            criterion=Below(0.0),
            null=without_effect,
        ),
    ),
)
