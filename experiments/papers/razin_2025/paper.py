r"""Razin et al. 2025 (arXiv:2503.15477), "What makes a reward model a good teacher?": accuracy and variance.

Figure: gold score during training by reward models of different accuracy and variance, and steps to a fixed gain.
Command: rlhf-jax reproduce razin_2025
Hardware and cost: one CPU core, under a minute.
Seeds: 10 random instances of 20 prompts; reward models are compared on the same instance.
Judge and batch: none; expectations are sums over all 50 responses of a prompt.
Data: none.
Deviations: tabular softmax policies and exact gradients, without a KL penalty, a simple case of the paper's theory; its
experiments on language models of up to 8B parameters are not reproduced. Source: the abstract, and secondary
descriptions of the theorems.

Gold scores u are uniform on [0, 1], and the policy's logits normal with standard deviation 1. A reward model
$r = 2 (0.99 u^k + 0.01 u) - 1$ ranks every pair right, whatever k > 0; a large k makes its rewards nearly equal, for
all responses but the best. A less accurate one is $2 u - 1$ with normal noise of standard deviation 0.5. All rewards
have values of the same size; the learning rate is 0.05 for all. A reward model that does not reach the gain in 20,000
steps counts as reaching it at the last step, which favours it.

For one prompt, the gradient in the logits is $\pi(y) (r(y) - \mathbb{E}_\pi[r])$, so that its norm is at most the
standard deviation of the reward under the policy.

Pilot, before the run: seeds 100 and 101, which are not among the seeds. The highest power took 1.9 and 3.0 times as
many steps as the noisy reward, the slope was -0.36 and -0.39, and the reward that suits a policy saved 1.04 and 1.18
times on the weak one. The learning rate was 0.05, as here; an earlier pilot at 2 was too coarse.

Power, before the run: 10 instances show a difference of 0.9 standard deviations of the instances, alone.

Found (10 instances, commit f71f4c0, 2026-11-30, results/cpu): the accurate reward model of the lowest variance needs
3.4 times as many steps [2.9, 4.0] as one that ranks 78 % of pairs right, and the time grows as the variance to the
power -0.46 [-0.50, -0.41]. The reward that suits a policy is faster on both policies, by a factor of 1.2 [1.06, 1.36]
on the one where it matters less, which is not significant among this question's claims.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from rlhf_jax.papers.claims import Above, Below, Claim, Within
from rlhf_jax.papers.columns import per_seed
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

PROMPTS, RESPONSES, RATE, STEPS = 20, 50, 0.05, 20_000
RISE = 0.01
"""Share of the gold score itself in a reward of high power, so that rounding leaves no ties."""
POWERS = (1, 4, 16, 64)
NOISE, GAIN = 0.5, 0.1
TILT = 4.0
"""Logit, per unit of gold score, of the weak (negative) and the strong (positive) policy."""


@jax.jit
def train(logits: Float[Array, "P R"], reward: Float[Array, "P R"], gold: Float[Array, "P R"]) -> Float[Array, "steps"]:
    """Ascend the exact gradient of the expected reward, and return the mean gold score before every step."""

    def step(logits: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        policy = jax.nn.softmax(logits)
        gradient = policy * (reward - jnp.sum(policy * reward, axis=1, keepdims=True))
        return logits + RATE * gradient, jnp.mean(jnp.sum(policy * gold, axis=1))

    return jax.lax.scan(step, logits, length=STEPS)[1]


def accurate(gold: np.ndarray, power: float) -> np.ndarray:
    """Rewards from -1 to 1 that rank all pairs right; those of a high power are nearly equal, but for the best."""
    return 2 * ((1 - RISE) * gold**power + RISE * gold) - 1


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Train a policy with every reward model on random instances; rows have the steps to the gain, and its curve."""
    del scale, workdir
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        gold, logits = rng.random((PROMPTS, RESPONSES)), rng.normal(size=(PROMPTS, RESPONSES))
        models = {f"power {k}": accurate(gold, k) for k in POWERS}
        models["noisy"] = 2 * gold - 1 + rng.normal(0, NOISE, gold.shape)
        models["unrelated"] = rng.uniform(-1, 1, gold.shape)
        cases = [("normal", name, logits, reward) for name, reward in models.items()]
        for policy, sign in (("weak", -1), ("strong", 1)):
            tilted = logits + sign * TILT * gold
            cases += [(policy, f"power {k:g}", tilted, accurate(gold, k)) for k in (0.25, 4)]
        for policy, name, start, reward in cases:
            curve = np.asarray(train(jnp.asarray(start), jnp.asarray(reward), jnp.asarray(gold)))
            measured = {"accuracy": accuracy(reward, gold), **at_start(start, reward)}
            measured |= {"steps": steps_to(curve), "last": float(curve[-1] - curve[0])}
            rows.append({"seed": seed, "policy": policy, "model": name, **measured})
    return pd.DataFrame(rows)


def accuracy(reward: np.ndarray, gold: np.ndarray) -> float:
    """Share of a prompt's pairs that the reward ranks as the gold score does."""
    first, second = np.triu_indices(RESPONSES, 1)
    return float(np.mean((reward[:, first] > reward[:, second]) == (gold[:, first] > gold[:, second])))


def at_start(logits: np.ndarray, reward: np.ndarray) -> dict[str, float]:
    """Mean variance of the reward under the policy, and greatest excess of the gradient's norm over its root."""
    policy = np.asarray(jax.nn.softmax(jnp.asarray(logits)), np.float64)
    centred = reward - np.sum(policy * reward, axis=1, keepdims=True)
    variance = np.sum(policy * centred**2, axis=1)
    norm = np.sqrt(np.sum((policy * centred) ** 2, axis=1))
    return {"variance": float(variance.mean()), "excess": float(np.max(norm - np.sqrt(variance)))}


def steps_to(curve: np.ndarray) -> int:
    """Number of steps until the gold score has risen by `GAIN`; the last if it never does."""
    reached = np.flatnonzero(curve >= curve[0] + GAIN)
    return int(reached[0]) if len(reached) else STEPS


def at(table: pd.DataFrame, model: str, column: str = "steps", policy: str = "normal") -> np.ndarray:
    """Select a reward model's values, one per seed."""
    return per_seed(table, column, policy=policy, model=model)


def slower(table: pd.DataFrame, model: str, other: str, policy: str = "normal") -> np.ndarray:
    """Decades of steps that one reward model takes more than another, for each seed."""
    return np.log10(at(table, model, policy=policy)) - np.log10(at(table, other, policy=policy))


def slope(table: pd.DataFrame) -> np.ndarray:
    """Least-squares slope of log steps in log variance over the accurate reward models, for each seed."""
    own = table[(table["policy"] == "normal") & table["model"].str.startswith("power")]
    return np.array([np.polyfit(np.log(x["variance"]), np.log(x["steps"]), 1)[0] for _, x in own.groupby("seed")])


def matched(table: pd.DataFrame) -> np.ndarray:
    """Decades of steps that a policy saves with the reward model whose variance is larger for it, for each seed."""
    weak = slower(table, "power 4", "power 0.25", "weak")
    return np.minimum(weak, slower(table, "power 0.25", "power 4", "strong"))


def draw(table: pd.DataFrame) -> Figure:
    """Draw steps to the gain over the variance, and over the accuracy, with a dot for each instance."""
    figure, (left, right) = style.panels(2, 3.0)
    own = table[table["policy"] == "normal"]
    for name, colour in (("power", "blue"), ("noisy", "orange"), ("unrelated", "grey")):
        rows = own[own["model"].str.startswith(name)]
        label = {"power": "ranks all pairs right", "noisy": "less accurate"}.get(name, name)
        for panel, column in ((left, "variance"), (right, "accuracy")):
            panel.plot(rows[column], rows["steps"], "o", ms=4, alpha=0.6, color=style.PALETTE[colour], label=label)
    for panel, name in ((left, "variance of the reward at the start"), (right, "share of pairs ranked right")):
        panel.set_yscale("log")
        panel.set_xlabel(name)
        panel.set_title(f"Steps to a gain of {GAIN:g}")
    left.set_xscale("log")
    left.set_xticks((0.02, 0.05, 0.1, 0.2, 0.5), ("0.02", "0.05", "0.1", "0.2", "0.5"))
    left.set_xlim(0.01, 1)
    for panel in (left, right):
        panel.set_yticks((200, 500, 1000, 5000, STEPS), ("200", "500", "1,000", "5,000", f"{STEPS:,} or more"))
        panel.minorticks_off()
    left.legend(fontsize=7, frameon=False, loc="center left")
    return figure


PAPER = Paper(
    title="What makes a reward model a good teacher? An optimization perspective",
    source="arXiv:2503.15477",
    figure="speed of training by reward models of different accuracy and variance",
    question="foundations",
    scales={
        "cpu": Scale(
            seeds=10,
            settings={
                "prompts": PROMPTS,
                "responses": RESPONSES,
                "learning_rate": RATE,
                "steps": STEPS,
                "powers": list(POWERS),
                "noise": NOISE,
                "gain": GAIN,
                "tilt": TILT,
            },
            cost="seconds",
        )
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="a low variance makes the landscape flat",
            statement="a reward model of low variance gives a small gradient, however accurate it is",
            number="never violated",
            statistic=lambda table: table.groupby("seed")["excess"].max().to_numpy(),
            unit="norm of the gradient above the reward's standard deviation, the greatest over prompts and models",
            criterion=Below(1e-9),
            null=lambda table: table.assign(excess=1e-3),
            sampled=False,
        ),
        Claim(
            name="a perfectly accurate reward model is slower than a less accurate one",
            statement="a perfectly accurate reward model can be extremely slow, and worse than a less accurate one",
            number="-",
            statistic=lambda table: slower(table, "power 64", "noisy"),
            unit="decades of steps to a gain of 0.1",
            criterion=Above(0.0),
            null=lambda table: table.assign(steps=100),
        ),
        Claim(
            name="the time grows at least as the variance to the power -1/3",
            statement="the time to a fixed gain grows at least as the inverse of the variance to the power 1/3",
            number="-1/3",
            statistic=slope,
            unit="slope of log steps in log variance, among reward models that rank all pairs right",
            criterion=Below(-1 / 3),
            null=lambda table: table.assign(steps=table["variance"] ** -0.2),
        ),
        Claim(
            name="different policies need different reward models",
            statement="a reward model that works well for one policy can be slow for another",
            number="-",
            statistic=matched,
            unit="decades of steps saved by the better of two accurate reward models, the smaller of two policies",
            criterion=Above(0.0),
            null=lambda table: table.assign(steps=100),
        ),
        Claim(
            name="an unrelated reward of high variance gains nothing",
            statement="variance is not enough without accuracy (our control)",
            number="-",
            statistic=lambda table: at(table, "unrelated", "last"),
            unit="gain in gold score at the end",
            criterion=Within(0.0, 0.15),
            null=lambda table: table.assign(last=table["last"] + 0.5),
        ),
    ),
)
