"""Rafailov et al. 2023 (arXiv:2305.18290), with a selected learning rate of DPO: frontiers of DPO and PPO.

Figure: Figure 2, left: reward against the divergence from the SFT policy, DPO and PPO.
Command: rlhf-jax reproduce rafailov_2023_tuned
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage. It ran at the last commit that
reads the shared stages of rafailov_2023, so that DPO starts from the same SFT policies as PPO.
Seeds: 5, each with its own tokenizer, SFT policy, preferences and reward model. Differences are paired within a seed.
Judge and batch: gold judge (TF-IDF ridge on people's ratings); 64 pairs per update of DPO, 64 responses per update of
PPO; tokens per update are in record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: those of rafailov_2023, but for DPO's learning rate. select_rates.py trains both methods with several rates
on a seed that is not among the paper's, and selects for each the rate with the highest frontier on validation prompts
(rates.csv). DPO has its selected rate, as many updates and as many checkpoints as in rafailov_2023. PPO's and
Best-of-n's points are those of rafailov_2023, whose seeds are the same, at PPO's old rate of 1e-3, although 3e-3 was
selected: the comparison favours DPO. The seeds are scored on test prompts. rafailov_2023 has the controls.

Statistic of a frontier: the mean gain in gold score over SFT for divergences up to 4 nats, evenly in the root of the
divergence. Divergences beyond 4 nats do not count.

Before the run: in rafailov_2023 (the same seeds at an untuned rate of 1e-3) PPO's frontier was above DPO's by 0.16
[0.12, 0.20], Best-of-128 was 1.0 above the best DPO, and DPO stayed within 1.5 nats. In rafailov_2024 (the same seeds,
one epoch at 3e-3) DPO scored 1.23 at 3.2 and 1.67 at 6.3 nats, above those points of PPO. The claims are
rafailov_2023's, unchanged.

Power, before the run: there the frontiers' difference deviated by 0.03 between seeds, which shows 0.05 alone; single
scores by 0.1, which shows 0.16 alone and about 0.35 as one of 24 claims (Holm).

Found: PPO's frontier stays above DPO's, by 0.10 [0.06, 0.14] instead of 0.16. DPO now moves by 5.2 nats at beta 0.03,
and gains from it: the best beta ends at 0.92, and Best-of-128 is 0.47 [0.37, 0.57] above it instead of 1.0. The order
that rafailov_2023 found is not that of an untuned rate of DPO, and PPO's rate is still not the selected one.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Claim
from rlhf_jax.papers.suite import Paper, read_results, results_directory

UNTUNED = runpy.run_path(str(Path(__file__).parents[1] / "rafailov_2023" / "paper.py"))
REVIEWS, BETAS, COEFFICIENTS, MOST = (UNTUNED[name] for name in ("REVIEWS", "BETAS", "COEFFICIENTS", "MOST"))
at, best_dpo = UNTUNED["at"], UNTUNED["best_dpo"]
GROUPS = {"DPO": tuple(BETAS), "PPO": tuple(COEFFICIENTS)}
RATE = 3e-3
"""DPO's learning rate, from rates.csv."""


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed: DPO alone."""
    found, add, size = REVIEWS["task"](smoke=smoke), REVIEWS["add"], {"smoke": smoke}
    for name, beta in BETAS.items():
        add(found, name, REVIEWS["dpo"](**size, checkpoints=20, beta=beta))
    add(found, "frontier", REVIEWS["frontier"](tuple(BETAS), **size, prompts=400))
    REVIEWS["set_rate"](found, RATE)
    return found


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train DPO, score its checkpoints, and add the points of the other methods from rafailov_2023."""
    runs = training.run_each(config(smoke=scale == "smoke"), seeds, workdir, shared=REVIEWS["SHARED"])
    before = read_results(results_directory("rafailov_2023", "cpu"))
    assert before is not None
    others = before[before["method"].isin((*COEFFICIENTS, "best_of_n")) & before["seed"].isin(seeds)]
    own = [run.points("frontier").assign(seed=seed)[list(before.columns)] for seed, run in runs.items()]
    return pd.concat([*own, others], ignore_index=True)


def areas(table: pd.DataFrame, group: str) -> np.ndarray:
    """Mean gain over the frontier of one method, for each seed."""
    return REVIEWS["areas"](table, GROUPS[group], MOST)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the points of all seeds, and the statistic of both frontiers."""
    return UNTUNED["draw_groups"](table, GROUPS)


PAPER = Paper(
    title="Direct preference optimization: your language model is secretly a reward model (selected learning rate)",
    source="arXiv:2305.18290",
    figure="Figure 2, left",
    question="preference tuning",
    scales=training.scales(config, seeds=5, cost="half a minute of one core per seed, after the shared stages"),
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="DPO's frontier is above PPO's",
            statement="DPO has the highest expected reward for all values of KL, and dominates PPO",
            number="Figure 2, left",
            statistic=lambda table: areas(table, "DPO") - areas(table, "PPO"),
            unit="mean difference in gold score up to 4 nats",
            criterion=Above(0.0),
            null=UNTUNED["without_effect"],
        ),
        Claim(
            name="DPO is comparable with Best-of-128",
            statement="DPO has similar or better performance than Best-of-128, without its cost",
            number="Figure 3",
            statistic=lambda table: best_dpo(table) - at(table, "best_of_n", 128),
            unit="difference in gold score, for the best of three betas",
            criterion=Above(-0.2),
            null=lambda table: table.assign(gold=table["gold"] + 9 * (table["method"] == "best_of_n")),
        ),
    ),
)
