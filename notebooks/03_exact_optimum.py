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
# # 03 · KL-regularised RL on a space that can be enumerated
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/03_exact_optimum.ipynb)
#
# **Question.** DPO, PPO and Best-of-N all move a policy towards a reward while it stays close to a reference. Do they
# reach the same policy? With ten possible responses every expectation is a sum, the best policy has a closed form, and
# the question has an exact answer.
#
# Runs in seconds on a CPU, without downloads.

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

from rlhf_jax.core.selection import best_of_n_distribution, best_of_n_kl
from rlhf_jax.methods import tabular
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.reports import style

# %% [markdown]
# ## A world of ten responses
#
# One prompt has ten responses. The reference gives each of them a probability and the reward scores them. The best
# response is rare under the reference, as it is in practice: a model seldom writes its best answer by chance.

# %%
count = 10
rewards = jnp.linspace(0.0, 3.0, count)
reference = jax.nn.log_softmax(-1.2 * rewards + jax.random.normal(jax.random.key(3), (count,)))
pd.DataFrame({"reward": rewards, "reference": jnp.exp(reference)}).round(3).T

# %% [markdown]
# ## The optimum
#
# The objective of RLHF is the expected reward minus a penalty on the divergence from the reference:
#
# $$\max_\pi \; \mathbb{E}_{y \sim \pi}[r(y)] - \beta\, \mathrm{KL}(\pi \,\|\, \pi_{ref}),
# \qquad \pi^*(y) = \frac{1}{Z}\, \pi_{ref}(y)\, e^{r(y)/\beta}.$$
#
# The optimum is the reference, tilted towards high rewards. A small $\beta$ tilts more.

# %%
betas = (1.0, 0.5, 0.25)
optima = {beta: tabular.optimum(reference, rewards, beta=beta) for beta in betas}
with style.context():
    optimum_figure, (bars,) = style.panels(1, 2.8)
    shades = style.shades(len(betas), style.PALETTE["blue"])
    positions, width = np.arange(count), 0.2
    bars.bar(positions - 1.5 * width, jnp.exp(reference), width, color=style.MUTED, label="reference")
    for place, (beta, logprobs) in enumerate(optima.items()):
        offset = (place - 0.5) * width
        bars.bar(positions + offset, jnp.exp(logprobs), width, color=shades[place], label=f"optimum, β = {beta:g}")
    bars.set_xticks(positions, [f"{reward:.1f}" for reward in rewards])
    bars.set_xlabel("reward of the response")
    bars.set_title("Probability of each response")
    bars.legend(fontsize=8, frameon=False, loc="upper center")
optimum_figure

# %% [markdown]
# ## DPO
#
# Solve the optimum for the reward, $r(y) = \beta \log \frac{\pi^*(y)}{\pi_{ref}(y)} + \beta \log Z$. In the
# Bradley-Terry model $p(y_w \succ y_l) = \sigma(r(y_w) - r(y_l))$ the constant cancels, so that the preferences depend on
# the policy alone. DPO is maximum likelihood in this model:
#
# $$L_{DPO} = -\mathbb{E}\left[\log \sigma\left(\beta \log \tfrac{\pi(y_w)}{\pi_{ref}(y_w)}
# - \beta \log \tfrac{\pi(y_l)}{\pi_{ref}(y_l)}\right)\right].$$
#
# `train_on_pairs` minimises this loss (`rlhf_jax.preference_losses.sigmoid_loss`) with exact gradients. `pairs` holds all
# ordered pairs of responses: the indices `chosen` and `rejected`, and as `share` the probability of the label, so that there
# is no sampling noise.

# %%
beta = 0.5
optimum = optima[beta]
pairs = tabular.all_pairs(tabular.win_probabilities(rewards))
features, lengths = jnp.eye(count), jnp.ones(count, jnp.int32)  # a logit for each response, of one token
dpo = tabular.train_on_pairs(
    pairs,
    reference,
    features,
    lengths,
    loss=PreferenceLossConfig(losses=("sigmoid",)),
    beta=beta,
    learning_rate=0.05,
    steps=300,
)

# %% [markdown]
# ## PPO
#
# PPO sees the reward instead of preferences, and it samples. It maximises the clipped surrogate
#
# $$\mathbb{E}\left[\min\left(\rho A,\; \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon)\, A\right)\right],
# \qquad \rho = \frac{\pi(y)}{\pi_{old}(y)},$$
#
# where the advantage $A$ is the reward less the penalty, $r(y) - \beta \log \frac{\pi(y)}{\pi_{ref}(y)}$, minus a learned
# value. Each of the 150 iterations samples 256 responses and makes two updates.

# %%
ppo = tabular.train_ppo(
    jax.random.key(0),
    rewards,
    reference,
    kl_coef=beta,
    clip_ratio=0.2,
    learning_rate=0.05,
    batch_size=256,
    epochs=2,
    iterations=150,
)
distance = {"DPO": tabular.divergence(dpo, optimum), "PPO": tabular.divergence(ppo, optimum)}
{name: f"{abs(float(curve[-1])):.6f} nats from the optimum" for name, curve in distance.items()}

# %% [markdown]
# ## Best-of-N
#
# Best-of-N trains nothing: it samples $n$ responses and keeps the best one. Its distribution is known too. If
# $F(y)$ is the probability that the reference samples a response that is at most as good as $y$, and $F^-(y)$ the
# probability of a worse one, then
#
# $$\pi_n(y) = F(y)^n - F^-(y)^n, \qquad \mathrm{KL}(\pi_n \,\|\, \pi_{ref}) \le \log n - \frac{n - 1}{n}.$$

# %%
sizes = (1, 2, 4, 8, 16, 32)
chances = np.exp(np.asarray(reference, np.float64))
best = jnp.stack([jnp.asarray(best_of_n_distribution(chances, rewards, n)) for n in sizes])
best_logprobs = jnp.log(jnp.maximum(best, 1e-30))  # a probability may round to 0
best_kl = tabular.divergence(best_logprobs, reference)
pd.DataFrame(
    {
        "n": sizes,
        "reward": tabular.mean(best_logprobs, rewards),
        "KL": best_kl,
        "usual formula": best_of_n_kl(sizes),
    }
).round(3)

# %% [markdown]
# ## All of them in one plane
#
# The optima for all $\beta$ form the frontier: at a given divergence no policy has a higher expected reward.

# %%
grid = jnp.exp(jnp.linspace(jnp.log(0.08), jnp.log(20.0), 60))
frontier = jnp.stack([tabular.optimum(reference, rewards, beta=beta) for beta in grid])
colours = {"DPO": style.PALETTE["blue"], "PPO": style.PALETTE["orange"]}
with style.context():
    plane_figure, (left, right) = style.panels(2, 3.4)
    left.plot(
        tabular.divergence(frontier, reference), tabular.mean(frontier, rewards), color=style.INK, label="all optima"
    )
    for name, curve in (("DPO", dpo), ("PPO", ppo)):
        path = curve[:: len(curve) // 40]
        left.plot(
            tabular.divergence(path, reference),
            tabular.mean(path, rewards),
            ".",
            ms=4,
            color=colours[name],
            label=f"{name} during training",
        )
    left.plot(best_kl, tabular.mean(best_logprobs, rewards), "s", ms=4, color=style.PALETTE["pink"], label="Best-of-N")
    left.plot(
        tabular.divergence(optimum, reference),
        tabular.mean(optimum, rewards),
        "o",
        ms=10,
        mfc="none",
        color=style.INK,
        label=f"optimum, β = {beta:g}",
    )
    left.set_xlim(-0.1, 3)
    left.set_ylim(0.5, 2.5)
    left.set_xlabel("KL from the reference, nats")
    left.set_title("Expected reward")
    left.legend(fontsize=7.5, frameon=False, loc="lower right")
    for name, curve in distance.items():
        right.plot(np.linspace(0, 1, len(curve)), jnp.maximum(curve, 1e-8), color=colours[name], label=name)
    right.set_yscale("log")
    right.set_ylim(1e-7, 2)  # smaller numbers are rounding
    right.set_xlabel("share of training")
    right.set_title("KL from the optimum, nats")
    right.legend(fontsize=8, frameon=False)
plane_figure

# %% [markdown]
# ## What to notice
#
# - **DPO and PPO end at the same policy.** With exact preferences and enough steps, DPO reaches the optimum of its own
#   $\beta$ up to rounding. PPO reaches it as well, up to the noise of its samples. The methods differ in what they need
#   (pairs, or a reward and samples), not in where they go. The differences that papers report come from finite data, a
#   learned reward, and networks that share parameters between responses. Notebooks 04 and 06 add these one at a time.
# - **They take different paths.** During training both stay close below the frontier, so that stopping early looks like
#   a larger $\beta$. A comparison at different divergences therefore compares strengths, not methods.
# - **Best-of-N is close to the frontier at small divergences, and falls behind at larger ones.** It uses the rank of a
#   reward and ignores its size. Its divergence is below the usual formula as soon as responses repeat, as the table shows.
#
# ## Exercise
#
# DPO saw all pairs. Keep only the pairs in which both responses are among the five best, `rewards > 1.5`, scale their `share`
# to sum 1, and train again. Which probabilities does the loss still determine, and what happens to the other five responses?
#
# <details><summary>Answer</summary>
#
# ```python
# inside = (rewards[pairs.chosen] > 1.5) & (rewards[pairs.rejected] > 1.5)
# some = tabular.Pairs(*(leaf[inside] for leaf in pairs))
# some = some._replace(share=some.share / some.share.sum())
# partial = tabular.train_on_pairs(some, reference, features, lengths,
#                                  loss=PreferenceLossConfig(), beta=beta, learning_rate=0.05, steps=300)
# jnp.exp(jnp.stack([partial[-1], optimum]))
# ```
#
# The loss contains ratios between the five best responses only, and these ratios are those of the optimum. Nothing in
# the loss determines how much probability the five have together: any share of it gives the same loss. The result
# depends on where training starts and on how it moves. This is the argument of Xu et al. 2024 (arXiv:2404.10719), and
# the reason why online methods, which sample from the policy itself, keep a check on all responses.
#
# </details>
