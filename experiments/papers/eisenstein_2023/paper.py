"""Eisenstein et al. 2023 (arXiv:2312.09244), "Helping or herding?": ensembles by pretraining and by fine-tuning seed.

Figure: gold score of Best-of-N by single reward models and by both kinds of ensemble, after the paper's comparison.
Command: rlhf-jax reproduce eisenstein_2023
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 5, each with its own policy, comparisons, base models and samples. The selectors are compared on the same
samples.
Judge and batch: gold judge (TF-IDF ridge on people's ratings); 64 comparisons per update, two passes; tokens per update
are in record.json.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: 3 base models of one layer and width 48, which differ in initialisation and order of the data, instead of 5
of T5's size; 3 members in each ensemble, on the same 2,700 comparisons, combined by their mean score; n to 256. The
members of a fine-tuning ensemble start from the first base model, and differ in head and order of the data. Only
Best-of-N is measured, not RLHF. Of the paper, the abstract was read.

"Single" is the mean of the curves of the pretraining ensemble's members. A random selector is in gao_2022.

Power, before the run: in coste_2023 (5 members from scratch, 512 samples) the mean of the ensemble gains 0.18 more than
single models. If differences deviate by 0.1 between seeds, five seeds show 0.16 alone, and about 0.35 as one of 35
claims of this question (Holm).

Found: at n = 256 a pretraining ensemble gains 1.33, a fine-tuning ensemble 1.32 and single models 1.13. Both ensembles
gain about 0.19 more than single models: by [0.11, 0.28] the former and [0.00, 0.37] the latter, so that among all
claims of the question both are inconclusive (adjusted p of 0.052 and 0.56). The two kinds of ensemble differ by 0.01
[-0.19, 0.20], an interval that has room for either order.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax.core.selection import best_of_n
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Claim
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper
from rlhf_jax.reports import style
from rlhf_jax.stages.kinds import Colour
from rlhf_jax.stages.pool import load_pool

REVIEWS = runpy.run_path(str(Path(__file__).parents[1] / "movie_reviews.py"))
MEMBERS = range(3)
ENSEMBLES = {
    "pretraining": tuple(f"pretrained_{member}" for member in MEMBERS),
    "fine-tuning": ("pretrained_0", *(f"fine_tuned_{member}" for member in MEMBERS[1:])),
}
COLOURS: dict[str, Colour] = {"single": "grey", "fine-tuning": "blue", "pretraining": "green"}
PROMPTS, SAMPLES = 32, 256
SIZES = tuple(2**i for i in range(9))
LAST = SIZES[-1]


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    found = REVIEWS["task"](smoke=smoke)
    add, with_fields = REVIEWS["add"], REVIEWS["with_fields"]
    labels = {"kind": "noisy_labels", "preferences": "preferences", "pairs": 128 if smoke else 2700, "flipped": 0.0}
    add(found, "pairs", ConfigDict(labels))
    for member in MEMBERS:
        add(found, f"base_{member}", with_fields(found.sft, {"epochs": 1.0}))
    starts = {f"pretrained_{member}": f"base_{member}" for member in MEMBERS}
    starts |= {f"fine_tuned_{member}": "base_0" for member in MEMBERS[1:]}
    for name, base in starts.items():
        fields = {"preferences": "pairs", "policy": None, "model": {"init": base}, "epochs": 2.0}
        section = with_fields(found.reward_model, fields)
        section.optimizer.learning_rate = 1e-3
        add(found, name, section)
    pool = {
        "kind": "pool",
        "policy": "sft",
        "reward_models": tuple(starts),
        "judge": "gold",
        "prompts": 4 if smoke else PROMPTS,
        "samples": SAMPLES,
        "temperature": 1.0,
    }
    add(found, "pool", ConfigDict(pool))
    return found


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train base models and reward models, and compute the gold score of Best-of-n by members and ensembles."""
    one = config(smoke=scale == "smoke")
    rows = []
    for seed, run in training.run_each(one, seeds, workdir, shared=REVIEWS["SHARED"]).items():
        arrays = load_pool(run.directory("pool"))
        scores = {name: (own - own.mean()) / own.std() for name, own in arrays.items() if name != "length"}
        gold = scores.pop("gold")
        curves = {
            name: gains(np.mean([scores[member] for member in members], axis=0), gold)
            for name, members in ENSEMBLES.items()
        }
        curves["single"] = np.mean([gains(scores[member], gold) for member in ENSEMBLES["pretraining"]], axis=0)
        for name, found in curves.items():
            rows += [
                {"seed": seed, "selector": name, "n": n, "gold": gain} for n, gain in zip(SIZES, found, strict=True)
            ]
    return pd.DataFrame(rows)


def gains(proxy: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Mean over prompts of the gold score of the best of n by proxy score, for every n."""
    return np.array([best_of_n(proxy, gold, n).mean() for n in SIZES])


def at(table: pd.DataFrame, selector: str) -> np.ndarray:
    """Gold gain of the best of the most samples, for each seed."""
    return per_seed(table, "gold", selector=selector, n=LAST)


def same(table: pd.DataFrame) -> pd.DataFrame:
    """Let the gain depend on n alone."""
    return table.assign(gold=np.log(table["n"]))


def draw(table: pd.DataFrame) -> Figure:
    """Draw the gold gain over n by every selector, and its values at the most samples."""
    figure, (left, right) = style.panels(2, 3.0, width_ratios=(1.4, 1))
    for place, (selector, colour) in enumerate(COLOURS.items()):
        own = table[table["selector"] == selector]
        for _, line in own.groupby("seed"):
            left.plot(line["n"], line["gold"], lw=0.7, alpha=0.4, color=style.PALETTE[colour])
        mean = own.groupby("n")["gold"].mean()
        left.plot(mean.index, mean, "o-", ms=3, color=style.PALETTE[colour], label=selector)
        found = at(table, selector)
        right.plot(np.full(len(found), place), found, "o", ms=4, alpha=0.6, color=style.PALETTE[colour])
        right.plot(place, found.mean(), "_", ms=14, mew=2, color=style.INK)
    left.set_xscale("log", base=2)
    left.set_xticks(SIZES[::2], [str(n) for n in SIZES[::2]])
    left.minorticks_off()
    left.set_xlabel("n")
    left.set_title("Gold gain of Best-of-n")
    left.legend(fontsize=7, frameon=False)
    right.set_xticks(range(len(COLOURS)), list(COLOURS))
    right.set_xlim(-0.5, len(COLOURS) - 0.5)
    right.set_title(f"At n = {LAST}")
    return figure


PAPER = Paper(
    title="Helping or herding? Reward model ensembles mitigate but do not eliminate reward hacking",
    source="arXiv:2312.09244",
    figure="gold score of Best-of-N by ensembles",
    question="reward model alone",
    scales=training.scales(config, seeds=5, cost="a minute of one core per seed, after the shared stages"),
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="a pretraining ensemble is better than a fine-tuning ensemble",
            statement="ensembles by pretraining seed generalise better than those by fine-tuning seed only",
            number="-",
            statistic=lambda table: at(table, "pretraining") - at(table, "fine-tuning"),
            unit=f"difference in gold gain of Best-of-{LAST}",
            criterion=Above(0.0),
            null=same,
        ),
        Claim(
            name="a pretraining ensemble is better than single models",
            statement="both kinds of ensemble outperform individual reward models",
            number="-",
            statistic=lambda table: at(table, "pretraining") - at(table, "single"),
            unit=f"difference in gold gain of Best-of-{LAST}",
            criterion=Above(0.0),
            null=same,
        ),
        Claim(
            name="a fine-tuning ensemble is better than single models",
            statement="both kinds of ensemble outperform individual reward models",
            number="-",
            statistic=lambda table: at(table, "fine-tuning") - at(table, "single"),
            unit=f"difference in gold gain of Best-of-{LAST}",
            criterion=Above(0.0),
            null=same,
        ),
    ),
)
