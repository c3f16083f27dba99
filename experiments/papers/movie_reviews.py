"""The task of the papers that train on movie reviews, and sections of stages for them.

A smaller quickstart: a gold judge fitted to people's ratings of sentences; a transformer of one layer and width 48,
trained on the sentences, with a vocabulary of 1,024 words; pairs of its samples, labelled by the gold judge with noise;
and a reward model trained on these pairs. Scores are those of the gold judge, in standard deviations of the ratings.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from rlhf_jax.api import load_config

SHARED = ("gold", "sft", "preferences", "reward_model")
"""Stages that all of these papers begin with."""

OFFLINE = {"eval_every": 1000, "pack": False, "widths": 1}
"""Evaluation at the end only, and one compiled width, as all rows are short."""


def task(*, smoke: bool) -> ConfigDict:
    """Common fields, and the sections of the shared stages; `smoke` is a test that everything works."""
    quickstart = load_config("quickstart:smoke" if smoke else "quickstart").unlock()
    config = ConfigDict({name: quickstart[name] for name in ("seed", "seeds", "data", "runtime", *SHARED)})
    config.stages = SHARED
    config.data.max_response_tokens = 12
    config.sft.update({"sample_prompts": 0, **OFFLINE})
    config.reward_model.update(OFFLINE)
    if not smoke:
        config.sft.tokenizer.vocab_size = 1024
        config.sft.model.update({"d_model": 48, "d_ff": 192, "n_layers": 1})
        config.sft.epochs = 2.0
        config.reward_model.model.update({"d_model": 48, "d_ff": 192})
        config.preferences.update({"prompts": 1500, "eval_prompts": 150})
    return config


def add(config: ConfigDict, name: str, section: ConfigDict) -> None:
    """Add a stage at the end of the experiment."""
    config[name] = section
    config.stages = (*config.stages, name)


def dpo(*, smoke: bool, checkpoints: int, **fields: Any) -> ConfigDict:
    """Section of DPO as in the quickstart, half an epoch, with some fields changed."""
    section = load_config("quickstart:smoke" if smoke else "quickstart").unlock().dpo_01
    section.update({"sample_prompts": 0, **OFFLINE})
    section.loop.update({"checkpoint_every": checkpoints, "keep": 100})
    return with_fields(section, fields)


def ppo(*, smoke: bool, iterations: int, checkpoints: int, **fields: Any) -> ConfigDict:
    """Section of PPO as in the quickstart, with some fields changed."""
    section = load_config("quickstart:smoke" if smoke else "quickstart").unlock().ppo
    section.update({"iterations": section.iterations if smoke else iterations, "samples_written": 0})
    section.trim_padding = False
    section.loop.update({"checkpoint_every": checkpoints, "keep": 100})
    return with_fields(section, fields)


def group(method: str, *, smoke: bool, iterations: int, checkpoints: int, **fields: Any) -> ConfigDict:
    """Section of a group method with PPO's batch, in groups of four, and Adam's usual epsilon."""
    section = ppo(smoke=smoke, iterations=iterations, checkpoints=checkpoints)
    for name in ("kl_coef", "gamma", "gae_lambda", "clip_ratio", "value_clip", "vf_coef"):
        del section[name]
    section.optimizer.epsilon = 1e-8
    return with_fields(section, {"kind": "group_rl", "method": method, "num_generations": 4, **fields})


def more_sft(*, smoke: bool, epochs: float, **fields: Any) -> ConfigDict:
    """Section of further maximum likelihood from the SFT policy, with DPO's optimiser."""
    quickstart = load_config("quickstart:smoke" if smoke else "quickstart").unlock()
    section = with_fields(quickstart.sft, {"tokenizer": None, "epochs": epochs, "sample_prompts": 0})
    section.model = ConfigDict({"init": "sft"})
    section.optimizer = quickstart.dpo_01.optimizer
    section.update(OFFLINE)
    section.loop.update({"checkpoint_every": 40, "keep": 100})
    return with_fields(section, fields)


def set_rate(config: ConfigDict, rate: float) -> None:
    """Set the learning rate of every stage after the shared ones that trains a policy."""
    for name in config.stages[len(SHARED) :]:
        if config[name].kind in ("sft", "dpo", "ppo", "group_rl", "online_dpo"):
            config[name].optimizer.learning_rate = rate


def with_fields(section: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """Copy of a section with some fields changed."""
    section = section.copy_and_resolve_references()
    for name, value in fields.items():
        if isinstance(value, dict) and name in section:
            del section[name]  # whose type may differ
        section[name] = ConfigDict(value) if isinstance(value, dict) else value
    return section


def best_of_n(reward_model: str | dict[str, Any], *, smoke: bool, prompts: int, pool: int) -> ConfigDict:
    """Section of Best-of-n by a reward, for every power of two up to `pool`, scored by the gold judge."""
    section = {
        "kind": "best_of_n",
        "policy": "sft",
        "reward_model": reward_model,
        "judge": "gold",
        "prompts": 8 if smoke else prompts,
        "pool": pool,
        "temperature": 1.0,
    }
    return ConfigDict(section)


def frontier(policies: Sequence[str], *, smoke: bool, prompts: int) -> ConfigDict:
    """Section that samples every checkpoint of the policies, and scores the samples by the gold judge."""
    section = {
        "kind": "frontier",
        "reference": "sft",
        "policies": tuple(policies),
        "judge": "gold",
        "prompts": 64 if smoke else prompts,
        "temperature": 1.0,
        "kl_targets": (1.0,),
    }
    return ConfigDict(section)


def area(points: pd.DataFrame, most: float) -> float:
    r"""Mean gain in gold score over a frontier, for divergences up to `most` nats, evenly in $\sqrt{KL}$.

    The frontier is the highest score of any point with at most that divergence, interpolated linearly in $\sqrt{KL}$
    between points, and constant beyond the last. Args: points have the columns `kl` and `gold`, and the first is the
    initial policy.
    """
    start = points["gold"].iloc[0]
    ordered = points.assign(root=np.sqrt(points["kl"].clip(lower=0))).sort_values("root", kind="stable")
    best = np.maximum.accumulate(np.maximum(ordered["gold"].to_numpy(), start))
    roots = np.linspace(0, np.sqrt(most), 101)
    return float(np.mean(np.interp(roots, ordered["root"].to_numpy(), best) - start))


def areas(table: pd.DataFrame, methods: Sequence[str], most: float) -> np.ndarray:
    """Mean gain over the frontier of all checkpoints of some methods, for each seed; see `area`."""
    own = table[table["method"].isin(("sft", *methods))]
    return np.array([area(points, most) for _, points in own.groupby("seed")])


def last(table: pd.DataFrame, method: str, column: str = "gold") -> np.ndarray:
    """Value of a method at the end of training, for each seed."""
    return table[table["method"] == method].sort_values("step").groupby("seed")[column].last().to_numpy()


def without_effect(table: pd.DataFrame) -> pd.DataFrame:
    """Give every point the gold score of its seed's SFT policy."""
    start = table[table["method"] == "sft"].set_index("seed")["gold"]
    return table.assign(gold=table["seed"].map(start))
