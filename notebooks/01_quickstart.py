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
# # Running and reading an experiment
#
# `rlhf_jax.run` runs an experiment's stages and writes all results into a work directory; `rlhf_jax.Run` reads it. This
# notebook runs the quickstart's smoke variant (tiny networks, under a minute on two cores), whose numbers mean nothing.
# After `make quickstart`, `rlhf_jax.Run("../runs/quickstart")` has meaningful ones.

# %%
# %matplotlib inline
import rlhf_jax

# %% [markdown]
# The next cell is equivalent to `rlhf-jax --config=quickstart:smoke --workdir=runs/smoke`. Complete stages are skipped,
# and an interrupted one resumes from its last checkpoint. `load_config` takes overrides by name:
# `{"ppo.kl_coef": 0.05}` is `--config.ppo.kl_coef=0.05` on the command line.

# %%
config = rlhf_jax.load_config("quickstart:smoke")
run = rlhf_jax.run(config, "runs/smoke")
run

# %% [markdown]
# ## Training data
#
# The summaries have the gold judge's correlation with the ratings and the number of pairs that it labelled. The labels
# are noisy, as a person's would be, so that the chosen answer has the higher score in most pairs, but not in all. Each
# summary also has a `provenance`: commit, packages, machine, seeds and hashes of the stage's inputs.

# %%
{
    name: {key: value for key, value in run.summary(name).items() if key != "provenance"}
    for name in ("gold", "preferences")
}

# %% [markdown]
# ## Learning curves
#
# `metrics` is a DataFrame with one row per step.

# %%
run.metrics("ppo")[["step", "objective/scores", "objective/kl", "val/num_eos_tokens", "loss/value_avg"]].tail()

# %%
figures = rlhf_jax.draw(run)
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
# ## Results
#
# Every method answers the same test prompts. The gold judge, on which no method was trained, scores the answers.

# %%
run.results()[["method", "gold_score", "gold_se", "win_rate", "win_low", "win_high", "reward_score", "kl", "length"]]

# %%
figures["frontier"]

# %%
figures["win_rates"]

# %%
figures["best_of_n"]

# %% [markdown]
# ## Answers
#
# `samples` contains every answer of the evaluation.

# %%
run.samples("evaluate").query("step < 3")[["method", "prompt", "completion", "score", "gold", "kl"]].sort_values(
    "prompt"
)

# %% [markdown]
# Policies and reward models can be loaded and used with the functions `sample`, `best_of_n`, `logprobs`, `score`,
# `evaluate` and `export` of `rlhf_jax`.

# %%
start, policy, reward_model = run.load_policy("sft"), run.load_policy("ppo"), run.load_reward_model("reward_model")
prompts = ["the film", "this movie is", "the music"]
rlhf_jax.sample(policy, prompts[:2], n=3, reward=reward_model, reference=start, max_new_tokens=16)

# %%
rlhf_jax.evaluate({"sft": start, "ppo": policy}, prompts * 20, reward_model, max_new_tokens=16).T
