"""The smoke variant of experiments/preferences.py, and beside its stages DAPO, on a Python function's scores."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

PREFERENCES = Path(__file__).parents[2] / "experiments/preferences.py"


def get_config() -> ConfigDict:
    """The experiment of the tests that kill it."""
    config = runpy.run_path(str(PREFERENCES))["get_config"]("smoke")
    config.unlock()
    shared = ("policy", "iterations", "batch_size", "minibatches", "epochs", "temperature", "optimizer", "loop")
    config.dapo = ConfigDict(
        {
            **{name: config.ppo[name] for name in (*shared, "samples_every", "samples_written")},
            "kind": "group_rl",
            "method": "dapo",
            "num_generations": 2,
            "dynamic_sampling_rounds": 4,
            "reward_model": {"functions": (f"{__file__}:is_even",)},
        }
    )
    return config.lock()


def is_even(completions: list[str]) -> list[float]:
    """Half of all groups of two have different scores: a batch needs several rounds, or is not filled."""
    return [float(len(completion) % 2 == 0) for completion in completions]
