r"""Razin et al. 2024 (arXiv:2410.08847), "Unintentional unalignment": likelihood displacement, and pairs that cause it.

Figure: Figure 2, change in the log-probability of preferred responses against the similarity of the pairs trained on.
Command: rlhf-jax reproduce razin_2024
Hardware and cost: one CPU core; results/cpu/record.json has the seconds of every stage.
Seeds: 5, each with its own tokenizer, SFT policy and preferences. Groups of pairs are compared within a seed.
Judge and batch: pairs labelled by the gold judge (TF-IDF ridge on people's ratings) with noise; 32 pairs per update.
Data: movie reviews (rt_polarity); hashes are in record.json.
Deviations: a transformer of 77 thousand parameters and its own samples of 12 tokens, not OLMo-1B to Llama-3-8B on
UltraFeedback; Adam at 1e-3 and four passes instead of RMSprop at 1e-7 and one. As in the paper, every group has 512
pairs around a quantile of the similarity, beta is 0.1, and the change is that on the pairs themselves. The single pairs
of one token, and the unalignment of models that refuse, are not reproduced. Source: the abstract and the authors' code.

The CHES score of a pair is $\langle S_+, S_- \rangle - \|S_+\|^2$, where $S_+$ and $S_-$ sum the hidden states that
predict the tokens of the preferred and the other response. Pairs are also ordered by minus the edit distance in words
over the longer length, and by a random number.

Pilot, before the run: seed 100, which is not among the seeds. The change was -19 nats among the pairs of the highest
CHES score and +1 among those of the lowest; -2.9 and -0.9 by edit distance; and between -0.4 and -3.4 in random groups,
so that the margin of the control is 5 nats, a quarter of the effect.

Found (5 seeds, commit f71f4c0, 2026-11-30, results/cpu): preferred responses lose 19 nats [16, 23] among the pairs of
the highest CHES score, and gain 0.8 among those of the lowest, while all margins rise; groups by edit distance and
random groups hardly differ. Looked into, seed 0: the score follows lengths (correlation of 0.78 with the difference of
the two responses' tokens), but the difference of lengths alone orders less (-5 nats at the top, +1 at the bottom), and
among pairs of equal length the highest scores still lose more than the lowest (-14 and -10). The order is not monotone:
the second fifth loses more than the third.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import rlhf_jax
from rlhf_jax import Policy, preference_losses, sequence_logprobs
from rlhf_jax.papers import training
from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper
from rlhf_jax.reports import style
from rlhf_jax.stages.kinds import Colour
from rlhf_jax.types import PreferenceBatch

REVIEWS = runpy.run_path(str(Path(__file__).parents[1] / "movie_reviews.py"))

ORDERS: dict[str, Colour] = {"CHES": "blue", "edit distance": "orange", "random": "grey"}
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIRS, BATCH, EPOCHS, BETA, RATE = 512, 32, 4, 0.1, 1e-3


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one seed."""
    return REVIEWS["task"](smoke=smoke)


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train on groups of pairs by similarity, and measure how the log-probabilities of their responses change."""
    one, size = config(smoke=scale == "smoke"), 64 if scale == "smoke" else PAIRS
    rows = []
    for seed, run in training.run_each(one, seeds, workdir, shared=REVIEWS["SHARED"]).items():
        policy, pairs = run.load_policy("sft"), run.pairs("preferences")
        lengths = {name: one.data[name] for name in ("max_prompt_tokens", "max_response_tokens")}
        batch = rlhf_jax.encode_preferences(pairs, policy.tokenizer, **lengths)
        step = trainer(policy)
        similarities = {
            "CHES": ches(policy, batch),
            "edit distance": -np.array(
                [edit_distance(*two) for two in zip(pairs["chosen"], pairs["rejected"], strict=True)]
            ),
            "random": np.random.default_rng(seed).random(len(pairs)),
        }
        for order, similarity in similarities.items():
            ordered = np.argsort(similarity, kind="stable")
            for quantile in QUANTILES:
                first = round(quantile * (len(ordered) - size))
                group = ordered[first : first + size]
                chosen, rejected = step(jax.tree.map(lambda leaf, group=group: leaf[group], batch))
                measured = {"similarity": similarity[group].mean(), "chosen": chosen, "rejected": rejected}
                rows.append({"seed": seed, "order": order, "quantile": quantile, **measured})
    return pd.DataFrame(rows)


def ches(policy: Policy, batch: PreferenceBatch[np.ndarray]) -> Float[np.ndarray, "N"]:
    """Centred hidden embedding similarity of each pair."""

    def sums(side: Any) -> Float[Array, "N D"]:
        hidden = policy.network.response_hidden(policy.params, side)
        return jnp.sum(hidden * side.response_mask[..., None], axis=1)

    chosen, rejected = jax.jit(sums)(batch.chosen), jax.jit(sums)(batch.rejected)
    return np.asarray(jnp.sum(chosen * rejected, axis=1) - jnp.sum(chosen**2, axis=1), np.float64)


def edit_distance(first: str, second: str) -> float:
    """Levenshtein distance in words, over the length of the longer text."""
    one, two = first.split(), second.split()
    row = list(range(len(two) + 1))
    for i, word in enumerate(one, start=1):
        above, row = row, [i]
        for j, other in enumerate(two, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
    return row[-1] / max(len(one), len(two), 1)


def trainer(policy: Policy) -> Any:
    """Make a function that trains the policy by DPO on pairs and returns their mean changes in log-probability."""
    optimizer = optax.adam(RATE)

    def logprobs(params: Any, pairs: PreferenceBatch) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        chosen, rejected = policy.network.pair_stats(params, pairs)
        return (
            sequence_logprobs(chosen.logprobs, pairs.chosen.response_mask),
            sequence_logprobs(rejected.logprobs, pairs.rejected.response_mask),
        )

    @jax.jit
    def changes(pairs: PreferenceBatch) -> tuple[Float[Array, ""], Float[Array, ""]]:
        count = len(pairs.chosen.response_mask)
        start = logprobs(policy.params, pairs)

        def loss(params: Any, rows: Array) -> Float[Array, ""]:
            now = logprobs(params, jax.tree.map(lambda leaf: leaf[rows], pairs))
            ratios = [after - before[rows] for after, before in zip(now, start, strict=True)]
            return jnp.mean(preference_losses.sigmoid_loss(*ratios, beta=BETA))

        def step(carry: tuple, rows: Array) -> tuple[tuple, None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, rows), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), EPOCHS)
        orders = jax.vmap(lambda key: jax.random.permutation(key, count))(keys).reshape(-1, BATCH)
        (params, _), _ = jax.lax.scan(step, (policy.params, optimizer.init(policy.params)), orders)
        chosen, rejected = (
            jnp.mean(after - before) for after, before in zip(logprobs(params, pairs), start, strict=True)
        )
        return chosen, rejected

    return lambda pairs: tuple(map(float, changes(pairs)))


def at(table: pd.DataFrame, order: str, quantile: float, column: str = "chosen") -> np.ndarray:
    """Change in a group of pairs, for each seed."""
    return per_seed(table, column, order=order, quantile=quantile)


def spread(table: pd.DataFrame, order: str) -> np.ndarray:
    """Change of preferred responses among the most similar pairs minus that among the least similar, for each seed."""
    return at(table, order, QUANTILES[-1]) - at(table, order, QUANTILES[0])


def harmless(table: pd.DataFrame) -> pd.DataFrame:
    """Raise preferred responses with their quantile, except by edit distance, and the others even more."""
    chosen = 10 * table["quantile"] * (table["order"] != "edit distance")
    return table.assign(chosen=chosen, rejected=chosen + 1)


def draw(table: pd.DataFrame) -> Figure:
    """Draw changes in log-probability over the quantile of similarity: preferred, and preferred minus other."""
    figure, (left, right) = style.panels(2, 3.0)
    for order, colour in ORDERS.items():
        own = table[table["order"] == order]
        for panel, values in ((left, own["chosen"]), (right, own["chosen"] - own["rejected"])):
            panel.plot(own["quantile"], values, "o", ms=3, alpha=0.5, color=style.PALETTE[colour])
            mean = values.groupby(own["quantile"]).mean()
            panel.plot(mean.index, mean, "-", color=style.PALETTE[colour], label=order)
    left.axhline(0, lw=0.8, color=style.MUTED)
    left.set_title("Preferred responses, nats")
    right.set_title("Preferred minus other, nats")
    for panel in (left, right):
        panel.set_xlabel("quantile of the pairs' similarity")
    left.legend(fontsize=7, frameon=False, title="similarity by", title_fontsize=7)
    return figure


PAPER = Paper(
    title="Unintentional unalignment: likelihood displacement in direct preference optimization",
    source="arXiv:2410.08847",
    figure="Figure 2",
    question="poor data",
    scales=training.scales(
        config,
        seeds=5,
        cost="two minutes of one core per seed, an estimate",
        constants={"pairs": PAIRS, "batch": BATCH, "epochs": EPOCHS, "beta": BETA, "learning_rate": RATE},
    ),
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="DPO lowers the likelihood of preferred responses in similar pairs",
            statement="the likelihood of preferred responses often decreases during training",
            number=".85 to .01 for one pair of one token",
            statistic=lambda table: at(table, "CHES", QUANTILES[-1]),
            unit="nats, change in the log-probability of preferred responses among pairs of the highest CHES score",
            criterion=Below(0.0),
            null=harmless,
        ),
        Claim(
            name="pairs of a higher CHES score are displaced more",
            statement="the CHES score identifies the pairs that contribute most to displacement",
            number="Figure 2",
            statistic=lambda table: spread(table, "CHES"),
            unit="nats, change among pairs of the highest minus that among those of the lowest CHES score",
            criterion=Below(0.0),
            null=harmless,
        ),
        Claim(
            name="the CHES score orders displacement better than the edit distance",
            statement="the edit distance is not indicative of displacement",
            number="Figure 2",
            statistic=lambda table: spread(table, "CHES") - spread(table, "edit distance"),
            unit="nats, difference of the two orders' highest minus lowest group",
            criterion=Below(0.0),
            null=harmless,
        ),
        Claim(
            name="DPO raises the margin of the displaced pairs",
            statement="the gap between preferred and other responses grows while both become less likely",
            number="-",
            statistic=lambda table: at(table, "CHES", QUANTILES[-1]) - at(table, "CHES", QUANTILES[-1], "rejected"),
            unit="nats, change in the margin among pairs of the highest CHES score",
            criterion=Above(0.0),
            null=harmless,
        ),
        Claim(
            name="random groups do not differ",
            statement="the order is that of the score, not of the groups (our control)",
            number="-",
            statistic=lambda table: spread(table, "random"),
            unit="nats, change in the last random group minus that in the first",
            criterion=Within(0.0, 5.0),
            null=harmless,
        ),
    ),
)
