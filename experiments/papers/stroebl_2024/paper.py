r"""Stroebl, Kapoor & Narayanan 2024 (arXiv:2411.17501): a verifier's false positives cap the gain of resampling.

Figure: Figure 1: accuracy with unlimited attempts over that of one attempt, and utility over the number of attempts.
Command: rlhf-jax reproduce stroebl_2024
Hardware and cost: two CPU cores, seconds.
Seeds: 10 draws of 200 problems; every expectation is a sum, except the claim that compares with simulated attempts.
Judge and batch: a verifier that accepts every right answer, and a wrong one with a chance that depends on the problem.
Data: none.
Deviations: a simulation instead of code models on HumanEval and MBPP; the abstract was read. A problem has difficulty
d ~ N(0, 2) and chance of a false positive f ~ Beta(0.5, 4.5), mean 0.1; a model of skill s solves it with probability
sigma(s - d). These settings, the two models that are compared (skills -1 and 3) and the cost of a wrong answer (4) are
ours.

With q = p + (1 - p) f the chance that an attempt is accepted, n attempts end in a right answer with probability
p / q (1 - (1 - q)^n), and in a wrong one with (1 - p) f / q (1 - (1 - q)^n); otherwise in none.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.columns import exchanged, per_seed
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

PROBLEMS = 200
SKILLS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
WEAK, STRONG = -1.0, 3.0
SIZES = (*range(1, 33), 64, 128, 256, 512, 1024)
UNLIMITED = 10**9
COST = 4.0
CHECKED, TRIALS = 16, 500


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Compute the shares of right and wrong answers for every model, verifier and number of attempts."""
    del scale, workdir
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        difficulty, weakness = rng.normal(0, 2, PROBLEMS), rng.beta(0.5, 4.5, PROBLEMS)
        verifiers = {"imperfect": weakness, "perfect": np.zeros(PROBLEMS), "accepts all": np.ones(PROBLEMS)}
        for skill in SKILLS:
            solves = 1 / (1 + np.exp(difficulty - skill))
            for verifier, false_positive in verifiers.items():
                for n in (*(SIZES if verifier == "imperfect" else SIZES[:1]), UNLIMITED):
                    right, wrong = resample(solves, false_positive, n)
                    row = {"seed": seed, "skill": skill, "verifier": verifier, "n": n, "right": right, "wrong": wrong}
                    if (skill, verifier, n) == (WEAK, "imperfect", CHECKED):
                        row["simulated"] = simulate(rng, solves, false_positive, n)
                    rows.append(row)
    return pd.DataFrame(rows)


def resample(solves: np.ndarray, false_positive: np.ndarray, n: int) -> tuple[float, float]:
    """Expected shares of problems that end in a right and in a wrong answer after at most n attempts."""
    wrongly = (1 - solves) * false_positive
    accepted = solves + wrongly
    ended = -np.expm1(n * np.log1p(-np.minimum(accepted, 1 - 1e-15)))
    return float(np.mean(solves / accepted * ended)), float(np.mean(wrongly / accepted * ended))


def simulate(rng: np.random.Generator, solves: np.ndarray, false_positive: np.ndarray, n: int) -> float:
    """Share of right answers when attempts are drawn until the verifier accepts one."""
    right = rng.random((TRIALS, len(solves), n)) < solves[:, None]
    accepted = right | (rng.random(right.shape) < false_positive[:, None])
    first = np.argmax(accepted, axis=2)[..., None]
    return float(np.mean(np.take_along_axis(right & accepted, first, axis=2)))


def values(table: pd.DataFrame, skill: float, verifier: str, n: int, column: str = "right") -> np.ndarray:
    """Select a column's values for one model, verifier and number of attempts, one per seed."""
    return per_seed(table, column, skill=skill, verifier=verifier, n=n)


def precision(table: pd.DataFrame, skill: float, n: int) -> np.ndarray:
    """Share of right answers among those that the imperfect verifier accepts."""
    right, wrong = (values(table, skill, "imperfect", n, column) for column in ("right", "wrong"))
    return right / (right + wrong)


def correlation(table: pd.DataFrame) -> np.ndarray:
    """Correlation, over models, of the accuracy of one attempt and the false positives of unlimited ones."""
    single = np.stack([values(table, skill, "imperfect", 1, "right") for skill in SKILLS])
    false = np.stack([values(table, skill, "imperfect", UNLIMITED, "wrong") for skill in SKILLS])
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(single.T, false.T, strict=True)])


def best_number(table: pd.DataFrame, skill: float) -> np.ndarray:
    """Number of attempts, of those measured, with the greatest utility: right answers minus `COST` times wrong ones."""
    rows = table[(table["skill"] == skill) & (table["verifier"] == "imperfect") & (table["n"] != UNLIMITED)]
    utility = rows.assign(utility=rows["right"] - COST * rows["wrong"])
    best = utility.loc[utility.groupby("seed")["utility"].idxmax()]
    return best.sort_values("seed")["n"].to_numpy()


def draw(table: pd.DataFrame) -> Figure:
    """Draw accuracy with unlimited attempts over that of one, and utility over the number of attempts."""
    figure, (left, right) = style.panels(2, 3.0)
    for verifier, colour in (("imperfect", style.PALETTE["blue"]), ("perfect", style.PALETTE["green"])):
        single = [values(table, skill, verifier, 1).mean() for skill in SKILLS]
        limit = [values(table, skill, verifier, UNLIMITED).mean() for skill in SKILLS]
        left.plot(single, limit, "o-", ms=4, color=colour, label=f"{verifier} verifier")
    left.plot([0, 1], [0, 1], "--", color=style.MUTED, lw=1, label="one attempt")
    left.axhline(values(table, STRONG, "imperfect", 1).mean(), color=style.MUTED, lw=0.8)
    left.set_xlabel("accuracy of one attempt")
    left.set_title("Accuracy, unlimited attempts")
    left.legend(fontsize=7, frameon=False)
    for skill, colour in zip(SKILLS, style.shades(len(SKILLS), style.PALETTE["blue"]), strict=True):
        utility = [np.mean(values(table, skill, "imperfect", n) - COST * values(table, skill, "imperfect", n, "wrong"))
                   for n in SIZES]  # fmt: skip
        right.plot(SIZES, utility, color=colour, label=f"skill {skill:g}")
    right.set_xscale("log", base=2)
    right.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
    right.minorticks_off()
    right.set_ylim(bottom=-2.2)
    right.set_xlabel("attempts")
    right.set_title(f"Utility, a wrong answer costs {COST:g}")
    right.legend(fontsize=6.5, frameon=False, ncols=3, loc="lower left")
    return figure


PAPER = Paper(
    title="Inference scaling flaws: the limits of LLM resampling with imperfect verifiers",
    source="arXiv:2411.17501",
    figure="Figure 1",
    question="foundations",
    scales={
        "cpu": Scale(
            seeds=10,
            settings={
                "problems": PROBLEMS,
                "skills": list(SKILLS),
                "cost": COST,
                "attempts": [SIZES[0], SIZES[-1], UNLIMITED],
                "trials": TRIALS,
            },
            cost="seconds",
        )
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="unlimited attempts of a weak model do not match one of a strong model",
            statement="no amount of resampling lets weaker models match one sample of a sufficiently strong model",
            number="-",
            statistic=lambda table: values(table, WEAK, "imperfect", UNLIMITED) - values(table, STRONG, "imperfect", 1),
            unit="accuracy of the weak model with unlimited attempts minus one attempt of the strong one",
            criterion=Below(0.0),
            null=exchanged("verifier", "perfect", "imperfect"),
        ),
        Claim(
            name="with a perfect verifier they exceed it",
            statement="indefinite improvement through resampling needs a perfect verifier",
            number="-",
            statistic=lambda table: values(table, WEAK, "perfect", UNLIMITED) - values(table, STRONG, "perfect", 1),
            unit="accuracy of the weak model with unlimited attempts minus one attempt of the strong one",
            criterion=Above(0.0),
            null=exchanged("verifier", "perfect", "accepts all"),
        ),
        Claim(
            name="weaker models have more false positives",
            statement="single-sample accuracy and false positive rate are strongly correlated",
            number="-",
            statistic=correlation,
            unit="correlation over models",
            criterion=Below(-0.9),
            null=lambda table: table.assign(wrong=table["right"]),
        ),
        Claim(
            name="later attempts are accepted wrongly more often",
            statement="resampling bends accuracy downward, as harder problems remain",
            number="-",
            statistic=lambda table: precision(table, WEAK, 1) - precision(table, WEAK, UNLIMITED),
            unit="share of right answers among accepted ones, one attempt minus unlimited attempts",
            criterion=Above(0.0),
            null=lambda table: table.assign(right=table["wrong"], wrong=table["right"]),
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
            name="the formula is that of drawn attempts",
            statement="-",
            number="0",
            statistic=lambda table: (
                values(table, WEAK, "imperfect", CHECKED, "simulated") - values(table, WEAK, "imperfect", CHECKED)
            ),
            unit="simulated minus computed accuracy, 16 attempts",
            criterion=Within(0.0, 0.005),
            null=lambda table: table.assign(simulated=table["right"] + table["wrong"]),
        ),
        Claim(
            name="a verifier that accepts everything gains nothing",
            statement="-",
            number="negative control",
            statistic=lambda table: (
                values(table, WEAK, "accepts all", UNLIMITED) - values(table, WEAK, "accepts all", 1)
            ),
            unit="accuracy of unlimited attempts minus one",
            criterion=Within(0.0, 1e-9),
            null=exchanged("verifier", "perfect", "accepts all"),
            sampled=False,
        ),
    ),
)
