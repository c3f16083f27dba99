"""Yue et al. 2025 (arXiv:2504.13837): RL from verifiable rewards against many samples of the base model.

Figure: Figure 1, right: pass@k of the base model and of a model trained by RL, over k.
Command: rlhf-jax reproduce yue_2025
Hardware and cost: one CPU core, 4,078 s for all seeds, of which about 25 minutes of seed 2 are a standstill of the
machine.
Seeds: 5, each with its own tokenizer, base model and runs; the problems are the same. Differences are paired within a
seed.
Judge and batch: the exact answer; 512 responses per iteration in two updates, 8 to a problem; tokens per update are in
record.json.
Data: generated arithmetic word problems (rlhf_jax/data/arithmetic.py); hashes are in record.json.
Deviations: a transformer of two layers and width 48, whose base model has learned worked solutions, instead of
pretrained models of 7B to 32B parameters on competition problems; solutions of one line; GRPO alone of the six
algorithms. pass@k is unbiased from a pool of 256 solutions of each of 128 test problems of two steps, the harder ones
of the training distribution. Of the paper, the abstract and the findings of its figures were known.

pass@k is Best-of-k by the exact reward, so that the claims compare it with training on that reward.

Found (5 seeds, 2026-11-30, commit and machine in results/cpu/record.json): the curves cross as in the paper. GRPO
raises pass@1 from 56.9 to 66.4, by 9.5 points [3.1, 15.9], and lowers pass@16 by 3.0 [0.4, 5.7]; the base model reaches
100 with 256 samples, 34 points [18, 49] more than GRPO with one. All of this is inconclusive among the claims of this
question, since seeds differ more than expected. A random reward loses 32 points [14, 50]. The gain is not one over
further training: longer SFT on as many worked solutions is 27 points [16, 38] above GRPO at k = 1, which was a
contradiction until the claims of huang_2024 were added to the question. Values of seed 0 were seen while the others
ran, after the claims were committed.

Pilot, before the run: seed 100, not among the seeds, 128 validation problems of one and two steps, 64 samples. With
12,000 training problems, all of which SFT had read, GRPO did not gain at three rates. With 40,000, of which SFT reads a
third, and a rate of 1e-3 that decays to 0, 512 responses per iteration raised pass@1 from 53.7 to 63.0; pass@4, 16 and
64 went from 87.7, 99.4 and 100 to 86.9, 96.2 and 99.2. With 256 responses, pass@1 rose to 54.7 only. "Many samples" are
16 below, as more leave no room under 100.

Power, before the run: if differences deviate by 4 points between seeds, five seeds show 6.5 points alone, and about 14
among the claims of this question (Holm).
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax.api import load_config
from rlhf_jax.core.selection import best_of_n
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper
from rlhf_jax.reports import style
from rlhf_jax.stages.kinds import Colour
from rlhf_jax.stages.pool import load_pool

VERIFIERS = runpy.run_path(str(Path(__file__).parents[1] / "verifiers.py"))
PROMPTS, SAMPLES = 128, 256
SIZES = tuple(2**i for i in range(9))
"""Values of k."""

MANY, LAST = 16, SIZES[-1]
POLICIES = {"sft": "base", "grpo": "GRPO", "random": "random reward", "more_sft": "more SFT"}
COLOURS: dict[str, Colour] = {"sft": "grey", "grpo": "blue", "random": "brown", "more_sft": "orange"}


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    task = load_config("arithmetic:smoke" if smoke else "arithmetic").unlock()
    add = VERIFIERS["add"]
    found = ConfigDict({name: task[name] for name in ("seed", "seeds", "data", "runtime", "sft")})
    found.stages = ("sft",)
    found.sft.update({"sample_prompts": 0, "eval_every": 1000})
    grpo = task.grpo.copy_and_resolve_references()
    grpo.samples_written = 0
    if not smoke:
        found.data.test = "arithmetic:test,problems=1000,steps=2,largest=10"
    add(found, "grpo", grpo)
    by_chance = grpo.copy_and_resolve_references()
    by_chance.reward_model = ConfigDict({"functions": ("rlhf_jax.papers.controls:random_score",)})
    add(found, "random", by_chance)
    more = found.sft.copy_and_resolve_references()
    more.tokenizer, more.model, more.optimizer = None, ConfigDict({"init": "sft"}), grpo.optimizer
    more.epochs = 0.77  # as many solutions as GRPO samples
    add(found, "more_sft", more)
    for policy in POLICIES:
        pool = {"kind": "pool", "policy": policy, "reward_models": (), "judge": task.best_of_n.judge}
        counts = {"prompts": 8 if smoke else PROMPTS, "samples": SAMPLES, "temperature": 1.0}
        add(found, f"pool_{policy}", ConfigDict(pool | counts))
    return found


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train every policy, and compute pass@k."""
    rows = []
    runs = training.run_each(config(smoke=scale == "smoke"), seeds, workdir, shared=("sft",))
    for seed, run in runs.items():
        for policy in POLICIES:
            right = load_pool(run.directory(f"pool_{policy}"))["gold"]
            for k in SIZES:
                found = 100 * float(best_of_n(right, right, k).mean())
                rows.append({"seed": seed, "policy": policy, "k": k, "pass": found})
    return pd.DataFrame(rows)


def at(table: pd.DataFrame, policy: str, k: int) -> np.ndarray:
    """pass@k of a policy in percent, for each seed."""
    return per_seed(table, "pass", policy=policy, k=k)


def alike(table: pd.DataFrame) -> pd.DataFrame:
    """Let all policies pass half of the problems."""
    return table.assign(**{"pass": 50.0})


def draw(table: pd.DataFrame) -> Figure:
    """Draw pass@k over k for every policy, and the difference of each from the base model."""
    figure, (left, right) = style.panels(2, 3.2)
    for policy, colour in COLOURS.items():
        means = [at(table, policy, k).mean() for k in SIZES]
        left.plot(SIZES, means, "o-", ms=3, color=style.PALETTE[colour], label=POLICIES[policy])
        differences = np.array([at(table, policy, k) - at(table, "sft", k) for k in SIZES])
        right.plot(SIZES, differences, "-", lw=0.9, alpha=0.6, color=style.PALETTE[colour])
    left.set_title("pass@k, %")
    left.legend(fontsize=7, frameon=False)
    right.set_title("Difference from the base, each seed")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(SIZES[::2], [str(k) for k in SIZES[::2]])
        panel.minorticks_off()
        panel.set_xlabel("samples per problem, k")
    return figure


PAPER = Paper(
    title="Does reinforcement learning really incentivize reasoning capacity in LLMs beyond the base model?",
    source="arXiv:2504.13837",
    figure="Figure 1, right",
    question="foundations",
    scales=training.scales(config, seeds=5, cost="seven minutes of one core per seed, an estimate"),
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="GRPO raises pass@1",
            statement="models trained by RL outperform their base model at k = 1",
            number="Figure 1",
            statistic=lambda table: at(table, "grpo", 1) - at(table, "sft", 1),
            unit="points of pass@1",
            criterion=Above(0.0),
            null=alike,
        ),
        Claim(
            name="the base model solves more problems with many samples",
            statement="base models achieve a higher pass@k when k is large",
            number="Figure 1",
            statistic=lambda table: at(table, "grpo", MANY) - at(table, "sft", MANY),
            unit=f"points of pass@{MANY}, GRPO minus base",
            criterion=Below(0.0),
            null=alike,
        ),
        Claim(
            name="RL is far from what the base model can reach",
            statement="current algorithms remain far from optimal in using the base model's potential",
            number="more than 40 points between pass@1 of RL and pass@256 of the base",
            statistic=lambda table: at(table, "sft", LAST) - at(table, "grpo", 1),
            unit=f"points, pass@{LAST} of the base minus pass@1 of GRPO",
            criterion=Above(20.0),
            null=alike,
        ),
        Claim(
            name="GRPO on a random reward gains nothing",
            statement="the gain is from the reward (our control)",
            number="-",
            statistic=lambda table: at(table, "random", 1) - at(table, "sft", 1),
            unit="points of pass@1",
            criterion=Below(5.0),
            null=lambda table: table.assign(**{"pass": table["pass"] + 30 * (table["policy"] == "random")}),
        ),
        Claim(
            name="GRPO gains more than longer SFT on as many solutions",
            statement="the gain is more than that of further training on worked solutions (our control)",
            number="-",
            statistic=lambda table: at(table, "grpo", 1) - at(table, "more_sft", 1),
            unit="points of pass@1",
            criterion=Above(0.0),
            null=alike,
        ),
    ),
)
