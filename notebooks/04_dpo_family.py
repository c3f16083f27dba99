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
# # 04 · The DPO family: losses, gradients, implicit rewards and likelihood displacement
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/04_dpo_family.ipynb)
#
# **Question.** There are over twenty losses for preference pairs. What do they change in a policy, and why does the
# probability of a *preferred* response often fall while the loss falls too?
#
# Runs in seconds on a CPU, without downloads. Notebook 03 derives DPO.

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
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from rlhf_jax.methods import tabular
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.reports import style

# %% [markdown]
# ## One number decides: the margin
#
# Write $\rho_w = \log \frac{\pi(y_w)}{\pi_{ref}(y_w)}$ for the chosen response and $\rho_l$ for the rejected one, in
# nats. Most losses are a function of the margin $\rho_w - \rho_l$:
#
# | loss | function of the margin $m = \beta(\rho_w - \rho_l)$ | source |
# |---|---|---|
# | DPO | $-\log \sigma(m)$ | Rafailov et al. 2023 |
# | cDPO | $-(1-\epsilon) \log \sigma(m) - \epsilon \log \sigma(-m)$ | Mitchell 2023 |
# | hinge | $\max(0, 1 - m)$ | Zhao et al. 2023 |
# | IPO | $\left(\frac{\rho_w}{\lvert y_w\rvert} - \frac{\rho_l}{\lvert y_l\rvert} - \frac{1}{2\beta}\right)^2$ | Azar et al. 2023 |
#
# `tabular.slopes` evaluates the losses of `rlhf_jax` for given log-ratios, and differentiates them. The slope is the
# force with which a pair pulls its two responses apart.

# %%
margins = jnp.linspace(-20.0, 40.0, 121)
shown = {
    "DPO": (PreferenceLossConfig(losses=("sigmoid",)), 0.2),
    "cDPO, ε = 0.1": (PreferenceLossConfig(losses=("cdpo",), label_smoothing=0.1), 0.2),
    "hinge": (PreferenceLossConfig(losses=("hinge",)), 0.2),
    "IPO": (PreferenceLossConfig(losses=("ipo",)), 0.25),
}
colours = dict(zip(shown, (style.PALETTE[name] for name in ("blue", "sky", "amber", "pink")), strict=True))
with style.context():
    margin_figure, (left, right) = style.panels(2, 3.0)
    for name, (loss, beta) in shown.items():
        found = tabular.slopes(loss, margins / 2, -margins / 2, ref_logprob=-30.0, tokens=10, beta=beta)
        force = (found.rejected - found.chosen) / 2
        at_zero = force[np.argmin(np.abs(margins))]
        left.plot(margins, found.loss / at_zero, color=colours[name], label=name)
        right.plot(margins, force / at_zero, color=colours[name], label=name)
    left.set_ylim(0, 45)
    left.set_title("Loss, scaled to slope 1 at margin 0")
    right.set_title("Force on the margin")
    right.axhline(0, color=style.MUTED, lw=0.8)
    right.set_ylim(-1.2, 2.2)
    for panel in (left, right):
        panel.set_xlabel("ρ of the chosen minus ρ of the rejected, nats")
    right.legend(fontsize=8, frameon=False)
margin_figure

# %% [markdown]
# DPO's force fades but never ends. The hinge stops at $1/\beta$ nats, here 5. IPO and cDPO pull back beyond a target: a
# pair that is already separated is pushed together again.
#
# ## On certain preferences, DPO has no finite optimum
#
# Azar et al. 2023 (arXiv:2310.12036) order three responses, a over b over c, with labels that never disagree. Then
# $p(a \succ b) = 1 = \sigma(m)$ asks for an infinite margin, whatever $\beta$ is. IPO asks for a finite one.

# %%
certain = tabular.Pairs(jnp.array([0, 1, 0]), jnp.array([1, 2, 2]), jnp.full(3, 1 / 3))
uniform, ones = jnp.full(3, -jnp.log(3.0)), jnp.ones(3, jnp.int32)
betas = (0.1, 0.5, 1.0)
with style.context():
    certain_figure, panels = style.panels(2, 2.6, sharey=True)
    for panel, (name, title) in zip(panels, (("sigmoid", "DPO"), ("ipo", "IPO")), strict=True):
        for beta, colour in zip(betas, style.shades(len(betas), style.PALETTE["blue"]), strict=True):
            curve = tabular.train_on_pairs(
                certain,
                uniform,
                jnp.eye(3),
                ones,
                loss=PreferenceLossConfig(losses=(name,)),
                beta=beta,
                learning_rate=0.01,
                steps=10_000,
            )
            panel.plot(jnp.exp(curve[::50, 0]), color=colour, label=f"β = {beta:g}")
        panel.set_title(f"{title}: probability of response a")
        panel.set_xticks([0, 100, 200], ["0", "5,000", "10,000"])
        panel.set_xlabel("steps")
        panel.set_ylim(0, 1.02)
    panels[1].legend(fontsize=8, frameon=False, loc="lower right")
certain_figure

# %% [markdown]
# ## Implicit rewards are as good as the data
#
# DPO's policy contains a reward model, $\hat r(y) = \beta \log \frac{\pi(y)}{\pi_{ref}(y)}$ up to a constant. Below, the
# labels of 100 and of 10,000 comparisons are drawn from the Bradley-Terry model and DPO is trained on them.

# %%
count, beta = 20, 0.5
rewards = jnp.linspace(-1.5, 1.5, count)
reference = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (count,)))
population = tabular.all_pairs(tabular.win_probabilities(rewards))
with style.context():
    implicit_figure, panels = style.panels(2, 2.8, sharey=True)
    for panel, size in zip(panels, (100, 10_000), strict=True):
        drawn = np.random.default_rng(0).multinomial(size, np.asarray(population.share, np.float64) / 1.0001)
        policy = tabular.train_on_pairs(
            population._replace(share=jnp.asarray(drawn / size, jnp.float32)),
            reference,
            jnp.eye(count),
            jnp.ones(count, jnp.int32),
            loss=PreferenceLossConfig(losses=("sigmoid",)),
            beta=beta,
            learning_rate=0.05,
            steps=1000,
        )[-1]
        implicit = beta * (policy - reference)
        panel.plot(rewards, implicit - implicit.mean(), "o", ms=4, color=style.PALETTE["blue"])
        panel.axline((0, 0), slope=1, color=style.MUTED, lw=0.8)
        panel.set_title(f"{size:,} comparisons")
        panel.set_xlabel("true reward")
    panels[0].set_ylabel("implicit reward of DPO")
implicit_figure

# %% [markdown]
# ## Likelihood displacement
#
# The loss rewards a *difference*. It falls when both responses become less likely, as long as the rejected one falls
# faster. In a network this is common, because similar responses share features. Razin et al. 2024 (arXiv:2410.08847)
# describe a minimal case: a model should refuse, and the pair says that "No" is better than "Never".
#
# Here a policy is a softmax of $x_y \cdot w$, where similar responses have similar features $x_y$. One step on the pair
# moves $w$ along $x_w - x_l$ and changes the logit of the chosen response in proportion to
#
# $$x_w \cdot (x_w - x_l) = \|x_w\|^2 - x_w \cdot x_l.$$
#
# The logit *falls* when $x_w \cdot x_l - \|x_w\|^2 > 0$. This number is the CHES score of a pair. The log-probability can fall
# at a lower score already, because it also depends on how much the other responses rise.

# %%
names = ("No", "Never", "Yes")
features = jnp.array([[1.0, 0.2], [1.5, 0.0], [-1.0, 0.2]])
start = jnp.log(jnp.array([0.45, 0.35, 0.2]))
pair = tabular.Pairs(jnp.array([0]), jnp.array([1]), jnp.array([1.0]))
losses = {
    "DPO": PreferenceLossConfig(losses=("sigmoid",)),
    "DPO + 0.5 SFT": PreferenceLossConfig(losses=("sigmoid", "sft"), loss_weights=(1.0, 0.5)),
    "DPOP, λ = 5": PreferenceLossConfig(losses=("dpop",), dpop_lambda=5.0),
}
curves = {
    name: tabular.train_on_pairs(pair, start, features, ones, loss=loss, beta=0.5, learning_rate=0.02, steps=200)
    for name, loss in losses.items()
}
with style.context():
    displaced_figure, panels = style.panels(3, 2.8, sharey=True)
    for panel, (title, curve) in zip(panels, curves.items(), strict=True):
        for response, colour in zip(range(3), ("green", "orange", "grey"), strict=True):
            panel.plot(jnp.exp(curve[:, response]), color=style.PALETTE[colour], label=names[response])
        panel.set_title(title)
        panel.set_xlabel("steps")
        panel.set_ylim(0, 1)
    panels[0].set_ylabel("probability")
    panels[2].legend(fontsize=8, frameon=False, loc="upper left")
displaced_figure

# %% [markdown]
# DPO learns the pair perfectly, and the model now answers "Yes". Two remedies keep the chosen response likely: a term of
# its own likelihood (as in RPO, CPO and ORPO), or DPOP's penalty on $\rho_w < 0$.
#
# Does the CHES score predict this? Random features and one pair each:

# %%
rng = np.random.default_rng(0)
rows = []
for _ in range(60):
    drawn = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    ches = float(drawn[0] @ drawn[1] - drawn[0] @ drawn[0])
    flat = jnp.full(8, -jnp.log(8.0))
    for name in ("DPO", "DPOP, λ = 5"):
        curve = tabular.train_on_pairs(
            pair, flat, drawn, jnp.ones(8, jnp.int32), loss=losses[name], beta=0.5, learning_rate=0.02, steps=40
        )
        rows.append({"loss": name, "CHES": ches, "change": float(curve[-1, 0] - curve[0, 0])})
changes = pd.DataFrame(rows)
with style.context():
    ches_figure, (panel,) = style.panels(1, 3.0)
    for name, colour in (("DPO", "blue"), ("DPOP, λ = 5", "amber")):
        own = changes[changes["loss"] == name]
        mark = {"ms": 4} if name == "DPO" else {"ms": 7, "mfc": "none"}
        panel.plot(own["CHES"], own["change"], "o", color=style.PALETTE[colour], label=name, **mark)
    panel.axhline(0, color=style.MUTED, lw=0.8)
    panel.set_xlabel("CHES score of the pair")
    panel.set_title("Change in the log-probability of the chosen response, nats")
    panel.legend(fontsize=8, frameon=False)
ches_figure

# %% [markdown]
# ## What to notice
#
# - **Losses differ in what happens after a pair is separated.** Before that, they all push in the same direction. With
#   few epochs and a small learning rate most of them give the same policy; see the comparison at equal divergence in
#   `experiments/movie_reviews/comparison.py`.
# - **With certain labels, $\beta$ of DPO does not limit the policy.** Only the number of steps does. Human labels are
#   noisy, but a pair that occurs once in a data set has exactly one label, which looks certain.
# - **The margin says nothing about the chosen response alone.** Log `logps/chosen` beside `rewards/margins`. A fall of
#   the former is displacement. Whether it is harmful depends on where the probability goes, so read samples.
# - On trained networks the same holds: in our reproduction (`experiments/papers/razin_2024`), preferred responses lost
#   many nats among pairs with the highest CHES scores and none among those with the lowest, while all margins rose.
#
# ## Exercise
#
# `PreferenceLossConfig(losses=("apo_down",))` is meant for pairs of which both responses are worse than the model's own:
#
# $$L = \sigma(\beta \rho_w) + \sigma(\beta (\rho_l - \rho_w)).$$
#
# Predict what it does to "No" in the example above. Then train on `pair` with it, and print the last probabilities.
#
# <details><summary>Answer</summary>
#
# ```python
# curve = tabular.train_on_pairs(pair, start, features, ones, loss=PreferenceLossConfig(losses=("apo_down",)),
#                                beta=0.5, learning_rate=0.02, steps=200)
# dict(zip(names, jnp.exp(curve[-1])))
# ```
#
# The first term of the loss lowers the chosen response on purpose, and the second one only asks that the rejected one falls
# further. "Yes" gains nearly everything. A loss encodes an assumption about the data, here that both
# responses are bad. Applied to other data, it does harm without any sign of it in the margin.
#
# </details>
