"""Schulman 2020, "Approximating KL divergence": bias and deviation of the estimators k1, k2 and k3.

Figure: the two tables of the note, for p = N(0, 1) and q = N(0.1, 1) or N(1, 1), with samples of q.
Command: rlhf-jax reproduce schulman_2020
Hardware and cost: two CPU cores, seconds.
Seeds: 10, a million samples each; the interval is over seeds.
Judge and batch: none; the divergences are known in closed form.
Data: none.
Deviations: the estimators are those that training uses (`rlhf_jax.core.kl`), in float32.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.core import kl
from rlhf_jax.papers.claims import Above, Claim, Within
from rlhf_jax.papers.columns import exchanged
from rlhf_jax.papers.suite import Paper, Scale
from rlhf_jax.reports import style

SAMPLES = 1_000_000
MEANS = (0.1, 1.0)
ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
NOTE = {
    ("k1", 0.1): (0.0, 20.0),
    ("k2", 0.1): (0.002, 1.42),
    ("k3", 0.1): (0.0, 1.42),
    ("k1", 1.0): (0.0, 2.0),
    ("k2", 1.0): (0.25, 1.73),
    ("k3", 1.0): (0.0, 1.7),
}
"""Bias and standard deviation over the true divergence, as the note prints them."""


def measure(scale: str, seeds: Sequence[int], workdir: Path) -> pd.DataFrame:
    """Estimate bias and standard deviation, relative to the true divergence, from samples of q."""
    del scale, workdir
    rows = []
    for seed in seeds:
        noise = jax.random.normal(jax.random.key(seed), (SAMPLES,))
        for mean in MEANS:
            x, truth = noise + mean, mean**2 / 2
            log_q, log_p = -jnp.square(x - mean) / 2, -jnp.square(x) / 2
            for name, estimator in ESTIMATORS.items():
                estimates = np.asarray(estimator(log_q, log_p), np.float64) / truth
                rows.append(
                    {
                        "seed": seed,
                        "mean": mean,
                        "estimator": name,
                        "bias": estimates.mean() - 1,
                        "deviation": estimates.std(),
                    }
                )
    return pd.DataFrame(rows)


def values(table: pd.DataFrame, estimator: str, mean: float, column: str) -> np.ndarray:
    """Select one estimator's numbers, one per seed."""
    rows = table[(table["estimator"] == estimator) & np.isclose(table["mean"], mean)]
    return rows.sort_values("seed")[column].to_numpy()


def doubled(table: pd.DataFrame) -> pd.DataFrame:
    """Double the deviations, and add a tenth to all biases."""
    return table.assign(bias=table["bias"] + 0.1, deviation=2 * table["deviation"])


def draw(table: pd.DataFrame) -> Figure:
    """Draw bias and deviation of each estimator beside the note's numbers."""
    figure, axes = style.panels(2, 2.8)
    for panel, column, heading in zip(axes, ("bias", "deviation"), ("Bias", "Standard deviation"), strict=True):
        for place, ((name, mean), printed) in enumerate(NOTE.items()):
            found = values(table, name, mean, column)
            panel.plot(np.full(len(found), place), found, "o", ms=4, alpha=0.5, color=style.PALETTE["blue"])
            panel.plot(place, printed[column == "deviation"], "_", ms=16, mew=2, color=style.PALETTE["orange"])
        panel.set_xticks(range(len(NOTE)), [f"{name}\n{mean:g}" for name, mean in NOTE])
        panel.set_xlabel("estimator, and the mean of q")
        panel.set_title(f"{heading} / true KL")
    axes[1].set_yscale("log")
    axes[1].set_yticks((1, 2, 5, 10, 20), ("1", "2", "5", "10", "20"))
    axes[1].minorticks_off()
    axes[0].plot([], [], "_", ms=16, mew=2, color=style.PALETTE["orange"], label="the note")
    axes[0].plot([], [], "o", ms=4, color=style.PALETTE["blue"], label="ours, one dot a seed")
    axes[0].legend(fontsize=7, frameon=False, loc="upper center")
    return figure


PAPER = Paper(
    title="Approximating KL divergence",
    source="http://joschu.net/blog/kl-approx.html",
    figure="both tables",
    question="foundations",
    scales={"cpu": Scale(seeds=10, settings={"samples": SAMPLES, "means": list(MEANS)}, cost="seconds")},
    measure=measure,
    draw=draw,
    claims=(
        *(
            Claim(
                name=f"bias of {name}, q = N({mean:g}, 1)",
                statement="k1 and k3 are unbiased; k2 has a small bias where the divergence is small",
                number=f"{NOTE[name, mean][0]:g}",
                statistic=lambda table, name=name, mean=mean: values(table, name, mean, "bias"),
                unit="bias over the true divergence",
                criterion=Within(NOTE[name, mean][0], margin),
                null=doubled if name != "k2" else exchanged("estimator", "k1", "k2"),
            )
            for name, mean, margin in (("k1", 0.1, 0.03), ("k3", 0.1, 0.03), ("k2", 1.0, 0.03), ("k3", 1.0, 0.03))
        ),
        *(
            Claim(
                name=f"deviation of {name}, q = N({mean:g}, 1)",
                statement="k1 has a high variance; k2 and k3 have a low one",
                number=f"{NOTE[name, mean][1]:g}",
                statistic=lambda table, name=name, mean=mean: values(table, name, mean, "deviation"),
                unit="standard deviation over the true divergence",
                criterion=Within(NOTE[name, mean][1], 0.05 * NOTE[name, mean][1]),
                null=doubled,
            )
            for name, mean in NOTE
        ),
        Claim(
            name="k3 varies less than k1",
            statement="k3 is strictly better than k1",
            number="1.42 against 20, and 1.7 against 2",
            statistic=lambda table: np.minimum(
                *(values(table, "k1", mean, "deviation") - values(table, "k3", mean, "deviation") for mean in MEANS)
            ),
            unit="standard deviations over the true divergence, the smaller of two differences",
            criterion=Above(0.0),
            null=exchanged("estimator", "k1", "k3"),
        ),
    ),
)
