r"""Cobbe et al. 2021 (arXiv:2110.14168): a verifier that chooses among samples is worth a much larger model.

Figure: Figure 5 at the full training set, from the authors' published solutions of the 1,319 test problems of GSM8K.
Command: rlhf-jax fetch gsm8k_solutions, then rlhf-jax reproduce cobbe_2021
Hardware and cost: two CPU cores, seconds.
Seeds: none; the authors published one solution per problem and system. The units are problems, which have one source
each: intervals are over problems, and differences are paired by problem.
Judge and batch: none; a solution is right if its last number is the reference's. Verified solutions are those with the
highest score of a verifier, of the generator's size, among 100 samples.
Data: grade_school_math/data/example_model_solutions.jsonl of openai/grade-school-math at 3101c7d.
Deviations: nothing is trained or sampled, so that differences between training runs are not part of the intervals. The
authors' flags are used; a claim compares them with the final numbers of the solutions. The accuracies of this file had
been seen when the criteria were written. The paper's other figures (number of samples, size of the verifier) cannot be
computed from the file.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax import fetch
from rlhf_jax.core.statistics import t_interval
from rlhf_jax.data.readers import read_file
from rlhf_jax.data.repositories import GSM8K, GSM8K_SOLUTIONS, GSM8K_SOLUTIONS_HASH
from rlhf_jax.papers.claims import Above, Claim
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style
from rlhf_jax.types import RlhfError

SYSTEMS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
KINDS = ("finetuning", "verification")
ANSWER = re.compile(r"A: *(-?[\d,]*\.?\d+)\s*$")
"""Final number of a solution in the published file."""


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Read which solutions are right: by the authors' flags, and by comparing final numbers.

    Raises RlhfError for more than one seed.
    """
    del scale, workdir
    if list(seeds) != [0]:
        raise RlhfError("the published solutions are one sample per problem: give --seeds=1")
    rows = []
    for problem, row in enumerate(read_file(fetch("gsm8k_solutions") / "solutions.jsonl")):
        truth = final_number(row["ground_truth"])
        flags = {system: int(row[system]["is_correct"]) for system in SYSTEMS}
        equal = {f"{system}_equal": int(final_number(row[system]["solution"]) == truth) for system in SYSTEMS}
        rows.append({"seed": 0, "problem": problem} | flags | equal)
    return pd.DataFrame(rows)


def final_number(solution: str) -> float | None:
    """Find the number after `A:` at the end of a solution; None if it does not end in one."""
    found = ANSWER.search(solution)
    return float(found[1].replace(",", "")) if found else None


def points(table: pd.DataFrame, better: str, worse: str) -> np.ndarray:
    """Difference of two systems on each problem, in points of accuracy."""
    return 100.0 * (table[better] - table[worse]).to_numpy()


def exchanged(table: pd.DataFrame) -> pd.DataFrame:
    """Exchange the systems with a verifier and those without one."""
    names = {f"{size}_{a}": f"{size}_{b}" for size in ("6b", "175b") for a, b in (KINDS, KINDS[::-1])}
    return table.rename(columns=names)


def agreement(table: pd.DataFrame) -> np.ndarray:
    """Share of all solutions whose flag is that of comparing final numbers."""
    same = [table[system] == table[f"{system}_equal"] for system in SYSTEMS]
    return np.array([np.mean(same)])


def of_other_problems(table: pd.DataFrame) -> pd.DataFrame:
    """Give each problem the flags of the next one."""
    return table.assign(**{system: np.roll(table[system], 1) for system in SYSTEMS})


def draw(table: pd.DataFrame) -> Figure:
    """Draw the accuracy of each system, and the paired differences, with 95 % intervals over problems."""
    figure, (left, right) = style.panels(2, 2.8)
    for kind, colour in zip(KINDS, (style.PALETTE["sky"], style.PALETTE["blue"]), strict=True):
        for place, size in enumerate(("6b", "175b")):
            _interval(left, place, 100.0 * table[f"{size}_{kind}"].to_numpy(), colour)
        left.plot([], [], "o-", color=colour, label=kind)
    left.set_xticks((0, 1), ("6B", "175B"))
    left.set_xlim(-0.5, 1.5)
    left.set_ylim(0, 70)
    left.set_xlabel("parameters")
    left.set_title("Test problems solved, %")
    left.legend(fontsize=7, frameon=False, loc="upper left")
    for place, (_, better, worse) in enumerate(DIFFERENCES):
        _interval(right, place, points(table, better, worse), style.PALETTE["blue"])
    right.axhline(0, color=style.MUTED, lw=0.8)
    right.set_xticks(
        range(3), ("6B: verified\n− finetuned", "175B: verified\n− finetuned", "6B verified −\n175B finetuned")
    )
    right.tick_params(axis="x", labelsize=7)
    right.set_xlim(-0.5, 2.5)
    right.set_title("Difference, points")
    return figure


def _interval(panel: Axes, place: int, values: np.ndarray, colour: str) -> None:
    low, high = t_interval(values, level=0.95)
    panel.plot([place, place], [low, high], color=colour, lw=1.5)
    panel.plot(place, values.mean(), "o", color=colour, ms=5)
    panel.annotate(f"{values.mean():.1f}", (place, values.mean()), (7, -2), textcoords="offset points", fontsize=7)


DIFFERENCES = (
    ("a 6B verifier improves a 6B model", "6b_verification", "6b_finetuning"),
    ("a 175B verifier improves a 175B model", "175b_verification", "175b_finetuning"),
    ("6B with a verifier is better than 175B without one", "6b_verification", "175b_finetuning"),
)

PAPER = Paper(
    title="Training verifiers to solve math word problems",
    source="arXiv:2110.14168",
    figure="Figure 5, at the full training set",
    question="weak judge",
    scales={
        "cpu": Scale(
            seeds=1,
            settings={"data": f"{GSM8K}/{GSM8K_SOLUTIONS}", "sha256": GSM8K_SOLUTIONS_HASH},
            cost="seconds",
        )
    },
    measure=measure,
    draw=draw,
    claims=(
        *(
            Claim(
                name=name,
                statement=statement,
                number=number,
                statistic=lambda table, better=better, worse=worse: points(table, better, worse),
                unit="points of accuracy, paired by problem",
                criterion=Above(0.0),
                null=exchanged,
            )
            for (name, better, worse), statement, number in zip(
                DIFFERENCES,
                (
                    "verification significantly improves performance",
                    "verification significantly improves performance",
                    "6B verification slightly outperforms a finetuned 175B model",
                ),
                ("-", "-", "a boost equivalent to 30 times the parameters"),
                strict=True,
            )
        ),
        Claim(
            name="the published flags compare final numbers",
            statement="a solution is correct if its final numeric answer is the reference's",
            number="1",
            statistic=agreement,
            unit="share of the 5,276 solutions with an equal verdict",
            criterion=Above(0.995),
            null=of_other_problems,
            sampled=False,
        ),
    ),
)
