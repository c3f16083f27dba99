"""Rotary positions: conversion of a config's `rope_parameters`, and rotation of queries and keys."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.models.model_config import Rope
from rlhf_jax.types import RlhfError


def rope_of(parameters: dict[str, Any], width: int, context: int) -> Rope:
    """Convert a config's `rope_parameters` for heads of this width. Raises RlhfError for an unsupported type."""
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    if kind not in _KINDS:
        raise RlhfError(f"rope_type = {kind!r} is not supported: it should be one of {', '.join(_KINDS)}")
    rope = Rope(theta, float(parameters.get("partial_rotary_factor", 1.0)))
    return _KINDS[kind](rope, parameters, width, context)


def _default(rope: Rope, parameters: dict[str, Any], width: int, context: int) -> Rope:
    return rope


def _linear(rope: Rope, parameters: dict[str, Any], width: int, context: int) -> Rope:
    return dataclasses.replace(rope, factors=(float(parameters["factor"]),) * rope.pairs(width))


def _dynamic(rope: Rope, parameters: dict[str, Any], width: int, context: int) -> Rope:
    """NTK-aware scaling by the sequence length, which has no effect up to max_position_embeddings.

    Beyond that length transformers is inconsistent: with a cache it scales a key's rotation by the sequence length when
    the key is written, and in a full forward pass by the final length. We therefore reject longer sequences.
    """
    return dataclasses.replace(rope, limit=context)


def _llama3(rope: Rope, parameters: dict[str, Any], width: int, context: int) -> Rope:
    """Llama 3.1: stretch long wavelengths by `factor`, keep short ones, and interpolate in between."""
    factor, length = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * math.pi * rope.theta ** (2 * np.arange(rope.pairs(width)) / rope.channels(width))
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    return dataclasses.replace(rope, factors=tuple((1 / ((1 - smooth) / factor + smooth)).tolist()))


def _longrope(rope: Rope, parameters: dict[str, Any], width: int, context: int) -> Rope:
    short_context = int(parameters["original_max_position_embeddings"])
    stretch = parameters.get("factor") or context / short_context
    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(stretch) / math.log(short_context)) if stretch > 1 else 1.0
    short, long = (tuple(map(float, parameters[name])) for name in ("short_factor", "long_factor"))
    if {len(short), len(long)} != {rope.pairs(width)}:
        raise RlhfError(
            f"rope_type = 'longrope' has {len(short)} short and {len(long)} long factors, but {rope.channels(width)} "
            f"of a head's {width} channels are rotated in {rope.pairs(width)} pairs: it needs one factor per pair"
        )
    return Rope(rope.theta, rope.fraction, short, long, short_context, float(amplitude))


def _yarn(rope: Rope, parameters: dict[str, Any], width: int, context: int) -> Rope:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): like Llama 3.1, with another ramp and an amplitude.

    The ramp is linear in the index of a pair, as in the authors' code; in the paper it is linear in the number of
    rotations within the context.
    """
    if rope.channels(width) % 2:
        raise RlhfError(
            "rope_type = 'yarn' is not supported for an odd number of rotated channels: "
            f"{rope.channels(width)} of {width} (partial_rotary_factor = {rope.fraction}); transformers fails too"
        )
    pairs, length = rope.pairs(width), parameters["original_max_position_embeddings"]
    factor = parameters["factor"] or context / length

    def pair(turns: float) -> float:
        """Fractional index of the pair that makes `turns` rotations within the context."""
        return pairs * math.log(length / (2 * math.pi * turns)) / math.log(rope.theta)

    low, high = pair(parameters.get("beta_fast") or 32), pair(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    smooth = np.clip((np.arange(pairs) - low) / ((high - low) or 1e-3), 0, 1)
    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
        above, below = (above, below) if above and below else (1.0, 0.0)
        stretch = 0.1 * math.log(max(factor, 1))
        amplitude = (stretch * above + 1) / (stretch * below + 1)
    factors = tuple((1 / (smooth / factor + 1 - smooth)).tolist())
    return dataclasses.replace(rope, factors=factors, amplitude=float(amplitude))


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}


def rope_angles(rope: Rope, head_width: int, positions: Int[Array, "B S"], room: int) -> tuple[Array, Array]:
    """Sine and cosine of every pair's angle at every position, times the amplitude: float32[B, S, pairs] each.

    Args: room is the maximum sequence length, which selects short or long factors.
    Raises RlhfError if it exceeds the limit of `rope`.
    """
    if rope.limit is not None and room > rope.limit:
        raise RlhfError(
            f"sequences may grow to {room} tokens, but the model's dynamic rotary positions support only {rope.limit} "
            "(max_position_embeddings): beyond that, frequencies depend on the final length of the sequence. Shorten "
            "prompts and responses"
        )
    steps = jnp.arange(rope.pairs(head_width), dtype=jnp.float32)
    frequencies = rope.theta ** (-2 * steps / max(rope.channels(head_width), 1))
    long = rope.short_context is not None and room > rope.short_context
    factors = rope.long_factors if long else rope.factors
    if factors is not None:
        frequencies = frequencies / jnp.array(factors, jnp.float32)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    # The divisor is 1 / amplitude. XLA on CPUs takes sines for cheap, and would compute them again in the rotations of
    # each layer and head; it computes a division once.
    divisor = (jnp.square(sin) + jnp.square(cos)) / rope.amplitude
    return sin / divisor, cos / divisor


@jax.custom_vjp
def rotate(
    x: Float[Array, "B S H K"], sin: Float[Array, "B S pairs"], cos: Float[Array, "B S pairs"]
) -> Float[Array, "B S H K"]:
    """Rotate the pairs (i, i + pairs) of each head's first channels; other channels are unchanged.

    The gradient is the rotation by the negative angle, with respect to x alone.
    """
    pairs = sin.shape[-1]
    sin, cos = sin[:, :, None].astype(x.dtype), cos[:, :, None].astype(x.dtype)
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, rest] if rest.shape[-1] else rotated, axis=-1)


def _rotate_forward(x: Array, sin: Array, cos: Array) -> tuple[Array, tuple[Array, Array]]:
    return rotate(x, sin, cos), (sin, cos)


def _rotate_backward(angles: tuple[Array, Array], d_rotated: Array) -> tuple[Array, None, None]:
    sin, cos = angles
    return rotate(d_rotated, -sin, cos), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)
