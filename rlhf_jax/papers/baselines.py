"""Losses of baselines in papers, named `rlhf_jax.papers.baselines:NAME` in a config."""

from jaxtyping import Array, Float


def unlikelihood_005(chosen_logps: Float[Array, "B"], rejected_logps: Float[Array, "B"]) -> Float[Array, "B"]:
    r"""$-\log\pi(y_w) + \alpha \log\pi(y_l)$, alpha = 0.05: Rafailov et al. 2023 (arXiv:2305.18290), section 6."""
    return 0.05 * rejected_logps - chosen_logps


def unlikelihood_05(chosen_logps: Float[Array, "B"], rejected_logps: Float[Array, "B"]) -> Float[Array, "B"]:
    """`unlikelihood_005` with alpha = 0.5."""
    return 0.5 * rejected_logps - chosen_logps
