"""Verifiers of two sizes for generators of two sizes, on arithmetic word problems.

The task is that of experiments/arithmetic.py, with 12,000 training problems, all of which SFT reads. Both generators
learn the same worked solutions. The solutions that each samples for training problems are labelled by their answers,
and verifiers of both sizes, which start from the generator of their own size, learn to classify them. A control learns
from shuffled labels. For each generator there is one pool of solutions of test problems, with the scores of its
verifiers and the exact reward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.api import load_config
from rlhf_jax.papers import training
from rlhf_jax.reports.run import Run
from rlhf_jax.stages.pool import load_pool

PROMPTS, SAMPLES = 64, 256
SIZES = tuple(2**i for i in range(9))
"""Values of n."""

GENERATORS = {"large": "sft", "small": "sft_small"}
"""Stages of the generators, by size; a verifier of a size starts from the generator of that size."""

SMALL = {"d_model": 24, "d_ff": 96, "n_layers": 1}
"""Shape of the small models."""


class Pool(NamedTuple):
    """Solutions of one generator: scores of its verifiers, and which solutions are right, [problems, samples]."""

    scores: dict[str, np.ndarray]
    right: np.ndarray


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    task = load_config("arithmetic:smoke" if smoke else "arithmetic").unlock()
    found = ConfigDict({name: task[name] for name in ("seed", "seeds", "data", "runtime", "sft")})
    found.stages = ("sft",)
    found.sft.update({"sample_prompts": 0, "eval_every": 1000})
    if not smoke:
        found.data.train = "arithmetic:train,problems=12000,steps=1-2,largest=10"
        found.sft.epochs = 1.2
    small = found.sft.copy_and_resolve_references()
    small.model.update({"d_model": 24, "d_ff": 96} if smoke else SMALL)
    add(found, "sft_small", small)
    for generator, policy in GENERATORS.items():
        pairs = task.pairs.copy_and_resolve_references()
        pairs.policy = policy
        add(found, f"pairs_{generator}", pairs)
        names = []
        for verifier, start in GENERATORS.items():
            names.append(add(found, f"verifier_{generator}_{verifier}", verifying(task, f"pairs_{generator}", start)))
        if generator == "large":
            labels = {"kind": "noisy_labels", "preferences": "pairs_large", "pairs": None, "flipped": 0.5}
            add(found, "labels_shuffled", ConfigDict(labels))
            names.append(add(found, "verifier_large_shuffled", verifying(task, "labels_shuffled", "sft")))
        pool = {
            "kind": "pool",
            "policy": policy,
            "reward_models": tuple(names),
            "judge": task.best_of_n.judge,
            "prompts": 8 if smoke else PROMPTS,
            "samples": SAMPLES,
            "temperature": 1.0,
        }
        add(found, f"pool_{generator}", ConfigDict(pool))
    return found


def add(config: ConfigDict, name: str, section: ConfigDict) -> str:
    """Add a stage at the end of the experiment, and return its name."""
    config[name] = section
    config.stages = (*config.stages, name)
    return name


def verifying(task: ConfigDict, pairs: str, start: str) -> ConfigDict:
    """Section of a verifier that starts from a generator."""
    section = task.verifier.copy_and_resolve_references()
    section.update({"preferences": pairs, "eval_every": 1000})
    section.model.init = start
    return section


def run_each(scale: str, seeds: Sequence[int], workdir: Path) -> dict[int, Run]:
    """Run all stages for each seed; papers with the same ones share them."""
    one = config(smoke=scale == "smoke")
    return training.run_each(one, seeds, workdir, shared=one.stages)


def pool(run: Run, generator: str) -> Pool:
    """Read the pool of a generator, with its verifiers by size (or `shuffled`)."""
    arrays = load_pool(run.directory(f"pool_{generator}"))
    start = f"verifier_{generator}_"
    scores = {name.removeprefix(start): values for name, values in arrays.items() if name.startswith(start)}
    return Pool(scores, arrays["gold"] == 1)
