r"""Xu et al. 2024 (arXiv:2404.10719): DPO leaves the probability of responses outside its data undetermined.

Figure: the synthetic experiment: probability of right and unseen responses under the reference, DPO and RL.
Command: rlhf-jax reproduce xu_2024
Hardware and cost: two CPU cores, seconds.
Seeds: 10; they draw the networks and the pairs.
Judge and batch: 8 prompts, 8 responses, of which one is right; for every prompt the right one is preferred to 2 others,
and the other 5 responses are unseen. Full batches of 16 pairs.
Data: none.
Deviations: secondary descriptions of the experiment were read. Sizes of networks and data, learning rate (Adam at
0.003, 3,000 steps), beta (0.1) and the reference (nearly uniform, the initial network) are ours. RL follows the exact
gradient of reward and KL penalty instead of PPO's estimate; its reward model has 300 steps on the same pairs.

Found: the theorem's part holds. In the experiment DPO and RL both give almost all mass to the right response, which is
chosen in the data of every prompt, and differ by less than 0.0001, so that its two claims are inconclusive.

The theorem's part is exact: scaling both responses of a pair by one factor, and giving the rest to a third, changes no
DPO loss.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from rlhf_jax.core.preference_losses import sigmoid_loss
from rlhf_jax.papers.claims import Above, Below, Claim
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

PROMPTS = RESPONSES = 8
REJECTED, HIDDEN = 2, 32
BETA, RATE, STEPS, REWARD_STEPS = 0.1, 0.003, 3000, 300
SHARES = (0.0, 0.3, 0.6, 0.9)
METHODS = ("reference", "dpo", "rl")

Network = dict[str, Array]


def init(key: jax.Array, scale: float) -> Network:
    """Draw a network of one hidden layer, from a prompt to a number for each response."""
    first, second = jax.random.split(key)
    inner = jax.random.normal(first, (PROMPTS, HIDDEN))
    return {"inner": inner, "outer": scale * jax.random.normal(second, (HIDDEN, RESPONSES)) / jnp.sqrt(HIDDEN)}


def outputs(network: Network) -> Float[Array, "P R"]:
    """Compute the network's numbers for all prompts."""
    return jnp.tanh(network["inner"]) @ network["outer"]


def pairs_of(key: jax.Array) -> Int[Array, "N 3"]:
    """Draw prompt, chosen and rejected response of each pair; the response of the prompt's number is right."""
    keys = jax.random.split(key, PROMPTS)
    wrong = jnp.stack([jax.random.choice(k, jnp.delete(jnp.arange(RESPONSES), i), (REJECTED,), replace=False)
                       for i, k in enumerate(keys)])  # fmt: skip
    prompts = jnp.repeat(jnp.arange(PROMPTS), REJECTED)
    return jnp.stack([prompts, prompts, wrong.reshape(-1)], axis=1)


def train(network: Network, loss: Callable[[Network], jax.Array], steps: int) -> Network:
    """Minimise a loss of the network by Adam."""
    optimizer = optax.adam(RATE)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        network, state = carry
        updates, state = optimizer.update(jax.grad(loss)(network), state)
        return (optax.apply_updates(network, updates), state), None

    return jax.lax.scan(step, (network, optimizer.init(network)), length=steps)[0][0]


def probabilities(key: jax.Array) -> tuple[Float[Array, "M P R"], Int[Array, "N 3"]]:
    """Train DPO, and RL on a reward model, from one reference; return probabilities of all three, and the pairs."""
    data, policy_key, reward_key = jax.random.split(key, 3)
    pairs, reference = pairs_of(data), init(policy_key, 0.1)
    prompts, chosen, rejected = pairs.T
    prior = jax.nn.log_softmax(outputs(reference))

    def dpo(network: Network) -> jax.Array:
        ratios = jax.nn.log_softmax(outputs(network)) - prior
        return jnp.mean(sigmoid_loss(ratios[prompts, chosen], ratios[prompts, rejected], beta=BETA))

    def bradley_terry(network: Network) -> jax.Array:
        rewards = outputs(network)
        return -jnp.mean(jax.nn.log_sigmoid(rewards[prompts, chosen] - rewards[prompts, rejected]))

    rewards = outputs(train(init(reward_key, 0.1), bradley_terry, REWARD_STEPS))

    def regularised(network: Network) -> jax.Array:
        logprobs = jax.nn.log_softmax(outputs(network))
        return -jnp.mean(jnp.sum(jnp.exp(logprobs) * (rewards - BETA * (logprobs - prior)), axis=1))

    trained = [reference, train(reference, dpo, STEPS), train(reference, regularised, STEPS)]
    return jnp.stack([jax.nn.softmax(outputs(network)) for network in trained]), pairs


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Measure the mass on right, rejected and unseen responses, and DPO's loss as mass moves to an unseen one."""
    del scale, workdir
    found = jax.jit(jax.vmap(probabilities))(jnp.stack([jax.random.key(seed) for seed in seeds]))
    rows = []
    for seed, policies, pairs in zip(seeds, *map(np.asarray, found), strict=True):
        rejected = np.zeros((PROMPTS, RESPONSES), bool)
        rejected[pairs[:, 0], pairs[:, 2]] = True
        right = np.eye(PROMPTS, RESPONSES, dtype=bool)
        for method, chances in zip(METHODS, policies, strict=True):
            masses = {"right": right, "rejected": rejected, "unseen": ~(right | rejected)}
            mass = {name: float(np.mean(np.sum(chances * mask, axis=1))) for name, mask in masses.items()}
            rows.append({"seed": seed, "method": method, "share": np.nan, **mass})
        for share in SHARES:
            rows.append({"seed": seed, "method": "exact", "share": share, **moved(np.random.default_rng(seed), share)})
    return pd.DataFrame(rows)


def moved(rng: np.random.Generator, share: float) -> dict[str, float]:
    """DPO loss of a pair, and KL penalty, of a random policy after moving a share of all mass to an unseen response."""
    reference, policy = rng.dirichlet(np.ones(RESPONSES), size=2)
    policy = (1 - share) * policy
    policy[-1] += share
    ratios = jnp.log(jnp.asarray(policy / reference, jnp.float32))
    return {
        "loss": float(sigmoid_loss(ratios[:1], ratios[1:2], beta=BETA)[0]),
        "kl": float(np.sum(policy * np.log(policy / reference))),
    }


def mass(table: pd.DataFrame, method: str, column: str) -> np.ndarray:
    """Select one method's probability of a kind of response, one per seed."""
    return per_seed(table, column, method=method)


def spread(table: pd.DataFrame, column: str) -> np.ndarray:
    """Greatest minus least value as mass moves to the unseen response, for each seed."""
    rows = table[table["method"] == "exact"].groupby("seed")[column]
    return (rows.max() - rows.min()).to_numpy()


def alike(table: pd.DataFrame) -> pd.DataFrame:
    """Give DPO the masses of RL."""
    kept = table[table["method"] != "dpo"]
    return pd.concat([kept, kept[kept["method"] == "rl"].assign(method="dpo")], ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the mass on each kind of response, and the loss as mass moves to an unseen one."""
    figure, (left, right) = style.panels(2, 2.8)
    green, orange, blue = (style.PALETTE["green"], style.PALETTE["orange"], style.PALETTE["blue"])
    kinds = (("right", green), ("rejected", orange), ("unseen", blue))
    for place, method in enumerate(METHODS):
        for offset, (kind, colour) in zip((-0.2, 0.0, 0.2), kinds, strict=True):
            values = mass(table, method, kind)
            left.plot(np.full(len(values), place + offset), values, "o", ms=3.5, alpha=0.5, color=colour)
    for kind, colour in kinds:
        left.plot([], [], "o", color=colour, label=kind)
    left.set_xticks(range(3), ("reference", "DPO", "RL"))
    left.set_ylim(-0.03, 1.03)
    left.set_title("Mass on responses, a dot per seed")
    left.legend(fontsize=7, frameon=False, loc="upper left")
    exact = table[table["method"] == "exact"]
    for column, label, colour in (("loss", "DPO loss", blue), ("kl", "KL divergence, nats", green)):
        for i, (_, rows) in enumerate(exact.groupby("seed")):
            values = rows[column] - rows[column].iloc[0]
            right.plot(rows["share"], values, color=colour, lw=0.8, label=label if i == 0 else None)
    right.set_xlabel("mass moved to an unseen response")
    right.set_title("Change")
    right.legend(fontsize=7, frameon=False, loc="upper left")
    return figure


PAPER = Paper(
    title="Is DPO superior to PPO for LLM alignment? A comprehensive study",
    source="arXiv:2404.10719",
    figure="the synthetic experiment of section 4",
    question="foundations",
    scales={
        "cpu": Scale(
            seeds=10,
            settings={
                "responses": RESPONSES,
                "rejected": REJECTED,
                "hidden": HIDDEN,
                "beta": BETA,
                "learning_rate": RATE,
                "steps": STEPS,
                "reward_steps": REWARD_STEPS,
            },
            cost="seconds",
        )
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="DPO's loss does not change as mass moves to an unseen response",
            statement="DPO's solutions include policies that favour responses outside the data",
            number="0",
            statistic=lambda table: spread(table, "loss"),
            unit="nats of loss, greatest minus least over shares of 0 to 0.9",
            criterion=Below(1e-5),
            null=lambda table: table.assign(loss=table["kl"]),
            sampled=False,
        ),
        Claim(
            name="the KL penalty of RL changes",
            statement="RL's solutions are a proper subset of DPO's, as the KL penalty covers all responses",
            number="-",
            statistic=lambda table: spread(table, "kl"),
            unit="nats, greatest minus least over shares of 0 to 0.9",
            criterion=Above(0.1),
            null=lambda table: table.assign(kl=table["loss"]),
            sampled=False,
        ),
        Claim(
            name="DPO puts more mass on unseen responses than RL",
            statement="DPO can favour unseen responses; PPO does not",
            number="-",
            statistic=lambda table: mass(table, "dpo", "unseen") - mass(table, "rl", "unseen"),
            unit="probability, mean over prompts, paired by seed",
            criterion=Above(0.0),
            null=alike,
        ),
        Claim(
            name="RL puts more mass on right responses than DPO",
            statement="PPO finds the right responses, while DPO does not",
            number="-",
            statistic=lambda table: mass(table, "rl", "right") - mass(table, "dpo", "right"),
            unit="probability, mean over prompts, paired by seed",
            criterion=Above(0.0),
            null=alike,
        ),
    ),
)
