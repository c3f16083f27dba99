"""A small quickstart, whose stages take seconds: the task of the notebooks.

    rlhf-jax fetch movie_reviews
    rlhf-jax --config=lectures --workdir=runs/lectures

The task is that of the papers on movie reviews (`experiments/papers/movie_reviews.py`): the quickstart's gold judge, a
transformer of one layer and width 48, answers of 12 tokens, and a reward model of the same size. The numbers are
rougher than the quickstart's, but they have the same order.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

REVIEWS = runpy.run_path(str(Path(__file__).parents[1] / "papers" / "movie_reviews.py"))


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment, or its `smoke` variant, which only tests that everything works."""
    if arg not in ("", "smoke"):
        raise ValueError(f"lectures.py takes no argument but smoke, not {arg!r}")
    size = {"smoke": arg == "smoke"}
    config, add = REVIEWS["task"](**size), REVIEWS["add"]
    add(config, "best_of_n", REVIEWS["best_of_n"]("reward_model", **size, prompts=64, pool=64))
    add(config, "dpo", REVIEWS["dpo"](**size, checkpoints=20, beta=0.1))
    add(config, "ppo", REVIEWS["ppo"](**size, iterations=40, checkpoints=10, kl_coef=0.1, samples_every=5))
    config.ppo.samples_written = 64
    REVIEWS["set_rate"](config, 1e-3)
    evaluate = {
        "kind": "evaluate",
        "reference": "sft",
        "policies": ("dpo", "ppo"),
        "best_of": (16,),
        "reward_model": "reward_model",
        "judge": "gold",
        "prompts": 64 if size["smoke"] else 400,
        "selection_prompts": 64,
        "temperature": 1.0,
    }
    add(config, "evaluate", ConfigDict(evaluate))
    return config
