r"""Azar et al. 2023 (arXiv:2310.12036): on deterministic preferences DPO ignores its regularisation; IPO does not.

Figure: Figure 1, learning curves of the three actions' probabilities.
Command: rlhf-jax reproduce azar_2023
Hardware and cost: two CPU cores, seconds.
Seeds: 10, as in the paper; they draw the batches.
Judge and batch: preferences a > b, b > c and a > c, each always; batches of 9 pairs drawn with replacement.
Data: none.
Deviations: none known for the first data set: a softmax of three parameters, a uniform reference, Adam at 0.01, 18,000
steps. The values of tau are ours. The paper's other data sets are not reproduced.

At the optimum of IPO, $\log \pi(a) / \pi(c) = 2 / (3 \tau)$: the three margins are $x$, $x$ and $2x$, and the sum of
their squared distances from $1 / (2 \tau)$ is least at $x = 1 / (3 \tau)$.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core import preference_losses
from rlhf_jax.papers.claims import Above, Claim, Within
from rlhf_jax.papers.columns import exchanged
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

ACTIONS = ("a", "b", "c")
PAIRS = np.array([(0, 1), (1, 2), (0, 2)])
TAUS = (0.1, 0.5, 1.0)
STEPS, EVERY, BATCH, RATE = 18_000, 500, 9, 0.01


def loss(name: str, tau: float, logits: jax.Array, pairs: jax.Array) -> jax.Array:
    """Mean DPO or IPO loss of a batch of pairs, relative to a uniform reference."""
    ratios = jax.nn.log_softmax(logits) + jnp.log(len(ACTIONS))
    chosen, rejected = ratios[pairs[:, 0]], ratios[pairs[:, 1]]
    if name == "dpo":
        return jnp.mean(preference_losses.sigmoid_loss(chosen, rejected, beta=tau))
    one = jnp.ones(len(pairs), jnp.int32)
    return jnp.mean(preference_losses.ipo_loss(chosen, rejected, one, one, beta=tau))


def train(name: str, tau: float, key: jax.Array) -> jax.Array:
    """Train by Adam, and return the probabilities after every `EVERY` steps, [times, actions]."""
    optimizer = optax.adam(RATE)

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        logits, state = carry
        pairs = jnp.asarray(PAIRS)[jax.random.randint(key, (BATCH,), 0, len(PAIRS))]
        updates, state = optimizer.update(jax.grad(loss, argnums=2)(name, tau, logits, pairs), state)
        return (optax.apply_updates(logits, updates), state), None

    def stretch(carry: tuple, keys: jax.Array) -> tuple[tuple, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, jax.nn.softmax(carry[0])

    logits = jnp.zeros(len(ACTIONS))
    keys = jax.random.split(key, STEPS).reshape(STEPS // EVERY, EVERY)
    return jax.lax.scan(stretch, (logits, optimizer.init(logits)), keys)[1]


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train with both losses, every tau and seed."""
    del scale, workdir
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    rows = []
    for name in ("dpo", "ipo"):
        for tau in TAUS:
            curves = np.asarray(jax.jit(jax.vmap(lambda key, name=name, tau=tau: train(name, tau, key)))(keys))
            for seed, curve in zip(seeds, curves, strict=True):
                for i, chances in enumerate(curve):
                    place = {"seed": seed, "loss": name, "tau": tau, "step": (i + 1) * EVERY}
                    rows.append(place | {action: float(p) for action, p in zip(ACTIONS, chances, strict=True)})
    return pd.DataFrame(rows)


def final(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Probabilities at the last step with one loss."""
    return table[(table["loss"] == name) & (table["step"] == STEPS)]


def steepness(table: pd.DataFrame) -> np.ndarray:
    r"""Mean over tau of $\tau \log \pi(a) / \pi(c)$ with IPO, for each seed."""
    rows = final(table, "ipo")
    return (rows["tau"] * np.log(rows["a"] / rows["c"])).groupby(rows["seed"]).mean().to_numpy()


def loosening(table: pd.DataFrame) -> np.ndarray:
    """Difference in IPO's probability of the best action between neighbouring taus: the smallest of each seed."""
    chances = final(table, "ipo").pivot(index="seed", columns="tau", values="a").sort_index(axis=1).to_numpy()
    return (chances[:, :-1] - chances[:, 1:]).min(axis=1)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the probabilities of the actions over the steps, a panel for each loss, a shade for each tau."""
    figure, axes = style.panels(2, 2.8, sharey=True)
    colours = dict(zip(TAUS, style.shades(len(TAUS), style.PALETTE["blue"]), strict=True))
    dashes = dict(zip(ACTIONS, ("-", "--", ":"), strict=True))
    for panel, name in zip(axes, ("dpo", "ipo"), strict=True):
        for tau in TAUS:
            means = table[(table["loss"] == name) & (table["tau"] == tau)].groupby("step")[list(ACTIONS)].mean()
            for action in ACTIONS:
                panel.plot(means.index, means[action], dashes[action], color=colours[tau], lw=1.2)
        panel.set_title(name.upper())
        panel.set_xlabel("step")
        panel.set_xticks(range(0, STEPS + 1, STEPS // 3))
    axes[0].set_ylabel("probability")
    for tau in TAUS:
        axes[1].plot([], [], color=colours[tau], label=f"τ = {tau:g}")
    for action in ACTIONS:
        axes[1].plot([], [], dashes[action], color=style.MUTED, label=f"action {action}")
    axes[1].legend(fontsize=7, frameon=False, ncols=2, loc="center right", bbox_to_anchor=(1, 0.77))
    return figure


PAPER = Paper(
    title="A general theoretical paradigm to understand learning from human preferences",
    source="arXiv:2310.12036",
    figure="Figure 1",
    question="foundations",
    scales={
        "cpu": Scale(
            seeds=10,
            settings={
                "steps": STEPS,
                "batch": BATCH,
                "learning_rate": RATE,
                "taus": list(TAUS),
                "pairs": PAIRS.tolist(),
            },
            cost="seconds",
        )
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="DPO becomes deterministic at every tau",
            statement="DPO converges to the deterministic policy whatever the regularisation",
            number="1 for every tau",
            statistic=lambda table: final(table, "dpo").groupby("seed")["a"].min().to_numpy(),
            unit="probability of the best action, the smallest over tau",
            criterion=Above(0.99),
            null=exchanged("loss", "dpo", "ipo"),
        ),
        Claim(
            name="IPO reaches its closed form",
            statement="IPO's optimum stays at a distance from the reference that tau sets",
            number="2/3",
            statistic=steepness,
            unit="tau times the log-odds of the best and the worst action, mean over tau",
            criterion=Within(2 / 3, 0.03),
            null=lambda table: table.assign(**dict.fromkeys(ACTIONS, 1 / 3)),
        ),
        Claim(
            name="IPO's policy is less certain at larger tau",
            statement="tau controls how far IPO moves from the reference",
            number="-",
            statistic=loosening,
            unit="probability of the best action, the smallest difference between neighbouring taus",
            criterion=Above(0.0),
            null=lambda table: table.assign(tau=table["tau"].map(dict(zip(TAUS, reversed(TAUS), strict=True)))),
        ),
    ),
)
