"""The language-model head: from hidden states to what is wanted of the logits, which exist for a slice at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

LOGIT_SLICE = 2**26
"""Logits that exist at one time (256 MB); a larger batch is computed in slices of its time axis."""

FEW_ROWS = 32
"""Up to so many rows of one token each, CPUs multiply with the embedding on the left: it is then read where it is, and
not first copied into the order in which a right factor is read, which takes as long as the product."""

RULED_OUT = float(jnp.finfo(jnp.float32).min / 2)
"""Half the lowest number, because subtracting a maximum from the lowest number itself would overflow."""


class TokenStats(NamedTuple):
    """What the logits at each predicted token are reduced to before they are dropped."""

    logprobs: Array  # float32[B, T], nats
    entropy: Array  # float32[B, T], nats; carries no gradient, unless asked for
    correct: Array  # bool[B, T]: the token is the most likely one
    log_sum_sq_probs: Array  # float32[B, T]: log of the sum of squared probabilities; no gradient; 0 as logprobs is


def logits(
    hidden: Float[Array, "*rows D"], embedding: Float[Array, "V D"], allowed: Bool[Array, "V"], *, softcap: float | None
) -> Float[Array, "*rows V"]:
    """Logits x in float32, or c tanh(x / c) with a soft cap c. What is not allowed gets `RULED_OUT`: probability 0."""
    if hidden.ndim == 2 and hidden.shape[0] <= FEW_ROWS:
        products = jax.lax.platform_dependent(hidden, embedding, cpu=_embedding_first, default=_hidden_first)
    else:
        products = _hidden_first(hidden, embedding)
    if softcap is not None:
        products = softcap * jnp.tanh(products / softcap)
    allowed = allowed.reshape((1,) * (products.ndim - 1) + (-1,))
    return jnp.where(allowed, products, RULED_OUT)


def _embedding_first(hidden: Array, embedding: Array) -> Array:
    products = jnp.einsum("vd,bd->vb", embedding, hidden, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(products).T  # or the compiler would exchange the factors again


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
    """Statistics of tokens under softmax(logits / temperature); a token that is not allowed gets log-probability 0.

    Equal to `core.logprobs.token_logprobs` and `entropy` of the whole logits. The embedding is multiplied in the dtype
    of `hidden`; its gradient is summed in float32 over all tokens and rounded once, to the embedding's own dtype. Where
    there are several slices, the backward pass computes each one's logits again instead of keeping them.

    Raises ValueError unless temperature > 0: greedy decoding has no softmax.
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
    """`token_stats` whose entropy carries a gradient, for a loss that has it as a term: a pass over all logits more."""
    _require_positive(temperature)
    return TokenStats(*_stats(_of_logprobs_and_entropy, temperature, softcap, hidden, embedding, allowed, tokens))


def _require_positive(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} must be above 0: log-probabilities are those of a softmax")


class _Softmax(NamedTuple):
    """Residuals of a slice's logits for the backward pass."""

    shifted: Array  # float32[B, T, V]: logits / temperature less their maximum
    most: Array  # float32[B, T, 1]: that maximum
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
    weights, width = embedding.astype(hidden.dtype), _slice_width(tokens, embedding)
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
    """Gradients of hidden states and embedding, by hand.

    The compiler would take a pass over all logits for each of a scatter, a select and a transposition (the last so that
    it can multiply by the transposed logits from the left): a third of the time of a training step on CPUs. Here it is
    one fused pass, and the small factor is the one that is transposed. It would also sum the slices' gradients of the
    embedding in the compute dtype: in bfloat16, 256 slices were 2 to 11 % off.
    """
    hidden, embedding, allowed, tokens, kept = saved
    weights, width = embedding.astype(hidden.dtype), _slice_width(tokens, embedding)

    def of_slice(hidden: Array, tokens: Array, softmax: _Softmax, cotangents: Sequence[Array]) -> tuple[Array, Array]:
        d_logits = gradient(temperature, softmax, tokens, allowed[tokens], cotangents)
        if softcap is not None:  # d tanh(x) = 1 - tanh(x)^2; what is not allowed has no gradient anyway
            capped = (softmax.shifted + softmax.most) * (temperature / softcap)
            d_logits *= 1 - jnp.square(jnp.clip(capped, -1, 1))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vd->btd", d_logits, weights)
        d_transposed = jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return d_hidden, jax.lax.optimization_barrier(d_transposed)

    def add_slice(total: Array, part: tuple) -> tuple[Array, Array]:
        hidden, tokens, *cotangents = part
        softmax = _softmax(temperature, softcap, hidden, weights, allowed)
        d_hidden, d_transposed = of_slice(hidden, tokens, softmax, cotangents)
        return total + d_transposed, d_hidden

    if kept is not None:
        d_hidden, d_transposed = of_slice(hidden, tokens, kept, cotangents[:2])
    else:
        nothing = jnp.zeros(embedding.shape[::-1], jnp.float32)
        parts = _cut((hidden, tokens, *cotangents[:2]), width)
        d_transposed, slices = jax.lax.scan(add_slice, nothing, parts)
        d_hidden = _joined(slices, tokens.shape[1])
    return d_hidden, d_transposed.T.astype(embedding.dtype), None, None


_stats.defvjp(_stats_forward, _stats_backward)


def _slice_width(tokens: Array, embedding: Array) -> int:
    """Tokens a row whose logits exist at one time."""
    return max(1, LOGIT_SLICE // (tokens.shape[0] * embedding.shape[0]))


def _cut(arrays: PyTree, width: int) -> PyTree:
    """Slices of the time axis, [slices, B, width, ...], the last one filled up with zeros."""

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % width), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(x.shape[0], -1, width, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def _joined(slices: PyTree, length: int) -> PyTree:
    """The inverse of `_cut`."""

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(joined, slices)


def _softmax(temperature: float, softcap: float | None, hidden: Array, weights: Array, allowed: Array) -> _Softmax:
    # A temperature below 1/2 takes RULED_OUT to minus infinity, which times a probability of 0 is no entropy.
    scaled = jnp.maximum(logits(hidden, weights, allowed, softcap=softcap) / temperature, RULED_OUT)
    most = jnp.max(scaled, axis=-1, keepdims=True)
    shifted = scaled - most
    return _Softmax(shifted, most, jnp.sum(jnp.exp(shifted), axis=-1))


def _of_slice(softmax: _Softmax, allowed: Array, tokens: Array) -> tuple:
    shifted, _, normaliser = softmax
    exponentials = jnp.exp(shifted)
    chosen = jnp.sum(jnp.where(_one_hot(tokens, shifted.shape[-1]), shifted, 0), axis=-1)
    emitted = allowed[tokens]
    logprobs = jnp.where(emitted, chosen - jnp.log(normaliser), 0)
    entropy = jnp.log(normaliser) - jnp.sum(exponentials * shifted, axis=-1) / normaliser
    log_sum_sq_probs = jnp.where(emitted, jnp.log(jnp.sum(jnp.square(exponentials), -1) / jnp.square(normaliser)), 0)
    return logprobs, entropy, (chosen >= 0) & emitted, log_sum_sq_probs


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
    """D entropy / d logits = -softmax (log softmax + entropy), beside the derivative of the log-probability."""
    shifted, _, normaliser = softmax
    chances = jnp.exp(shifted) / normaliser[..., None]
    # A token that is ruled out has probability 0, which a log-probability near float32's lowest leaves 0.
    surprise = jnp.log(normaliser) - jnp.sum(chances * shifted, axis=-1)
    above = chances * (shifted - jnp.log(normaliser)[..., None] + surprise[..., None])
    d_entropy = -above * (cotangents[1] / temperature)[..., None]
    return _of_logprobs(temperature, softmax, tokens, emitted, cotangents) + d_entropy


def _one_hot(tokens: Array, size: int) -> Array:
    return tokens[..., None] == jnp.arange(size)[None, None, :]
