r"""Estimators of $KL(\pi \| \pi_{ref})$ from samples of $\pi$: Schulman 2020, "Approximating KL divergence".

Each takes the log-probabilities of sampled tokens under both models and gives one estimate a token, in nats.
"""

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
