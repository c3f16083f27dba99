"""Best-of-N by reward models trained on few, many and mislabelled comparisons.

    rlhf-jax --config=selection --workdir=runs/selection

The reward models score one pool of samples, `pool/pool.npz`. Several papers of experiments/papers compute Best-of-N,
ensembles and pessimistic selection from it.

Task and judge are the quickstart's; the policy is smaller, because only its samples are needed. Every reward model has
the same size, and passes over its comparisons once, but takes at least 40 updates.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

QUICKSTART = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))

PAIRS = (300, 900, 2700, 8100)
"""Comparisons that a reward model is trained on; the last is all of them."""

NOISY_PAIRS, NOISE = 2700, 0.25
"""Comparisons of the ensemble, and the share of them with flipped labels, as in Coste et al. 2023."""

BATCH, UPDATES = 64, 40


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment, or its `smoke` variant, which only tests that everything works."""
    config = QUICKSTART["get_config"](arg)
    config.unlock()
    for name in set(config.stages) - {"gold", "sft", "preferences", "reward_model"}:
        del config[name]
    rewards, sizes = config.reward_model, PAIRS
    del config["reward_model"]
    if arg == "smoke":
        sizes, samples, prompts = (64, 128), 16, 4
    else:
        samples, prompts = 1024, 48
        config.sft.model.update(QUICKSTART["model"](d_model=64, n_layers=2))
        config.sft.epochs = 3.0
        config.preferences.update({"prompts": 1500, "eval_prompts": 150})
    config.stages = ("gold", "sft", "preferences")
    names = []
    for name, pairs, flipped, members in variants(sizes):
        config[f"pairs_{name}"] = noisy_labels(pairs, flipped)
        config[f"reward_{name}"] = rewards.copy_and_resolve_references()
        config[f"reward_{name}"].update({"preferences": f"pairs_{name}", "eval_every": 1000, "widths": 1})
        config[f"reward_{name}"].epochs = max(1.0, UPDATES * BATCH / pairs)
        config[f"reward_{name}"].optimizer.warmup_steps = 5
        if members > 1:
            config[f"reward_{name}"].ensemble = ConfigDict({"members": members, "combine": "mean"})
        config.stages += (f"pairs_{name}", f"reward_{name}")
        names.append(f"reward_{name}")
    config.pool = ConfigDict(
        {
            "kind": "pool",
            "policy": "sft",
            "reward_models": tuple(names),
            "judge": "gold",
            "prompts": prompts,
            "samples": samples,
            "temperature": 1.0,
        }
    )
    config.stages += ("pool",)
    return config.lock()


def variants(sizes: tuple[int, ...]) -> list[tuple[str, int, float, int]]:
    """List the reward models: name, comparisons, share of flipped labels, and members."""
    noisy = min(NOISY_PAIRS, sizes[-1])
    return [
        *((str(pairs), pairs, 0.0, 1) for pairs in sizes),
        ("noisy", noisy, NOISE, 5),
        ("shuffled", sizes[-1], 0.5, 1),
    ]


def noisy_labels(pairs: int | None, flipped: float) -> ConfigDict:
    """Section of a stage that keeps some pairs and flips some labels."""
    return ConfigDict({"kind": "noisy_labels", "preferences": "preferences", "pairs": pairs, "flipped": flipped})
