"""Reward models trained on few, many and mislabelled comparisons, and one pool of samples that they choose from.

Added to the task of movie_reviews.py. All reward models have the same size and pass over their comparisons twice. The
comparisons of a smaller model are among those of a larger one. Gains are in standard deviations of the gold scores of
the SFT policy's samples, and so are scores of a reward model in standard deviations of its own scores.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.core.selection import best_of_n, best_of_n_kl
from rlhf_jax.papers import training
from rlhf_jax.reports.run import Run
from rlhf_jax.stages.pool import load_pool

REVIEWS = runpy.run_path(str(Path(__file__).with_name("movie_reviews.py")))

PAIRS = (300, 900, 2700, 8100)
"""Numbers of comparisons; the last is all of them."""

NOISY_PAIRS, NOISE, MEMBERS = 2700, 0.25, 5
"""Comparisons of the ensemble, the share of them with flipped labels, and its members, as in Coste et al. 2023."""

PROMPTS, SAMPLES = 32, 512
SIZES = tuple(2**i for i in range(10))
"""Values of n."""

KL = best_of_n_kl(np.array(SIZES))
"""Bound of the divergence of Best-of-n, for each n."""


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    found, add = REVIEWS["task"](smoke=smoke), REVIEWS["add"]
    sizes = (64, 128, 256, 512) if smoke else PAIRS
    variants = [(f"{pairs}", size, 0.0, 1) for pairs, size in zip(PAIRS, sizes, strict=True)]
    variants.append(("noisy", 128 if smoke else NOISY_PAIRS, NOISE, MEMBERS))
    variants.append(("shuffled", sizes[-2], 0.5, 1))
    for name, pairs, flipped, members in variants:
        labels = {"kind": "noisy_labels", "preferences": "preferences", "pairs": pairs, "flipped": flipped}
        add(found, f"pairs_{name}", ConfigDict(labels))
        section = REVIEWS["with_fields"](found.reward_model, {"preferences": f"pairs_{name}", "epochs": 2.0})
        section.optimizer.warmup_steps = 5
        section.loop.steps_per_call = 5
        if members > 1:
            section.ensemble = ConfigDict({"members": members, "combine": "mean"})
        add(found, f"reward_{name}", section)
    pool = {
        "kind": "pool",
        "policy": "sft",
        "reward_models": tuple(f"reward_{name}" for name, *_ in variants),
        "judge": "gold",
        "prompts": 4 if smoke else PROMPTS,
        "samples": SAMPLES,
        "temperature": 1.0,
    }
    add(found, "pool", ConfigDict(pool))
    return found


def run_each(scale: str, seeds: Sequence[int], workdir: Path) -> dict[int, Run]:
    """Run all stages for each seed; papers with the same ones share them."""
    one, shared = config(smoke=scale == "smoke"), REVIEWS["SHARED"]
    return training.run_each(one, seeds, workdir, shared=shared, further=one.stages[len(shared) :])


def pool(run: Run) -> dict[str, np.ndarray]:
    """Read the pool; scores have mean 0 and standard deviation 1 over all samples, and names lack `reward_`."""
    arrays = load_pool(run.directory("pool"))
    arrays |= {name: standardised(scores) for name, scores in arrays.items() if name != "length"}
    return {name.removeprefix("reward_"): values for name, values in arrays.items()}


def standardised(scores: np.ndarray) -> np.ndarray:
    """Shift and scale scores [..., prompts, samples] to mean 0 and standard deviation 1."""
    return (scores - scores.mean(axis=(-2, -1), keepdims=True)) / scores.std(axis=(-2, -1), keepdims=True)


def random_scores(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw scores that know nothing of the samples."""
    return np.random.default_rng((seed, 1)).random(shape)


def gains(proxy: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Mean over prompts of the gold score of the best of n by proxy score, for every n of `SIZES`."""
    return np.array([best_of_n(proxy, gold, n).mean() for n in SIZES])
