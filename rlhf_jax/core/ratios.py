r"""Probability ratios from log-ratios, finite for every log-ratio.

In float32, $e^x$ overflows above x = 88.7. A clipped loss then still has the right value, but 0 times infinity as its
gradient; an unclipped loss is infinite. The log-ratio of a response is a sum over tokens, so that 0.1 nats per token
over 1,000 tokens suffice.

Ratios are exact up to `LARGEST` and continue along the tangent above it: the function stays convex and increasing, and
the gradient of an unclipped loss keeps its direction, at a size whose square, which Adam and gradient norms need, does
not overflow. verl instead clamps log-ratios to +-20, so that tokens beyond the clamp have no gradient, even those that
an update pushed furthest in the wrong direction.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST = 30.0
"""Largest exact log-ratio in nats (a ratio of 1e13); the square of such a gradient is far below float32's 3e38."""


def ratio(log_ratio: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    r"""$e^x$, and $e^L (1 + x - L)$ above $L$ = `LARGEST`. Args: log_ratio in nats."""
    return jnp.exp(jnp.minimum(log_ratio, LARGEST)) * (1 + _beyond(log_ratio))


def ratio_minus_one(log_ratio: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    r"""`ratio` minus 1, accurate for log-ratios near 0. Args: log_ratio in nats."""
    return jnp.expm1(jnp.minimum(log_ratio, LARGEST)) + math.exp(LARGEST) * _beyond(log_ratio)


def _beyond(log_ratio: Array) -> Array:
    return jnp.maximum(log_ratio - LARGEST, 0)
