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
# # 02 · The anatomy of one PPO iteration
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/02_ppo_anatomy.ipynb)
#
# **Question.** Between a batch of prompts and a new policy, PPO computes eight arrays with a number for every token. What
# do they look like on a real response, and which equation makes each from the ones before?
#
# The notebook trains a small language model on movie reviews, runs PPO for a while, then stops and takes one iteration
# apart. About a minute and a half on two cores; the reviews are a small download.

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

import rlhf_jax
from rlhf_jax import advantages, experiment, policy_losses
from rlhf_jax.core.sequences import joined
from rlhf_jax.data import pipeline
from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_parts import Networks, OnlineBatch
from rlhf_jax.reports import style
from rlhf_jax.stages.ppo import build_method, start_value
from rlhf_jax.types import PromptBatch

# %% [markdown]
# ## Before PPO: an SFT policy and a reward model
#
# `lectures` is the quickstart's task in small. Its first four stages fit a judge, train the policy, let it answer prompts,
# label pairs of answers, and train a reward model on them. Notebook 01 explains them.

# %%
rlhf_jax.fetch("movie_reviews")
before = ("gold", "sft", "preferences", "reward_model")
run = rlhf_jax.run(rlhf_jax.load_config("lectures", {"stages": before}), "runs/lectures")
policy, reward_model = run.load_policy("sft"), run.load_reward_model("reward_model")

# %% [markdown]
# ## The objects of a PPO stage
#
# A stage of kind `ppo` makes these objects from its config and then calls `iteration.step` in a loop. We do the same for 15
# iterations, so that policy and value function have learned something before we look.

# %%
parsed = experiment.parse(rlhf_jax.load_config("lectures"))
config, width = parsed.stages["ppo"], parsed.data.max_prompt_tokens
value = start_value(config, policy, reward_model, jax.random.key(0))
networks = Networks(policy.network, value.network, policy.tokenizer.stop_ids, parsed.data.max_response_tokens)
iteration = Iteration(networks, config, (), (), build_method(config))

frozen = {"reference": policy.params, "reward": reward_model.params}
state = iteration.init_state({"policy": policy.params, "value": value.params})
prompts = pipeline.prompts(pipeline.load_rows(parsed.data, "train"), policy.tokenizer, parsed.data)
rows = np.arange(config.batch_size)
batches = [
    OnlineBatch(PromptBatch(prompts.tokens[first + rows], prompts.mask[first + rows], jnp.asarray(rows)))
    for first in range(0, 16 * len(rows), len(rows))
]
key = jax.random.key(1)
step = jax.jit(iteration.step(reward_model.network))
for batch in batches[:15]:
    state, logged, _ = step(state, frozen, batch, key)
{name: round(float(logged[name]), 3) for name in ("objective/scores", "objective/kl", "val/explained_variance")}

# %% [markdown]
# ## Steps 1 and 2: sample and score
#
# The policy answers each prompt, $y \sim \pi(\cdot|x)$, and the reward model gives one score $r(x, y)$ to a whole answer.

# %%
sampled = iteration.sample(state, frozen, batches[15], key, width)
sequences = joined(sampled.rollout)
scores = reward_model.network.scores(reward_model.params, sequences)
mask = sequences.response_mask
texts = [policy.tokenizer.decode(ids[own].tolist()) for ids, own in zip(sequences.tokens, sequences.mask, strict=True)]
dict(zip(texts[:5], np.round(np.asarray(scores[:5]), 2).tolist(), strict=True))

# %% [markdown]
# ## Step 3: log-probabilities and KL
#
# Forward passes of policy, reference and value function give $\log \pi(a_t)$, $\log \pi_{ref}(a_t)$ and $V_t$ for every
# token of the answers. Their difference estimates the divergence of a token without bias:
#
# $$\mathrm{KL}_t = \log \pi(a_t) - \log \pi_{ref}(a_t).$$
#
# ## Step 4: token rewards and advantages
#
# Every token pays the penalty, and the last one also gets the score. GAE compares what came with what was expected:
#
# $$r_t = -\beta\, \mathrm{KL}_t + [t = T]\, r(x, y), \qquad
# \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad \hat A_t = \sum_{l \ge 0} (\gamma\lambda)^l\, \delta_{t+l}.$$
#
# Advantages are then whitened: shifted and scaled to mean 0 and variance 1 over all tokens of the batch.

# %%
params = networks.full_params(state.params, frozen)
evaluated = iteration.evaluate(params, frozen, iteration.scored(sampled, scores), sequences)
values = evaluated.old.values
rewards = advantages.token_rewards(evaluated.scores, evaluated.kl, mask, kl_coef=config.kl_coef)
raw, returns = advantages.gae(rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
experience, _ = iteration.method.learner.prepare(iteration, evaluated, frozen, config.kl_coef)

# %% [markdown]
# ## Steps 5 and 6: epochs of updates
#
# The batch is split into two minibatches, for two epochs: four updates of Adam. The loss of a token is
#
# $$-\min\left(\rho_t \hat A_t,\; \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)\, \hat A_t\right),
# \qquad \rho_t = \frac{\pi_{new}(a_t)}{\pi_{old}(a_t)}.$$
#
# `optimise` makes the updates. A forward pass afterwards shows how far each token has moved.

# %%
after, updated = iteration.optimise(state, frozen, experience, sampled, key, config.kl_coef, None)
new, _ = networks.forward(networks.full_params(after.params, frozen), sequences, temperature=config.temperature)
clip = {"clip_ratio": config.clip_ratio, "clip_ratio_high": config.upper_clip_ratio, "dual_clip": np.inf}
tokens = policy_losses.ppo_clip(new.logprobs, evaluated.old.logprobs, experience.advantages, mask, **clip)
ratio = jnp.exp(jnp.where(mask, new.logprobs - evaluated.old.logprobs, 0))
{name: round(float(updated[name]), 4) for name in ("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio")}

# %% [markdown]
# ## All arrays of one answer
#
# Each row is an array, each column a token. Colours are scaled by row: orange is positive, purple negative.

# %%
lengths = np.asarray(mask.sum(axis=1))
whole = np.flatnonzero(np.asarray(evaluated.ended) & (lengths >= 6) & (lengths <= 10))
shown = int(whole[np.argmax(np.asarray(evaluated.scores)[whole])])
length = int(lengths[shown])
arrays = {
    "log π": evaluated.old.logprobs,
    "log π of the reference": evaluated.ref_logprobs,
    "KL": evaluated.kl,
    "reward": rewards,
    "value": values,
    "advantage": raw,
    "whitened": experience.advantages,
    "ratio after updates − 1": ratio - 1,
}
table = np.stack([np.asarray(array[shown, :length]) for array in arrays.values()])
response = np.asarray(sequences.response[shown, :length])
words = ["end" if token in networks.stop_ids else policy.tokenizer.decode([int(token)]) for token in response]
prompt = policy.tokenizer.decode(sampled.rollout.prompt[shown][sampled.rollout.prompt_mask[shown]].tolist())
with style.context():
    token_figure, (panel,) = style.panels(1, 3.8)
    scale = np.abs(table).max(axis=1, keepdims=True)
    panel.imshow(table / scale, cmap="PuOr_r", vmin=-1.6, vmax=1.6, aspect="auto")
    for row, column in np.ndindex(*table.shape):
        panel.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center", fontsize=7.5)
    panel.set_xticks(range(length), words)
    panel.set_yticks(range(len(arrays)), list(arrays))
    panel.grid(visible=False)
    panel.tick_params(length=0)
    panel.set_title(f"“{prompt} …”, score {float(scores[shown]):.2f}")
token_figure

# %% [markdown]
# Read it from top to bottom (in the stored output the prompt of the answer is an ellipsis). The reward row is $-\beta$ times the
# KL row, except for the last token, which carries the score. The value row guesses the sum of the rewards from there on. An
# advantage is positive where the answer turned out better than the value expected. One would expect every token with a
# positive advantage to be more likely in the last row, but some are not: all tokens of the batch share the weights, and an
# update that serves most of them does not serve each.
#
# ## What lambda does
#
# With $\lambda = 1$ the advantage is all future reward minus the value; with $\lambda = 0$ it is one step of surprise,
# $\delta_t$.

# %%
kept = np.asarray(mask)
with style.context():
    lambda_figure, (left, right) = style.panels(2, 2.8)
    shades = style.shades(3, style.PALETTE["blue"])
    for gae_lambda, colour in zip((0.0, 0.95, 1.0), shades, strict=True):
        found, _ = advantages.gae(rewards, values, mask, gamma=config.gamma, gae_lambda=gae_lambda)
        left.plot(range(length), found[shown, :length], "o-", ms=3.5, color=colour, label=f"λ = {gae_lambda:g}")
    left.axhline(0, color=style.MUTED, lw=0.8)
    left.set_xticks(range(length), words, rotation=45, ha="right")
    left.set_title("Advantages of the answer above")
    left.legend(fontsize=8, frameon=False)
    right.plot(np.asarray(values)[kept], np.asarray(returns)[kept], ".", ms=3, alpha=0.5, color=style.PALETTE["green"])
    right.axline((0, 0), slope=1, color=style.MUTED, lw=0.8)
    right.set_xlabel("value of a token's state")
    right.set_title("Returns against values, the whole batch")
lambda_figure

# %% [markdown]
# ## What clipping does
#
# Each dot is a token of the batch after the updates. Beyond $1 + \epsilon$ with a positive advantage, and below
# $1 - \epsilon$ with a negative one, the loss is flat: the token has no gradient any more.

# %%
found = {"positive advantage": experience.advantages > 0, "negative advantage": experience.advantages < 0}
with style.context():
    clip_figure, panels = style.panels(2, 2.8)
    for panel, (name, side) in zip(panels, found.items(), strict=True):
        kept = np.asarray(side & mask & (jnp.abs(experience.advantages) > 0.05))
        gain = -np.asarray(tokens.losses)[kept] / np.abs(np.asarray(experience.advantages)[kept])
        at, clipped = np.asarray(ratio)[kept], np.asarray(tokens.clipped)[kept]
        panel.plot(at[~clipped], gain[~clipped], ".", ms=4, color=style.PALETTE["blue"], label="free")
        panel.plot(at[clipped], gain[clipped], ".", ms=4, color=style.PALETTE["orange"], label="clipped")
        for bound in (1 - config.clip_ratio, 1 + config.clip_ratio):
            panel.axvline(bound, color=style.MUTED, lw=0.8, ls=":")
        panel.set_title(f"{name}: {clipped.mean():.0%} clipped")
        panel.set_xlabel("ratio ρ")
    panels[0].set_ylabel("objective per unit of |advantage|")
    panels[0].legend(fontsize=8, frameon=False)
clip_figure

# %% [markdown]
# ## What to notice
#
# - **One score becomes a signal for every token** through the value function alone. If the values are poor
#   (`val/explained_variance` near 0), all tokens of an answer share the praise or the blame.
# - **The penalty is small per token and adds up.** `objective/kl` is the sum of a KL row, averaged over answers. A single
#   token can be negative; the mean over samples must not be.
# - **The first update of an iteration has $\rho_t = 1$ everywhere**, because old log-probabilities are recomputed with
#   the learner. Clipping acts only from the second update on. If the ratios differ from 1 at once, sampler and learner
#   disagree, which is a bug.
# - **Whitening hides the size of the rewards.** The whitened row has variance 1 whether scores differ by 0.01 or by 10,
#   so that a nearly converged policy is moved by noise as strongly as an untrained one by its reward.
#
# ## Exercise
#
# Recompute `rewards` and the advantages with `kl_coef=0.0`. For which tokens does the sign of the advantage change, and
# what would PPO do to them?
#
# <details><summary>Answer</summary>
#
# ```python
# free = advantages.token_rewards(evaluated.scores, evaluated.kl, mask, kl_coef=0.0)
# other, _ = advantages.gae(free, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
# turned = (jnp.sign(other) != jnp.sign(raw)) & mask
# print(f"{turned.sum() / mask.sum():.1%} of tokens, mean KL {evaluated.kl[turned].mean():.2f}")
# ```
#
# A few per cent of the tokens change sign. Without the penalty, tokens that the policy already likes more than the
# reference (positive KL) are no longer held back: they would be made more likely still. In one iteration this is a small
# change. It adds up: in notebook 10, twenty iterations take a policy to 1.8 nats with the penalty, and to 7.6 without.
#
# </details>
