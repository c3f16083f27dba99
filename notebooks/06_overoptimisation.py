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
# # 06 · Over-optimisation: when more selection makes answers worse
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/06_overoptimisation.ipynb)
#
# **Question.** A reward model is a proxy. We select the answer that it likes best among $n$, and the proxy score rises with
# $n$ for ever. When does the true quality stop rising, when does it fall, and do ensembles help?
#
# Best-of-N can be computed exactly on a finite set of responses, so that the curves here have no sampling noise. Runs in
# seconds on a CPU, without downloads.

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
import jax.numpy as jnp
import numpy as np
import pandas as pd

from rlhf_jax.core import ensembles
from rlhf_jax.core.selection import best_of_n_distribution, best_of_n_kl, fit_over_optimisation
from rlhf_jax.papers import suite
from rlhf_jax.reports import style

# %% [markdown]
# ## Best-of-N exactly
#
# The policy has 400,000 equally likely responses. Each has a true score $u$ (the *gold* score), normal with deviation 1,
# and a proxy score $\hat u = u + e$ with an error $e$. `best_of_n_distribution` gives the probability that a response is
# the best of $n$ by the proxy, $F(y)^n - F^-(y)^n$, so that both expected scores are sums.
#
# Two errors of the same median size: one is normal, the other has heavy tails (Student's t with 2 degrees of freedom),
# so that a few responses get an absurdly high score. Think of an answer that triggers a bug of the reward model.

# %%
count, sizes = 400_000, 2 ** np.arange(0, 15, 2)
rng = np.random.default_rng(0)
gold = rng.normal(size=count)
chances = np.full(count, 1 / count)
errors = {"normal errors": rng.normal(size=count), "heavy-tailed errors": 0.83 * rng.standard_t(2, size=count)}
rows = []
for name, error in errors.items():
    for n in sizes:
        best = best_of_n_distribution(chances, gold + error, n)
        rows.append({"proxy": name, "n": n, "gold": best @ gold, "proxy score": best @ (gold + error)})
curves = pd.DataFrame(rows)
curves.pivot(index="n", columns="proxy").round(2)

# %%
with style.context():
    exact_figure, panels = style.panels(2, 3.0)
    for panel, column, title in zip(panels, ("proxy score", "gold"), ("Proxy score", "Gold score"), strict=True):
        for name, colour in (("normal errors", "blue"), ("heavy-tailed errors", "orange")):
            own = curves[curves["proxy"] == name]
            panel.plot(own["n"], own[column], "o-", ms=3.5, color=style.PALETTE[colour], label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes[::2], [f"{n:,}" for n in sizes[::2]])
        panel.set_xlabel("n")
        panel.set_title(f"{title} of the best of n by the proxy")
    panels[0].set_yscale("symlog", linthresh=5)
    panels[0].set_yticks([0, 2, 5, 10, 50], ["0", "2", "5", "10", "50"])
    panels[0].set_ylim(-0.3, None)
    panels[1].legend(fontsize=8, frameon=False)
exact_figure

# %% [markdown]
# With normal errors the gold score keeps rising, only more slowly than the proxy. With heavy tails it rises, turns and
# falls back: a response with a very high proxy score most likely has a large error rather than a high quality. Kwa et
# al. 2024 (arXiv:2407.14503) prove this for any policy with a limited divergence. **The tails of the errors decide, not
# the accuracy of the reward model**: both proxies rank about equally many pairs right.

# %%
first, second = rng.integers(0, count, size=(2, 100_000))
{
    name: f"{np.mean(((gold + error)[first] > (gold + error)[second]) == (gold[first] > gold[second])):.1%} of pairs"
    for name, error in errors.items()
}

# %% [markdown]
# ## Gao's law
#
# Gao et al. 2022 (arXiv:2210.10760) measure the gold score against the divergence $\mathrm{KL} = \log n - \frac{n-1}{n}$ and
# fit, with $d = \sqrt{\mathrm{KL}}$,
#
# $$R_{bon}(d) = d\,(\alpha - \beta d).$$
#
# $\alpha$ is the initial gain per unit of $d$, and $\beta$ the rate at which it is lost. The maximum lies at
# $d = \alpha / 2\beta$. `fit_over_optimisation` fits both numbers by least squares. Here we mix a share of heavy tails
# into normal errors, as a reward model may have a rare bug.

# %%
shares = (0.0, 0.01, 0.1, 1.0)
divergence = best_of_n_kl(sizes)
root = np.linspace(0, np.sqrt(divergence[-1]), 100)
with style.context():
    law_figure, (panel,) = style.panels(1, 3.4)
    labels = []
    for share, colour in zip(shares, style.shades(len(shares), style.PALETTE["blue"]), strict=True):
        faulty = np.random.default_rng(1).random(count) < share
        proxy = gold + np.where(faulty, errors["heavy-tailed errors"] * 2, errors["normal errors"])
        gains = np.array([best_of_n_distribution(chances, proxy, n) @ gold for n in sizes])
        gains = gains - gains[0]
        alpha, beta = fit_over_optimisation(divergence, gains)
        panel.plot(np.sqrt(divergence), gains, "o", ms=4, color=colour)
        panel.plot(root, root * (alpha - beta * root), "-", lw=1, color=colour)
        labels.append(
            style.EndLabel(root[-1] * (alpha - beta * root[-1]), f"{share:.0%} faulty: β = {beta:.2f}", colour)
        )
    panel.set_xlabel("d = √KL from the policy, √nats")
    panel.set_title("Gain in gold score (dots), and the fit")
    style.label_ends(panel, labels)
law_figure

# %% [markdown]
# The parabola describes the smooth curves. A rare fault is invisible up to some $n$ and then takes over quickly, faster than the
# law allows: with 1 % of faulty scores everything looks well up to $n = 64$.
#
# The same measurement with trained reward models is one of the papers that this repository reproduces. `load_paper`
# draws its figure from the stored results: Best-of-N by reward models that were trained on 300 to 8,100 comparisons of
# movie reviews, five seeds.

# %%
results = suite.read_results(suite.results_directory("gao_2022", "cpu"))
with style.context():
    paper_figure = suite.load_paper("gao_2022").draw(results)
paper_figure

# %% [markdown]
# In this reproduction $\beta$ is near 0: the judge is simple and the models make no absurd errors, so that no curve clearly
# turns down up to $n = 512$. A rise over the measured range does not show that there is no turn beyond it.
#
# ## Ensembles
#
# Train $k$ reward models and combine their scores (Coste et al. 2023, arXiv:2310.02743): the mean, the worst case
# $\min_i r_i$, or the mean minus a multiple of the variance. The reasoning is that members agree where they know and
# differ where they guess. So let each of five members have errors of its own with heavy tails.

# %%
members = 5
own = 0.83 * np.random.default_rng(2).standard_t(2, size=(members, count))
shared = 0.83 * np.random.default_rng(3).standard_t(2, size=count)
cases = {"errors of its own": own, "half of the error shared": (own + shared) / np.sqrt(2)}
combined = {}
for case, error in cases.items():
    scores = jnp.asarray(gold + error, jnp.float32)
    combined[case] = {
        "single": scores[0],
        "mean": ensembles.mean(scores),
        "worst case": ensembles.worst_case(scores),
        "mean − variance": ensembles.uncertainty_weighted(scores, variance_coefficient=0.5),
    }
with style.context():
    ensemble_figure, panels = style.panels(2, 3.2, sharey=True)
    palette = dict(zip(combined["errors of its own"], ("grey", "blue", "green", "violet"), strict=True))
    for panel, (case, selectors) in zip(panels, combined.items(), strict=True):
        for name, proxy in selectors.items():
            curve = [best_of_n_distribution(chances, proxy, n) @ gold for n in sizes]
            panel.plot(sizes, curve, "o-", ms=3.5, color=style.PALETTE[palette[name]], label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes[::2], [f"{n:,}" for n in sizes[::2]])
        panel.set_xlabel("n")
        panel.set_title(f"Gold score, {case}")
    panels[0].legend(fontsize=8, frameon=False, loc="upper left")
ensemble_figure

# %% [markdown]
# ## What to notice
#
# - **The proxy score always rises.** It cannot tell you when to stop. Only a judge that took no part in the selection
#   can, which is why `evaluate` warns if a reward model judges its own choices.
# - **Rare, large errors do the damage**, and accuracy on held-out pairs hardly sees them.
# - **The mean of an ensemble delays the fall; the minimum and the variance penalty prevent it** as long as errors
#   differ between members. Errors that all members share, because they were trained on the same data, pass every
#   combination. In practice members that differ in the seed alone share most of them.
# - Best-of-N at $n = 16{,}384$ is 8.7 nats from the policy. RL reaches such divergences within some hundred steps.
#
# ## Exercise
#
# With heavy-tailed errors, where is the best $n$? Clip the proxy at 4, `np.clip(proxy, None, 4)`, and look again. Why
# does clipping help, and what does it cost with normal errors?
#
# <details><summary>Answer</summary>
#
# ```python
# for name, error in errors.items():
#     for bound in (np.inf, 4.0):
#         proxy = np.clip(gold + error, None, bound)
#         print(name, bound, [round(best_of_n_distribution(chances, proxy, n) @ gold, 2) for n in sizes])
# ```
#
# Without a bound the gold score is highest at a small $n$ and then falls. Clipping makes all responses above 4 equal, so
# that large $n$ selects a random one of them instead of the one with the largest error: the curve becomes flat instead
# of falling. With normal errors, clipping stops a rise that was real. A bound is therefore insurance, and its premium is
# paid when the reward model was right.
#
# </details>
