"""Singhal et al. 2023 (arXiv:2310.03716), "A long way to go": the share of a reward gain that is length.

Figure: Tables 2 and 3, the part of the reward gain within lengths, and a length-only reward.
Command: rlhf-jax reproduce singhal_2023
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage, which are habernal_2016's.
Seeds: 8, each a fold: a reward model is trained on 28 topics and chooses among the arguments on the other 4. Together
they test all 32 topics, which are the units of the interval.
Judge and batch: no judge, the pairs were ranked by people; 64 pairs per update, one pass; tokens per update are in
record.json.
Data: UKPConvArg1Strict, 11,650 pairs of arguments (`rlhf-jax fetch convarg`); hashes are in record.json.
Deviations: no policy is trained. People's arguments on a topic, 25 to 35 of them, take the place of a policy's samples,
and Best-of-8 by the reward model that of PPO. Lengths are in groups of 20 words; the paper's in groups of 20 tokens.
A reward is judged by people's rankings of pairs instead of a language model's.

The non-length share is the reward gain of the chosen arguments within groups of lengths, weighted by the lengths of all
arguments, over the whole gain. It is summed over the topics of a fold before dividing, as a topic has few arguments.

Power, before the run: if the shares of folds deviate by 0.15, 8 folds show a difference of 0.17. If the accuracies of
topics deviate by 0.06, 32 topics show a difference of 0.03.

Found (8 folds, 32 topics, commit 4f06639, 2026-11-30, results/cpu): all three claims are contradicted for this reward
model and these arguments. 80 % [74, 86] of the reward gain is not length, reward and length correlate by 0.22 [0.16,
0.28] on a topic, and length alone ranks 15 points [11, 19] more of people's pairs right than the reward model. The
model is the poor one of habernal_2016 (62 % of pairs), whose preference for length is weaker than people's own (77 %);
a better model may rely on length more.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core.selection import order_statistic_weights
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

CONVARG = runpy.run_path(str(Path(__file__).parents[1] / "convarg.py"))
N, GROUP = 8, 20
SHARES = {"WebGPT": 2.0, "Stack": 53.4, "RLCD": 27.2}
"""Non-length share of PPO's reward gain in the paper, in percent."""


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Compute reward gain of Best-of-8 among the arguments of a topic, its part within lengths, and accuracies."""
    rows = []
    for fold, (run, held_out) in CONVARG["run_each"](scale, seeds, workdir).items():
        score_of = CONVARG["scored"](run, held_out)
        length_of = {text: float(len(text)) for text in score_of}
        for topic in sorted({row["topic"] for row in held_out}):
            own = [row for row in held_out if row["topic"] == topic]
            texts = sorted({row[side] for row in own for side in ("chosen", "rejected")})
            reward = np.array([score_of[text] for text in texts])
            words = np.array([len(text.split()) for text in texts])
            gain, within = decomposed(reward, words, min(N, len(texts)))
            correlation = float(np.corrcoef(reward, words)[0, 1])
            accuracies = {"model": CONVARG["correct"](own, score_of), "length": CONVARG["correct"](own, length_of)}
            measured = {"gain": gain, "within_lengths": within, "correlation": correlation}
            rows.append({"seed": fold, "topic": topic, **measured, **accuracies})
    return pd.DataFrame(rows)


def decomposed(reward: np.ndarray, words: np.ndarray, n: int) -> tuple[float, float]:
    """Reward gain of the best of n over all arguments, and the part of it within the groups of lengths."""
    ranks = np.argsort(np.argsort(reward, kind="stable"))
    chosen = order_statistic_weights(len(reward), n)[ranks]
    gain, within = float(chosen @ reward - reward.mean()), 0.0
    groups = (words - 1) // GROUP
    for group in np.unique(groups):
        own = groups == group
        share = float(chosen[own].sum())
        if share > 0:
            within += own.mean() * float(chosen[own] @ reward[own] / share - reward[own].mean())
    return gain, within


def share(table: pd.DataFrame) -> np.ndarray:
    """Non-length share of the reward gain, for each fold."""
    sums = table.groupby("seed")[["gain", "within_lengths"]].sum()
    return (sums["within_lengths"] / sums["gain"]).to_numpy()


def advantage(table: pd.DataFrame) -> np.ndarray:
    """Accuracy of the reward model less that of length, in points, for each topic."""
    ordered = table.sort_values("topic")
    return 100 * (ordered["model"] - ordered["length"]).to_numpy()


def without_length(table: pd.DataFrame) -> pd.DataFrame:
    """Let all of the gain be within lengths, and length rank pairs by chance."""
    return table.assign(within_lengths=table["gain"], length=0.5, model=0.9, correlation=-table["correlation"].abs())


def draw(table: pd.DataFrame) -> Figure:
    """Draw the non-length share beside the paper's, and the correlation of reward and length on every topic."""
    figure, (left, right) = style.panels(2, 3.0, width_ratios=(1.2, 1))
    ours = 100 * share(table)
    for place, theirs in enumerate(SHARES.values()):
        left.plot(place, theirs, "_", ms=18, mew=2, color=style.PALETTE["orange"])
    left.plot(np.full(len(ours), len(SHARES)), ours, "o", ms=4, alpha=0.6, color=style.PALETTE["blue"])
    left.set_xlim(-0.5, len(SHARES) + 0.5)
    left.set_ylim(min(0.0, *ours), None)
    left.set_xticks(range(len(SHARES) + 1), [*SHARES, "arguments,\none dot a fold"])
    left.set_title("Non-length share of the reward gain, %")
    right.hist(table["correlation"], bins=12, color=style.PALETTE["blue"])
    right.set_xlabel("correlation of reward and length on a topic")
    right.set_title("Topics")
    return figure


PAPER = Paper(
    title="A long way to go: investigating length correlations in RLHF",
    source="arXiv:2310.03716",
    figure="Tables 2 and 3",
    question="poor data",
    scales={
        "cpu": Scale(
            seeds=CONVARG["FOLDS"],
            settings=training.settings_of(CONVARG["config"](smoke=False)),
            cost="as habernal_2016, which shares its stages",
        ),
        "smoke": Scale(seeds=2, settings=training.settings_of(CONVARG["config"](smoke=True)), cost="a minute"),
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="most of the reward gain is length",
            statement="reward gains are largely driven by longer outputs",
            number="2.0, 53.4 and 27.2 % are not length",
            statistic=share,
            unit="non-length share of the reward gain of Best-of-8",
            criterion=Below(0.55),
            null=without_length,
        ),
        Claim(
            name="reward and length correlate",
            statement="reward scores are strongly correlated with length",
            number="Figure 1",
            statistic=lambda table: table.sort_values("topic")["correlation"].to_numpy(),
            unit="correlation of reward and length on a topic, mean over topics",
            criterion=Above(0.5),
            null=without_length,
        ),
        Claim(
            name="a length-only reward does as well",
            statement="a purely length-based reward reproduces most of the improvement",
            number="56, 59, 64 against 58, 58, 63 % of wins",
            statistic=advantage,
            unit="points of accuracy on people's pairs, the reward model's minus length's, mean over topics",
            criterion=Within(0.0, 5.0),
            null=without_length,
        ),
    ),
)
