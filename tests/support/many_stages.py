"""The smoke variant of experiments/preferences.py with a stage of nearly every kind, and short times between files."""

import os
import runpy
from pathlib import Path

import jax
from ml_collections import ConfigDict

STAGES = (
    *("sft", "preferences", "noisy_labels", "reward_model", "dpo", "kto", "ppo", "host_ppo", "dapo", "online_dpo"),
    *("rejection_sampling", "best_of_n", "pool", "frontier", "evaluate"),
)
CALLS = "RLHF_JAX_TEST_CALLS"
"""Environment variable with the file in which `is_even` counts its calls."""


def get_config() -> ConfigDict:
    """The experiment; `stages` may name any of STAGES."""
    path = Path(__file__).parents[2] / "experiments/preferences.py"
    config = runpy.run_path(str(path))["get_config"]("smoke")
    config.unlock()
    config.stages = STAGES
    rewards = {"functions": (f"{__file__}:is_even",)}
    config.host_ppo = ConfigDict({**config.ppo.to_dict(), "reward_model": rewards})
    shared = ("policy", "iterations", "batch_size", "minibatches", "epochs", "temperature", "optimizer", "loop")
    online = {name: config.ppo[name] for name in (*shared, "samples_every", "samples_written")}
    groups = {"method": "dapo", "num_generations": 2, "dynamic_sampling_rounds": 4}
    config.dapo = ConfigDict({**online, **groups, "kind": "group_rl", "reward_model": rewards})
    config.online_dpo = ConfigDict({**online, "kind": "online_dpo", "reward_model": "reward_model", "beta": 0.1})
    offline = ("policy", "preferences", "beta", "optimizer", "epochs", "sample_prompts", "eval_every", "loop", "tuning")
    config.kto = ConfigDict({name: config.dpo[name] for name in offline} | {"kind": "kto", "batch_size": 16})
    drawn = {"policy": "sft", "temperature": 1.0, "prompts": 16}
    sampled = {**drawn, "reward_model": rewards, "eval_prompts": 4, "samples_per_prompt": 3}
    config.preferences = ConfigDict({**sampled, "kind": "preferences", "judge": None, "label_beta": None})
    config.noisy_labels = ConfigDict(
        {"kind": "noisy_labels", "preferences": "preferences", "pairs": None, "flipped": 0.2}
    )
    config.rejection_sampling = ConfigDict({**sampled, "kind": "rejection_sampling", "keep": {"best": 1}})
    models = {**drawn, "judge": None}
    config.best_of_n = ConfigDict({**models, "kind": "best_of_n", "reward_model": "reward_model", "pool": 4})
    config.pool = ConfigDict({**models, "kind": "pool", "reward_models": ("reward_model",), "samples": 4})
    config.frontier = ConfigDict(
        {
            **{name: value for name, value in drawn.items() if name != "policy"},
            **{"kind": "frontier", "reference": "sft", "policies": ("dpo", "ppo"), "judge": "reward_model"},
            "kl_targets": (0.01,),
        }
    )
    for name in ("ppo", "host_ppo", "dapo", "online_dpo"):
        config[name].update({"iterations": 4})
        config[name].loop.steps_per_call = 1  # several calls, between which a process may stop
    for name in ("sft", "reward_model", "dpo", "kto", "ppo", "host_ppo", "dapo", "online_dpo"):
        config[name].loop.checkpoint_every = 2
    return config.lock()


def is_even(completions: list[str]) -> list[float]:
    """Score completions, and count the call."""
    with open(os.environ[CALLS], "a") as file:
        file.write(f"{jax.process_index()}\n")
    return [float(len(completion) % 2) for completion in completions]
