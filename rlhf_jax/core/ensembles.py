"""Combining the scores of a reward-model ensemble: Coste et al. 2023 (arXiv:2310.02743)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def mean(scores: Float[Array, "members B"]) -> Float[Array, "B"]:
    r"""Mean optimisation: $\frac{1}{k} \sum_i r_i$."""
    return jnp.mean(scores, axis=0)


def worst_case(scores: Float[Array, "members B"]) -> Float[Array, "B"]:
    r"""Worst-case optimisation (WCO): $\min_i r_i$."""
    return jnp.min(scores, axis=0)


def uncertainty_weighted(scores: Float[Array, "members B"], *, variance_coefficient: float) -> Float[Array, "B"]:
    r"""Uncertainty-weighted optimisation (UWO): $\bar r - \lambda \frac{1}{k} \sum_i (r_i - \bar r)^2$.

    As in the authors' code for Best-of-N; their PPO code divides by k - 1.
    """
    return jnp.mean(scores, axis=0) - variance_coefficient * jnp.var(scores, axis=0)
