r"""Estimators of $KL(\pi \| \pi_{ref})$ from samples of $\pi$: Schulman 2020, "Approximating KL divergence".

Each takes the log-probabilities of sampled tokens under both models and gives one estimate a token, in nats.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def k1(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$\log \pi - \log \pi_{ref}$: unbiased, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$\frac12 (\log \pi - \log \pi_{ref})^2$: biased, low variance, never negative."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$r - 1 - \log r$ with $r = \pi_{ref} / \pi$: unbiased, low variance, never negative."""
    log_ratio = ref_logprobs - logprobs
    return jnp.expm1(log_ratio) - log_ratio


ESTIMATORS: dict[str, Callable[[Array, Array], Array]] = {"k1": k1, "k2": k2, "k3": k3}


def adaptive_kl_coef(
    kl_coef: float | Float[Array, ""], kl: Float[Array, ""], *, target: float, horizon: float, episodes: int
) -> Float[Array, ""]:
    r"""The coefficient of the next iteration: $\beta (1 + e \cdot n / h)$ with $e = clip(KL / target - 1, -0.2, 0.2)$.

    The log-space proportional controller of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2), with the gain of their
    code: it reacts over a horizon of h episodes.

    Args: kl in nats a response, the mean of an iteration of n episodes; target in nats a response.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * (episodes / horizon))
