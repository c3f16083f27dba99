"""Losses of baselines in papers, named `rlhf_jax.papers.baselines:NAME` in a config."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def unlikelihood_005(chosen_logps: Float[Array, "B"], rejected_logps: Float[Array, "B"]) -> Float[Array, "B"]:
    r"""$-\log\pi(y_w) + \alpha \log\pi(y_l)$, alpha = 0.05: Rafailov et al. 2023 (arXiv:2305.18290), section 6."""
    return 0.05 * rejected_logps - chosen_logps


def unlikelihood_05(chosen_logps: Float[Array, "B"], rejected_logps: Float[Array, "B"]) -> Float[Array, "B"]:
    """`unlikelihood_005` with alpha = 0.5."""
    return 0.5 * rejected_logps - chosen_logps


def bonbon_8(
    chosen_logps: Float[Array, "B"],
    chosen_logratios: Float[Array, "B"],
    rejected_logratios: Float[Array, "B"],
) -> Float[Array, "B"]:
    r"""BoNBoN on the best and the worst of 8: $-\alpha \log\pi(y_b) + (1-\alpha) (\rho_b - \rho_w - \frac1{2\beta})^2$.

    Gui et al. 2024 (arXiv:2406.00832), with alpha = 0.005. $\rho$ are log-ratios of whole responses, and
    $\frac1{2\beta} = (n-1) \sum_{k<n} \frac1k$ is their mean difference under Best-of-n.
    """
    target = 7 * sum(1 / k for k in range(1, 8))
    return -0.005 * chosen_logps + 0.995 * jnp.square(chosen_logratios - rejected_logratios - target)
