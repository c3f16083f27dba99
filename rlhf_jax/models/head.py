"""Language-model head: logits, and token statistics computed slice by slice to limit the memory of logits."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlhf_jax.core.row_sharding import gather_channels, row_devices

LOGIT_SLICE = 2**26
"""Maximum number of a device's logits in memory (256 MB); larger batches are computed in slices of the time axis."""

FEW_ROWS = 32
"""Maximum number of single-token rows for which CPUs use the embedding as the left factor of the product and read it in
place. As the right factor, it would first be copied into another layout, which takes as long as the product."""

MASKED_LOGIT = float(jnp.finfo(jnp.float32).min / 2)
"""Logit of suppressed tokens: half the lowest float32, so that subtracting a maximum does not overflow."""


class TokenStats(NamedTuple):
    """Statistics of the distribution at each predicted token."""

    logprobs: Array  # float32[B, T], nats
    entropy: Array  # float32[B, T], nats; differentiable only from `token_stats_with_entropy`
    correct: Array  # bool[B, T]: whether the token is the most likely one
    log_sum_sq_probs: Array  # float32[B, T]: log sum of squared probabilities; no gradient; 0 for tokens not allowed


def logits(
    hidden: Float[Array, "*rows D"], embedding: Float[Array, "V D"], allowed: Bool[Array, "V"], *, softcap: float | None
) -> Float[Array, "*rows V"]:
    """Logits x in float32, or c tanh(x / c) with a soft cap c; `MASKED_LOGIT` (probability 0) if not allowed."""
    if hidden.ndim == 2 and hidden.shape[0] <= FEW_ROWS:
        products = jax.lax.platform_dependent(hidden, embedding, cpu=_embedding_first, default=_hidden_first)
    else:
        products = _hidden_first(hidden, embedding)
    if softcap is not None:
        products = softcap * jnp.tanh(products / softcap)
    allowed = allowed.reshape((1,) * (products.ndim - 1) + (-1,))
    return jnp.where(allowed, products, MASKED_LOGIT)


def _embedding_first(hidden: Array, embedding: Array) -> Array:
    products = jnp.einsum("vd,bd->vb", embedding, hidden, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(products).T  # keeps the compiler from swapping the factors


def _hidden_first(hidden: Array, embedding: Array) -> Array:
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


def token_stats(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    allowed: Bool[Array, "V"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float,
    softcap: float | None,
) -> TokenStats:
    """Statistics of tokens under softmax(logits / temperature); tokens that are not allowed get log-probability 0.

    They equal `core.logprobs.token_logprobs` and `entropy` of the full logits. The product with the embedding is
    computed in the dtype of `hidden`. The embedding's gradient is accumulated in float32 over all tokens and cast once,
    to the embedding's dtype. With several slices, the backward pass recomputes the logits of each slice.

    Raises ValueError unless temperature > 0.
    """
    _require_positive(temperature)
    return TokenStats(*_stats(_of_logprobs, temperature, softcap, hidden, embedding, allowed, tokens))


def token_stats_with_entropy(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    allowed: Bool[Array, "V"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float,
    softcap: float | None,
) -> TokenStats:
    """`token_stats` with a differentiable entropy, for losses with an entropy term; costs another pass over logits."""
    _require_positive(temperature)
    return TokenStats(*_stats(_of_logprobs_and_entropy, temperature, softcap, hidden, embedding, allowed, tokens))


def _require_positive(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} must be above 0")


class _Softmax(NamedTuple):
    """Softmax of a slice's logits, saved for the backward pass."""

    shifted: Array  # float32[B, T, V]: logits / temperature minus their maximum
    most: Array  # float32[B, T, 1]: the maximum
    normaliser: Array  # float32[B, T]: sum of exp(shifted)


_Gradient = Callable[[float, _Softmax, Array, Array, Sequence[Array]], Array]
"""temperature, softmax, tokens, emitted, cotangents of log-probabilities and entropy -> cotangent of the logits."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _stats(
    gradient: _Gradient,
    temperature: float,
    softcap: float | None,
    hidden: Array,
    embedding: Array,
    allowed: Array,
    tokens: Array,
) -> tuple:
    return _stats_forward(gradient, temperature, softcap, hidden, embedding, allowed, tokens)[0]


def _stats_forward(
    gradient: _Gradient,
    temperature: float,
    softcap: float | None,
    hidden: Array,
    embedding: Array,
    allowed: Array,
    tokens: Array,
) -> tuple:
    weights, width = gather_channels(embedding.astype(hidden.dtype)), _slice_width(tokens, embedding)
    if tokens.shape[1] <= width:
        softmax = _softmax(temperature, softcap, hidden, weights, allowed)
        return _of_slice(softmax, allowed, tokens), (hidden, embedding, allowed, tokens, softmax)

    def of_slice(_: None, part: tuple[Array, Array]) -> tuple[None, tuple]:
        hidden, tokens = part
        return None, _of_slice(_softmax(temperature, softcap, hidden, weights, allowed), allowed, tokens)

    _, slices = jax.lax.scan(of_slice, None, _cut((hidden, tokens), width))
    return _joined(slices, tokens.shape[1]), (hidden, embedding, allowed, tokens, None)


def _stats_backward(
    gradient: _Gradient, temperature: float, softcap: float | None, saved: tuple, cotangents: tuple
) -> tuple:
    """Hand-written gradients with respect to hidden states and embedding.

    Automatic differentiation makes separate passes over all logits for a scatter, a select and a transposition, a third
    of the time of a training step on CPUs. This version makes one fused pass and transposes the small factor. It also
    accumulates the slices' embedding gradients in float32: accumulated in bfloat16 over 256 slices, they were 2 to 11 %
    off. Each device sums over its own rows, so that the sum over devices is taken once and not for every slice.
    """
    hidden, embedding, allowed, tokens, kept = saved
    weights, width = gather_channels(embedding.astype(hidden.dtype)), _slice_width(tokens, embedding)
    devices = math.gcd(row_devices(), tokens.shape[0]) if kept is None else 1
    lead = (devices,) if devices > 1 else ()

    def by_device(x: Array) -> Array:
        return x.reshape(*lead, -1, *x.shape[1:])

    def of_slice(hidden: Array, tokens: Array, softmax: _Softmax, cotangents: Sequence[Array]) -> tuple[Array, Array]:
        d_logits = gradient(temperature, softmax, tokens, allowed[tokens], cotangents)
        if softcap is not None:  # d tanh(x) = 1 - tanh(x)^2; tokens not allowed have no gradient anyway
            capped = (softmax.shifted + softmax.most) * (temperature / softcap)
            d_logits *= 1 - jnp.square(jnp.clip(capped, -1, 1))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vd->btd", d_logits, weights)
        factors = by_device(hidden), by_device(d_logits)
        d_transposed = jnp.einsum("...btd,...btv->...dv", *factors, preferred_element_type=jnp.float32)
        return d_hidden, jax.lax.optimization_barrier(d_transposed)

    def add_slice(total: Array, part: tuple) -> tuple[Array, Array]:
        hidden, tokens, *cotangents = part
        softmax = _softmax(temperature, softcap, hidden, weights, allowed)
        d_hidden, d_transposed = of_slice(hidden, tokens, softmax, cotangents)
        return total + d_transposed, d_hidden

    if kept is not None:
        d_hidden, d_transposed = of_slice(hidden, tokens, kept, cotangents[:2])
    else:
        nothing = jnp.zeros((*lead, *embedding.shape[::-1]), jnp.float32)
        parts = _cut((hidden, tokens, *cotangents[:2]), width)
        d_transposed, slices = jax.lax.scan(add_slice, nothing, parts)
        d_hidden = _joined(slices, tokens.shape[1])
    d_transposed = jnp.sum(d_transposed, axis=tuple(range(len(lead))))
    return d_hidden, d_transposed.T.astype(embedding.dtype), None, None


_stats.defvjp(_stats_forward, _stats_backward)


def _slice_width(tokens: Array, embedding: Array) -> int:
    """Number of tokens per row in a slice."""
    rows = math.ceil(tokens.shape[0] / row_devices())
    return max(1, LOGIT_SLICE // (rows * embedding.shape[0]))


def _cut(arrays: PyTree, width: int) -> PyTree:
    """Split the time axis into slices, [slices, B, width, ...], padding the last one with zeros."""

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % width), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(x.shape[0], -1, width, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def _joined(slices: PyTree, length: int) -> PyTree:
    """Inverse of `_cut`."""

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(joined, slices)


def _softmax(temperature: float, softcap: float | None, hidden: Array, weights: Array, allowed: Array) -> _Softmax:
    scaled = logits(hidden, weights, allowed, softcap=softcap) / temperature
    if temperature <= 0.5:  # MASKED_LOGIT / temperature is -inf, and -inf times probability 0 would be NaN
        scaled = jnp.maximum(scaled, MASKED_LOGIT)
    most = jnp.max(scaled, axis=-1, keepdims=True)
    shifted = scaled - most
    return _Softmax(shifted, most, jnp.sum(jnp.exp(shifted), axis=-1))


def _of_slice(softmax: _Softmax, allowed: Array, tokens: Array) -> tuple:
    shifted, _, normaliser = softmax
    exponentials = jnp.exp(shifted)
    chosen = jax.lax.platform_dependent(shifted, tokens, cpu=_gathered, default=_summed)
    emitted = allowed[tokens]
    logprobs = jnp.where(emitted, chosen - jnp.log(normaliser), 0)
    entropy = jnp.log(normaliser) - _inner(exponentials, shifted) / normaliser
    log_sum_sq_probs = jnp.where(emitted, jnp.log(jnp.sum(jnp.square(exponentials), -1) / jnp.square(normaliser)), 0)
    return logprobs, entropy, (chosen >= 0) & emitted, log_sum_sq_probs


def _inner(x: Array, y: Array) -> Array:
    """Sum products over the last axis: on CPUs as a product of matrices, since XLA's sum uses one thread."""
    return jax.lax.platform_dependent(x, y, cpu=_product, default=lambda x, y: jnp.sum(x * y, axis=-1))


def _product(x: Array, y: Array) -> Array:
    return jnp.einsum("...v,...v->...", x, y, precision=jax.lax.Precision.HIGHEST)


def _gathered(shifted: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(shifted, tokens[..., None], axis=-1)[..., 0]


def _summed(shifted: Array, tokens: Array) -> Array:
    return jnp.sum(jnp.where(_one_hot(tokens, shifted.shape[-1]), shifted, 0), axis=-1)


def _of_logprobs(
    temperature: float, softmax: _Softmax, tokens: Array, emitted: Array, cotangents: Sequence[Array]
) -> Array:
    """D logprob / d logits = one-hot - softmax."""
    scale = jnp.where(emitted, cotangents[0], 0) / temperature
    chances = jnp.exp(softmax.shifted) / softmax.normaliser[..., None]
    one_hot = _one_hot(tokens, chances.shape[-1])
    return (one_hot.astype(jnp.float32) - chances) * scale[..., None]


def _of_logprobs_and_entropy(
    temperature: float, softmax: _Softmax, tokens: Array, emitted: Array, cotangents: Sequence[Array]
) -> Array:
    """D entropy / d logits = -softmax (log softmax + entropy), added to the derivative of the log-probability."""
    shifted, _, normaliser = softmax
    chances = jnp.exp(shifted) / normaliser[..., None]
    # Ruled-out tokens have probability 0 and a finite log-probability, so that their product is 0.
    surprise = jnp.log(normaliser) - _inner(chances, shifted)
    above = chances * (shifted - jnp.log(normaliser)[..., None] + surprise[..., None])
    d_entropy = -above * (cotangents[1] / temperature)[..., None]
    return _of_logprobs(temperature, softmax, tokens, emitted, cotangents) + d_entropy


def _one_hot(tokens: Array, size: int) -> Array:
    return tokens[..., None] == jnp.arange(size)[None, None, :]
