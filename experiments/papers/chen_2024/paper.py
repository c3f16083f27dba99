r"""Chen et al. 2024 (arXiv:2405.19534): DPO's loss decides the ranking of a pair only together with the reference.

Figure: ranking accuracy over the mean DPO loss, beside the accuracy of the implicit reward.
Command: rlhf-jax reproduce chen_2024
Hardware and cost: two CPU cores, seconds.
Seeds: 10 draws of 2,000 pairs.
Judge and batch: none.
Data: none; log-probabilities of the reference are normal, with differences of standard deviation 14 nats, so that half
of the pairs are ranked wrongly.
Deviations: the paper's accuracies of trained models (Zephyr-DPO 54 %) are not reproduced; these are its theorem and its
closed form, with the loss that training uses (`rlhf_jax.core.preference_losses`), in float32. In the figure and in the
claim on the lag, every pair has a parameter of its own.
Source: the theorem, the idealised policy and the accuracies were read in the paper's text, the statement that DPO
rarely flips a ranking in secondary descriptions.

With $c = \log \pi_0(y_l) / \pi_0(y_w)$, a policy ranks a pair right if and only if its DPO loss is at most
$-\log \sigma(\beta c)$. If a share $\alpha$ of people prefer $y_w$, the optimum of the expected loss has
$\log \pi(y_w) / \pi(y_l) = \frac{1}{\beta} \log \frac{\alpha}{1 - \alpha} - c$.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core.preference_losses import sigmoid_loss
from rlhf_jax.papers.claims import Above, Below, Claim
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

PAIRS = 2000
BETAS = (0.01, 0.1, 1.0)
DEVIATION = 10.0  # nats, of a response's log-probability under the reference
RESOLUTION = 1e-3  # of beta times the log-ratio; float32 cannot decide pairs that are closer to a tie
LOSSES = (0.69, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.03, 0.01)
SHOWN, HALFWAY = 0.1, 0.5


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Compare rankings with losses for random policies, optima with the closed form, and follow training."""
    del scale, workdir
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        reference = rng.normal(0, DEVIATION, (PAIRS, 2))
        policy = reference + rng.normal(0, DEVIATION, (PAIRS, 2))
        agreement = rng.uniform(0.55, 0.95, PAIRS)
        for beta in BETAS:
            found = {"violations": violations(reference, policy, beta)}
            found["distance"] = distance_from_closed_form(reference, agreement, beta)
            rows.append({"seed": seed, "beta": beta, "loss": np.nan, **found})
        for loss in LOSSES:
            rows.append({"seed": seed, "beta": SHOWN, "loss": loss, **accuracies(reference, loss)})
    return pd.DataFrame(rows)


def violations(reference: np.ndarray, policy: np.ndarray, beta: float) -> float:
    """Share of pairs for which the ranking differs from the one that the loss implies."""
    logratios = policy - reference
    losses = sigmoid_loss(jnp.asarray(logratios[:, 0]), jnp.asarray(logratios[:, 1]), beta=beta)
    bounds = -jax.nn.log_sigmoid(beta * jnp.asarray(reference[:, 1] - reference[:, 0]))
    margin = policy[:, 0] - policy[:, 1]
    clear = np.abs(margin) > RESOLUTION / beta
    return float(np.mean((np.asarray(losses <= bounds) != (margin >= 0))[clear]))


def distance_from_closed_form(reference: np.ndarray, agreement: np.ndarray, beta: float) -> float:
    """Minimise the expected loss of every pair by Newton's method; greatest difference of beta times the log-ratio."""

    def expected(gap: jax.Array, share: jax.Array) -> jax.Array:
        zero = jnp.zeros(1)
        wins, losses = (sigmoid_loss(sign * gap[None], zero, beta=beta)[0] for sign in (1.0, -1.0))
        return share * wins + (1 - share) * losses

    def newton(gap: jax.Array, share: jax.Array) -> jax.Array:
        return gap - jax.grad(expected)(gap, share) / jax.grad(jax.grad(expected))(gap, share)

    shares = jnp.asarray(agreement, jnp.float32)
    gaps = jnp.zeros(PAIRS)
    for _ in range(20):
        gaps = jax.vmap(newton)(gaps, shares)
    offset = reference[:, 1] - reference[:, 0]
    found = np.asarray(gaps) - offset
    closed = np.log(agreement / (1 - agreement)) / beta - offset
    return float(np.max(np.abs(found - closed)) * beta)


def accuracies(reference: np.ndarray, loss: float) -> dict[str, float]:
    """Share of pairs ranked right, by likelihood and by implicit reward, once every pair's loss is `loss`.

    Every pair begins at loss log 2 and has the same gradient, so that all have the same loss at every step.
    """
    gap = -np.log(np.expm1(loss)) / SHOWN  # in the log-ratio, from loss = log(1 + exp(-beta gap))
    offset = reference[:, 1] - reference[:, 0]
    return {"ranking": float(np.mean(gap > offset)), "implicit": float(gap > 0)}


def of_betas(table: pd.DataFrame, column: str) -> np.ndarray:
    """Greatest value of a column over beta, for each seed."""
    return table[table["loss"].isna()].groupby("seed")[column].max().to_numpy()


def at(table: pd.DataFrame, loss: float, column: str) -> np.ndarray:
    """Select a column's values where the loss has come down to `loss`, one per seed."""
    return table[np.isclose(table["loss"], loss)].sort_values("seed")[column].to_numpy()


def draw(table: pd.DataFrame) -> Figure:
    """Draw both accuracies over the loss."""
    figure, (panel,) = style.panels(1, 2.8)
    for column, label, colour in (
        ("implicit", "implicit reward", style.PALETTE["green"]),
        ("ranking", "likelihood", style.PALETTE["blue"]),
    ):
        panel.plot(LOSSES, [at(table, loss, column).mean() for loss in LOSSES], "o-", ms=4, color=colour, label=label)
    panel.axvline(np.log(2), color=style.MUTED, lw=0.8)
    panel.set_xscale("log")
    panel.set_xticks(LOSSES[1:], [f"{loss:g}" for loss in LOSSES[1:]])
    panel.minorticks_off()
    panel.invert_xaxis()
    panel.set_ylim(0.4, 1.02)
    panel.set_xlabel(f"DPO loss of every pair, beta = {SHOWN:g}; the line is the loss of the reference")
    panel.set_title("Share of pairs ranked right")
    panel.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


PAPER = Paper(
    title="Preference learning algorithms do not learn preference rankings",
    source="arXiv:2405.19534",
    figure="the theorem, as ranking accuracy over the loss",
    question="foundations",
    scales={
        "cpu": Scale(
            seeds=10,
            settings={"pairs": PAIRS, "betas": list(BETAS), "deviation": DEVIATION, "losses": list(LOSSES)},
            cost="seconds",
        )
    },
    measure=measure,
    draw=draw,
    claims=(
        Claim(
            name="a pair is ranked right exactly if its loss is at most the reference's bound",
            statement="a policy ranks a pair right if and only if its DPO loss is at most -log sigma(beta c)",
            number="no exception",
            statistic=lambda table: of_betas(table, "violations"),
            unit="share of pairs with an exception, the greatest over beta",
            criterion=Below(1e-9),
            null=lambda table: table.assign(violations=1 - table["violations"]),
            sampled=False,
        ),
        Claim(
            name="the optimum of the expected loss has its closed form",
            statement="the idealised policy's log-ratio is log(alpha / (1 - alpha)) / beta minus c",
            number="0",
            statistic=lambda table: of_betas(table, "distance"),
            unit="nats of implicit reward, the greatest difference over pairs and beta",
            criterion=Below(1e-3),
            null=lambda table: table.assign(distance=table["distance"] + np.log(2)),
            sampled=False,
        ),
        Claim(
            name="ranking accuracy lags behind the implicit reward's",
            statement="DPO rarely flips the ranking of a pair, though its loss falls",
            number="-",
            statistic=lambda table: 100 * (at(table, HALFWAY, "implicit") - at(table, HALFWAY, "ranking")),
            unit="points of accuracy at a loss of 0.5",
            criterion=Above(10.0),
            null=lambda table: table.assign(ranking=table["implicit"]),
        ),
    ),
)
