r"""Gui, Gârbacea & Veitch 2024 (arXiv:2406.00832), trained: a policy that imitates Best-of-8 (BoNBoN).

Figure: win rate against divergence, of BoNBoN, SFT on the best samples, DPO, and Best-of-N.
Command: rlhf-jax reproduce gui_2024_trained
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 10, each with its own tokenizer, SFT policy and samples. Differences are paired within a seed.
Judge and batch: gold judge (TF-IDF ridge on people's ratings), which ranks the 8 samples of a prompt and decides who
wins; 64 pairs per update of the methods on pairs, 64 responses per update of PPO; tokens per update are in record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: the abstract and the formulas were read, not the paper's tables. A transformer of 77 thousand parameters on
sentences, with 12 response tokens, not Pythia-2.8B on dialogues and summaries. The ranks are those of the judge itself,
without noise. BoNBoN has the paper's n = 8 and alpha = 0.005. All methods have the learning rate 3e-3, which
rafailov_2023_tuned selected for DPO and for PPO; it was not selected for BoNBoN. SFT on the best samples, DPO (beta
{0.03, 0.1, 1}) and BoNBoN read the best, or the best and the worst, of 8 samples of 1,350 prompts, three times. PPO
maximises the judge's score itself, at coefficients that leave it near SFT.

Statistic of a frontier: the mean gain in gold score over SFT for divergences up to that of Best-of-8,
$\log 8 - 7/8 = 1.2$ nats, evenly in the root of the divergence.

Before the run: no run of BoNBoN on movie reviews has been seen, but a smoke test. In rafailov_2023_baselines, PPO with
the true reward has no checkpoint below 1.9 nats at coefficient 0.3.

Power, before the run: frontiers' differences deviated by 0.03 between seeds in rafailov_2023, which ten seeds show from
0.03 on. A win rate over 600 prompts deviates by 0.02, differences by 0.03 at most, so that ten seeds show 0.03 alone
and about 0.06 as one of 32 claims (Holm).

Found: BoNBoN wins 94 % against SFT, Best-of-8 89 %: within 5 points in the mean, but the interval ends beyond.
Best-of-8 stays within 1.2 nats, BoNBoN is at 8.0: at this rate and in three passes it does not imitate the
distribution, it moves as far as DPO at beta 0.1 and gains as much (1.80 and 1.78). SFT on the best of 8 wins 73 % at
1.3 nats, and near Best-of-8's divergence its points are above those of all other policies; no claim tests that. Up to
1.2 nats BoNBoN has few points, and its frontier is below DPO's by 0.06 [0.04, 0.08] and beside that of PPO with the
true reward. Random ranks move it by 4.4 nats for nothing. A smaller rate, or more samples of a prompt, may bring BoNBoN
nearer to its target: not tried.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax.api import load_config
from rlhf_jax.core.selection import best_of_n_kl, best_of_n_win_rate_bound
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Claim, Within
from rlhf_jax.papers.suite import Paper
from rlhf_jax.reports import style
from rlhf_jax.reports.run import Run
from rlhf_jax.stages.kinds import Colour

REVIEWS = runpy.run_path(str(Path(__file__).parents[1] / "movie_reviews.py"))
last = REVIEWS["last"]

N = 8
BETAS = {"dpo_1": 1.0, "dpo_01": 0.1, "dpo_003": 0.03}
COEFFICIENTS = {"ppo_3": 3.0, "ppo_1": 1.0, "ppo_03": 0.3}
GROUPS: dict[str, tuple[tuple[str, ...], Colour]] = {
    "BoNBoN": (("bonbon",), "green"),
    "SFT on the best": (("best_only",), "amber"),
    "DPO": (tuple(BETAS), "blue"),
    "PPO, true reward": (tuple(COEFFICIENTS), "orange"),
    "BoNBoN, random ranks": (("bonbon_random",), "grey"),
}
RATE = 3e-3
"""Learning rate of all methods, from rafailov_2023_tuned/rates.csv."""
MOST = float(best_of_n_kl(N))


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    found = REVIEWS["task"](smoke=smoke)
    add, with_fields, size = REVIEWS["add"], REVIEWS["with_fields"], {"smoke": smoke}
    ranked = {"samples_per_prompt": N, "pairs": "best_worst", "label_beta": None}
    add(found, "ranked", with_fields(found.preferences, ranked))
    by_chance = {"judge": None, "reward_model": {"functions": ("rlhf_jax.papers.controls:random_score",)}}
    add(found, "ranked_randomly", with_fields(found.ranked, by_chance))
    pairs = {"preferences": "ranked", "epochs": 3.0, "cached_reference": False}
    bonbon = {"loss": {"losses": ("rlhf_jax.papers.baselines:bonbon_8",)}}
    add(found, "bonbon", REVIEWS["dpo"](**size, checkpoints=10, **pairs, **bonbon))
    add(found, "bonbon_random", with_fields(found.bonbon, {"preferences": "ranked_randomly"}))
    add(found, "best_only", with_fields(found.bonbon, {"loss": {"losses": ("sft",)}}))
    for name, beta in BETAS.items():
        add(found, name, REVIEWS["dpo"](**size, checkpoints=10, **pairs, beta=beta))
    for name, coefficient in COEFFICIENTS.items():
        ppo = {"kl_coef": coefficient, "reward_model": "gold"}
        add(found, name, REVIEWS["ppo"](**size, iterations=40, checkpoints=5, **ppo))
    policies = tuple(name for methods, _ in GROUPS.values() for name in methods)
    add(found, "frontier", REVIEWS["frontier"](policies, **size, prompts=400))
    quickstart = load_config("quickstart:smoke" if smoke else "quickstart").evaluate
    compared = {"policies": policies, "best_of": (N,), "reward_model": "gold", "judge": None, "selection_prompts": 64}
    add(found, "evaluate", with_fields(quickstart, compared))
    REVIEWS["set_rate"](found, RATE)
    return found


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train every method, score its checkpoints, and let the last ones compete with SFT."""
    runs = training.run_each(config(smoke=scale == "smoke"), seeds, workdir, shared=REVIEWS["SHARED"])
    return pd.concat([rows(seed, run) for seed, run in runs.items()], ignore_index=True)


def rows(seed: int, run: Run) -> pd.DataFrame:
    """Collect the points of one seed, with win rates at the last checkpoints and of Best-of-8."""
    points = run.points("frontier")
    results = run.results().set_index("method")
    for method in set(results.index) & set(points["method"]):
        end = (points["method"] == method) & (points["step"] == points[points["method"] == method]["step"].max())
        points.loc[end, "win_rate"] = results["win_rate"][method]
    chosen = results.loc[f"best_of_{N}"]
    best = {
        "method": "best_of_8",
        "step": N,
        "kl": MOST,
        "gold": chosen["reward_score"],
        "win_rate": chosen["win_rate"],
    }
    found = pd.concat([points, pd.DataFrame([best])], ignore_index=True).assign(seed=seed)
    return found[["seed", "method", "step", "kl", "gold", "gold_se", "win_rate"]]


def areas(table: pd.DataFrame, group: str) -> np.ndarray:
    """Mean gain over the frontier of one group of methods, for each seed."""
    return REVIEWS["areas"](table, GROUPS[group][0], MOST)


def wins(table: pd.DataFrame, method: str) -> np.ndarray:
    """Win rate against SFT at the end of training, for each seed."""
    return last(table, method, "win_rate")


def without_effect(table: pd.DataFrame) -> pd.DataFrame:
    """Give every policy that was trained the gold score of its seed's SFT policy, and half of the wins."""
    equal = REVIEWS["without_effect"](table)
    return equal.assign(win_rate=table["win_rate"].where(table["method"] == "best_of_8", 0.5))


def draw(table: pd.DataFrame) -> Figure:
    """Draw win rates over the divergence at the end, and the points of all checkpoints near SFT."""
    figure, (left, right) = style.panels(2, 3.2)
    for group, (methods, colour) in GROUPS.items():
        own = table[table["method"].isin(methods)]
        ends = own[own["win_rate"].notna()]
        for axes, points, column in ((left, ends, "win_rate"), (right, own[own["kl"] < 3 * MOST], "gold")):
            axes.plot(points["kl"], points[column], "o", ms=3, alpha=0.7, color=style.PALETTE[colour], label=group)
    sizes = np.array([1, 2, 4, 8, 16, 64])
    left.plot(
        best_of_n_kl(sizes), best_of_n_win_rate_bound(sizes), "-", lw=1, color=style.MUTED, label="Best-of-N, formula"
    )
    chosen, start = table[table["method"] == "best_of_8"], table[table["method"] == "sft"]
    left.plot(chosen["kl"], chosen["win_rate"], "^", ms=4, color=style.INK, label="Best-of-8")
    right.plot(chosen["kl"], chosen["gold"], "^", ms=4, color=style.INK)
    right.plot(start["kl"], start["gold"], "s", ms=4, color=style.INK)
    left.set_xlim(-0.3, 12)
    left.set_title("Win rate against SFT")
    right.axvline(MOST, lw=0.8, ls=":", color=style.MUTED)
    right.set_title("Gold score of checkpoints")
    for axes in (left, right):
        axes.set_xlabel("KL(policy || SFT), nats (Best-of-N: bound)")
    left.legend(fontsize=7, frameon=False)
    return figure


PAPER = Paper(
    title="BoNBoN alignment for large language models and the sweetness of best-of-n sampling (trained)",
    source="arXiv:2406.00832",
    figure="win rate against KL divergence",
    question="reward model alone",
    scales=training.scales(config, seeds=10, cost="two minutes of one core per seed beside other programs"),
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="BoNBoN wins as often as Best-of-8",
            statement="BoNBoN mimics the distribution of best-of-n samples",
            number="8/9 of wins",
            statistic=lambda table: wins(table, "bonbon") - wins(table, "best_of_8"),
            unit="difference in share of wins against SFT",
            criterion=Within(0.0, 0.05),
            null=without_effect,
        ),
        Claim(
            name="BoNBoN wins more often than SFT on the best samples",
            statement="the best and the worst samples together are used better than the best alone",
            number="-",
            statistic=lambda table: wins(table, "bonbon") - wins(table, "best_only"),
            unit="difference in share of wins against SFT",
            criterion=Above(0.0),
            null=without_effect,
        ),
        Claim(
            name="BoNBoN's frontier is above DPO's",
            statement="BoNBoN is preferred to the base policy more often than DPO while it deviates less",
            number="-",
            statistic=lambda table: areas(table, "BoNBoN") - areas(table, "DPO"),
            unit="mean difference in gold score up to 1.2 nats",
            criterion=Above(0.0),
            null=without_effect,
        ),
        Claim(
            name="BoNBoN's frontier is above that of PPO with the true reward",
            statement="best-of-n is essentially optimal in the trade-off of win rate and divergence (our comparison)",
            number="-",
            statistic=lambda table: areas(table, "BoNBoN") - areas(table, "PPO, true reward"),
            unit="mean difference in gold score up to 1.2 nats",
            criterion=Above(0.0),
            null=without_effect,
        ),
        Claim(
            name="BoNBoN on random ranks gains nothing",
            statement="the gain is from the ranks (our control)",
            number="-",
            statistic=lambda table: last(table, "bonbon_random") - last(table, "sft"),
            unit="gain in gold score",
            criterion=Within(0.0, 0.2),
            null=lambda table: table.assign(gold=table["gold"] + (table["method"] == "bonbon_random")),
        ),
    ),
)
