"""Stroebl, Kapoor & Narayanan 2024 (arXiv:2411.17501), trained here: resampling until a learned verifier accepts.

Figure: Figure 1: accuracy over the number of attempts, and its utility where wrong answers cost.
Command: rlhf-jax reproduce stroebl_2024_trained
Hardware and cost: one CPU core; the stages are cobbe_2021_trained's, and the rest takes seconds (record.json).
Seeds: 5, each with its own generators, samples and verifiers; the problems are the same. Differences are paired within
a seed.
Judge and batch: the exact answer; tokens per update are in record.json.
Data: generated arithmetic word problems (rlhf_jax/data/arithmetic.py); hashes are in record.json.
Deviations: the weak and the strong model are transformers from scratch of two sizes, instead of language models on
HumanEval and MBPP; a learned verifier that accepts a solution with a positive score takes the place of unit tests, so
that right solutions can be rejected too; 256 attempts stand for unlimited ones. The cost of a wrong answer (4) is ours.
The abstract was read, as for stroebl_2024, which simulates the same claims.

Attempts are drawn from a pool of 256 solutions without replacement until one is accepted, for 64 test problems; all
expectations over the order are exact. A problem of which no attempt is accepted has no answer, neither right nor wrong.
The control, a verifier of shuffled labels, accepts the half of all solutions with the highest scores.

Power, before the run: with 64 problems a share has a standard error of about 5 points, of which differences on the same
problems have less. If they deviate by 4 points between seeds, five seeds show 6.5 points alone.

After the claims were committed, the statistics of the first three seeds were seen while the code was tried. Claims and
criteria are as they were committed before.

Found: an exact verifier lets the weak generator exceed one attempt of the strong one by 0.51 [0.39, 0.62]; with the
learned verifier it stays 0.21 [0.02, 0.40] below. That and the other differences of the paper's sign (more false
positives of the weaker model, later attempts accepted wrongly more often) are inconclusive among the claims of this
question: the verifiers of five seeds differ more than expected. A first attempt is best if a wrong answer costs 4, in
all seeds, as every further attempt adds more wrong answers than right ones; without an answer, the utility is 0, and
higher. The control is inconclusive too: what a verifier of shuffled labels accepts is right less often than an attempt,
by 0.10 [0.00, 0.20].
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core.selection import best_of_n
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.columns import exchanged, per_seed
from rlhf_jax.papers.suite import Paper
from rlhf_jax.reports import style

VERIFIERS = runpy.run_path(str(Path(__file__).parents[1] / "verifiers.py"))
SIZES: tuple[int, ...] = VERIFIERS["SIZES"]
LAST = SIZES[-1]
COST = 4.0
WEAK, STRONG = "small", "large"
JUDGE = "large"
"""Size of the verifier."""


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train generators and verifiers, and compute what resampling until acceptance gives."""
    rows = []
    for seed, run in VERIFIERS["run_each"](scale, seeds, workdir).items():
        for generator in VERIFIERS["GENERATORS"]:
            scores, right = VERIFIERS["pool"](run, generator)
            accepts = {
                verifier: own > (np.median(own) if verifier == "shuffled" else 0) for verifier, own in scores.items()
            }
            accepts |= {"exact": right, "accepts all": np.ones_like(right)}
            for verifier, accepted in accepts.items():
                for n in SIZES:
                    good, bad = resample(accepted, right, n)
                    row = {"seed": seed, "generator": generator, "verifier": verifier, "n": n}
                    rows.append({**row, "right": good, "wrong": bad})
    return pd.DataFrame(rows)


def resample(accepted: np.ndarray, right: np.ndarray, n: int) -> tuple[float, float]:
    """Expected shares of problems that end in a right and in a wrong answer after at most n attempts of the pool.

    Args: which attempts the verifier accepts, and which are right, [problems, attempts].
    """
    ended = best_of_n(accepted, accepted, n)  # whether any of n is accepted
    count = np.maximum(accepted.sum(axis=1), 1)
    good, bad = (accepted & right).sum(axis=1) / count, (accepted & ~right).sum(axis=1) / count
    return float(np.mean(ended * good)), float(np.mean(ended * bad))


def values(table: pd.DataFrame, generator: str, verifier: str, n: int, column: str = "right") -> np.ndarray:
    """Select a column's values for one generator, verifier and number of attempts, one per seed."""
    return per_seed(table, column, generator=generator, verifier=verifier, n=n)


def precision(table: pd.DataFrame, generator: str, verifier: str, n: int) -> np.ndarray:
    """Share of right answers among the accepted ones, for each seed."""
    right, wrong = (values(table, generator, verifier, n, column) for column in ("right", "wrong"))
    return right / (right + wrong)


def best_number(table: pd.DataFrame, generator: str) -> np.ndarray:
    """Number of attempts with the greatest utility: right answers minus `COST` times wrong ones, for each seed."""
    own = table[(table["generator"] == generator) & (table["verifier"] == JUDGE)].reset_index()
    utility = own["right"] - COST * own["wrong"]
    return own.loc[utility.groupby(own["seed"]).idxmax()].sort_values("seed")["n"].to_numpy()


def draw(table: pd.DataFrame) -> Figure:
    """Draw right answers over attempts by a learned and an exact verifier, and the utility of the learned one."""
    figure, (left, right) = style.panels(2, 3.3)
    attempts = [str(n) for n in SIZES[::2]]
    for generator, colour in ((WEAK, style.PALETTE["orange"]), (STRONG, style.PALETTE["blue"])):
        for verifier, line in ((JUDGE, "o-"), ("exact", "--")):
            found = [values(table, generator, verifier, n).mean() for n in SIZES]
            label = f"{generator} generator, {'exact' if verifier == 'exact' else 'learned'} verifier"
            left.plot(SIZES, found, line, ms=3, color=colour, label=label)
        left.axhline(values(table, generator, "accepts all", 1).mean(), lw=0.8, ls=":", color=colour)
        utility = [
            np.mean(values(table, generator, JUDGE, n) - COST * values(table, generator, JUDGE, n, "wrong"))
            for n in SIZES
        ]
        right.plot(SIZES, utility, "o-", ms=3, color=colour)
    left.set_ylim(0, 1)
    left.set_title("Right answers (dotted: one attempt)")
    right.set_title(f"Utility, a wrong answer costs {COST:g}")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(SIZES[::2], attempts)
        panel.minorticks_off()
        panel.set_xlabel("attempts")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure


PAPER = Paper(
    title="Inference scaling flaws: the limits of LLM resampling with imperfect verifiers (trained here)",
    source="arXiv:2411.17501",
    figure="Figure 1",
    question="reward model alone",
    scales=training.scales(
        VERIFIERS["config"],
        seeds=5,
        cost="seconds after cobbe_2021_trained",
        constants={"cost of a wrong answer": COST},
    ),
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="resampling a weak model does not match one attempt of a strong one",
            statement="no amount of resampling lets weaker models match one sample of a sufficiently strong model",
            number="-",
            statistic=lambda table: values(table, WEAK, JUDGE, LAST) - values(table, STRONG, "accepts all", 1),
            unit=f"share of right answers, {LAST} attempts of the weak model minus one of the strong",
            criterion=Below(0.0),
            null=exchanged("verifier", JUDGE, "exact"),
        ),
        Claim(
            name="with an exact verifier it exceeds it",
            statement="indefinite improvement through resampling needs a perfect verifier",
            number="-",
            statistic=lambda table: values(table, WEAK, "exact", LAST) - values(table, STRONG, "accepts all", 1),
            unit=f"share of right answers, {LAST} attempts of the weak model minus one of the strong",
            criterion=Above(0.0),
            null=lambda table: table.assign(right=0.5),
        ),
        Claim(
            name="a weaker model has more false positives",
            statement="single-sample accuracy and false positive rate are strongly correlated",
            number="-",
            statistic=lambda table: precision(table, STRONG, JUDGE, LAST) - precision(table, WEAK, JUDGE, LAST),
            unit="share of wrong answers among accepted ones, weak minus strong",
            criterion=Above(0.0),
            null=exchanged("generator", WEAK, STRONG),
        ),
        Claim(
            name="later attempts are accepted wrongly more often",
            statement="resampling bends accuracy downward, as harder problems remain",
            number="-",
            statistic=lambda table: precision(table, WEAK, JUDGE, 1) - precision(table, WEAK, JUDGE, LAST),
            unit=f"share of right answers among accepted ones, one attempt minus {LAST}",
            criterion=Above(0.0),
            null=exchanged("verifier", JUDGE, "exact"),
        ),
        Claim(
            name="few attempts are best if wrong answers cost",
            statement="the optimal number of attempts is often fewer than 10",
            number="< 10",
            statistic=lambda table: best_number(table, WEAK),
            unit="attempts of the weak model at which the utility is greatest",
            criterion=Below(10.0),
            null=lambda table: table.assign(wrong=0.0),
        ),
        Claim(
            name="a verifier of shuffled labels gains nothing",
            statement="the gain is from the labels (our control)",
            number="-",
            statistic=lambda table: (
                precision(table, STRONG, "shuffled", LAST) - values(table, STRONG, "accepts all", 1)
            ),
            unit="share of right answers among accepted ones minus that of one attempt",
            criterion=Within(0.0, 0.05),
            null=exchanged("verifier", "shuffled", "exact"),
        ),
    ),
)
