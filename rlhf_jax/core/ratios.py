r"""Ratios of probabilities from log-ratios, finite whatever the log-ratio is.

$e^x$ is infinite in float32 above x = 88.7. A clip then still gives the right value, and 0 times infinity as its
gradient; an unclipped loss is infinite. A response's log-ratio is a sum over tokens: 0.1 nats a token over 1,000 tokens
are enough.

Up to `LARGEST` everything is exact. Above it the exponential goes on along its tangent: the function stays convex and
increasing, and where no bound is active the gradient keeps its direction at a size that can be squared, as Adam and the
norm of gradients do. verl clamps log-ratios to +-20 instead: that gives tokens beyond the clamp no gradient, also those
that an update has pushed furthest the wrong way.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST = 30.0
"""Nats up to which a ratio is exact: 1e13. The square of a gradient of this size is far from float32's 3e38."""


def ratio(log_ratio: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    r"""$e^x$, and $e^L (1 + x - L)$ above $L$ = `LARGEST`. Args: log_ratio in nats."""
    return jnp.exp(jnp.minimum(log_ratio, LARGEST)) * (1 + _beyond(log_ratio))


def ratio_minus_one(log_ratio: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    r"""`ratio` less 1, with all its digits where the log-ratio is near 0. Args: log_ratio in nats."""
    return jnp.expm1(jnp.minimum(log_ratio, LARGEST)) + math.exp(LARGEST) * _beyond(log_ratio)


def _beyond(log_ratio: Array) -> Array:
    return jnp.maximum(log_ratio - LARGEST, 0)
