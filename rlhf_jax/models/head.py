"""The language-model head: from hidden states to what is wanted of the logits, which exist for a slice at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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

    Raises ValueError unless temperature > 0: greedy decoding has no softmax.

    Equal to `core.logprobs.token_logprobs` and `entropy` of the whole logits. Where there are several slices, the
    backward pass computes each one's logits again instead of keeping them.
    """
    return _in_slices(functools.partial(_stats, temperature, softcap), hidden, embedding, allowed, tokens)


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
    return _in_slices(functools.partial(_stats_with_entropy, temperature, softcap), hidden, embedding, allowed, tokens)


def _in_slices(
    of_slice: functools.partial[tuple], hidden: Array, embedding: Array, allowed: Array, tokens: Array
) -> TokenStats:
    temperature = of_slice.args[0]
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} must be above 0: log-probabilities are those of a softmax")
    batch, length = tokens.shape
    width = max(1, LOGIT_SLICE // (batch * embedding.shape[0]))
    if length <= width:
        return TokenStats(*of_slice(hidden, embedding, allowed, tokens))
    slices = [
        jax.checkpoint(of_slice)(hidden[:, i : i + width], embedding, allowed, tokens[:, i : i + width])
        for i in range(0, length, width)
    ]
    return TokenStats(*(jnp.concatenate(parts, axis=1) for parts in zip(*slices, strict=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stats(
    temperature: float, softcap: float | None, hidden: Array, embedding: Array, allowed: Array, tokens: Array
) -> tuple:
    return _stats_forward(temperature, softcap, hidden, embedding, allowed, tokens)[0]


def _stats_forward(
    temperature: float, softcap: float | None, hidden: Array, embedding: Array, allowed: Array, tokens: Array
) -> tuple:
    # A temperature below 1/2 takes RULED_OUT to minus infinity, which times a probability of 0 is no entropy.
    scaled = jnp.maximum(logits(hidden, embedding, allowed, softcap=softcap) / temperature, RULED_OUT)
    most = jnp.max(scaled, axis=-1, keepdims=True)
    shifted = scaled - most
    exponentials = jnp.exp(shifted)
    normaliser = jnp.sum(exponentials, axis=-1)
    chosen = jnp.sum(jnp.where(_one_hot(tokens, shifted.shape[-1]), shifted, 0), axis=-1)
    emitted = allowed[tokens]
    logprobs = jnp.where(emitted, chosen - jnp.log(normaliser), 0)
    entropy = jnp.log(normaliser) - jnp.sum(exponentials * shifted, axis=-1) / normaliser
    log_sum_sq_probs = jnp.where(emitted, jnp.log(jnp.sum(jnp.square(exponentials), -1) / jnp.square(normaliser)), 0)
    outputs = (logprobs, entropy, (chosen >= 0) & emitted, log_sum_sq_probs)
    return outputs, (hidden, embedding, tokens, emitted, shifted, most, normaliser)


def _stats_backward(temperature: float, softcap: float | None, saved: tuple, cotangents: tuple) -> tuple:
    """D logprob / d logits = one-hot - softmax.

    By hand, because the compiler would take a pass over all logits for each of a scatter, a select and a transposition
    (the last so that it can multiply by the transposed logits from the left): a third of the time of a training step on
    CPUs. Here it is one fused pass, and the small factor is the one that is transposed.
    """
    return _from_logits(temperature, softcap, saved, _of_logprobs(temperature, saved, cotangents[0]))


def _backward_with_entropy(temperature: float, softcap: float | None, saved: tuple, cotangents: tuple) -> tuple:
    """D entropy / d logits = -softmax (log softmax + entropy), beside the derivative of the log-probability."""
    *_, shifted, _, normaliser = saved
    softmax = jnp.exp(shifted) / normaliser[..., None]
    # A token that is ruled out has probability 0, which a log-probability near float32's lowest leaves 0.
    surprise = jnp.log(normaliser) - jnp.sum(softmax * shifted, axis=-1)
    above = softmax * (shifted - jnp.log(normaliser)[..., None] + surprise[..., None])
    d_entropy = -above * (cotangents[1] / temperature)[..., None]
    return _from_logits(temperature, softcap, saved, _of_logprobs(temperature, saved, cotangents[0]) + d_entropy)


def _of_logprobs(temperature: float, saved: tuple, cotangent: Array) -> Array:
    _, _, tokens, emitted, shifted, _, normaliser = saved
    scale = jnp.where(emitted, cotangent, 0) / temperature
    softmax = jnp.exp(shifted) / normaliser[..., None]
    one_hot = _one_hot(tokens, shifted.shape[-1])
    return (one_hot.astype(jnp.float32) - softmax) * scale[..., None]


def _from_logits(temperature: float, softcap: float | None, saved: tuple, d_logits: Array) -> tuple:
    hidden, embedding, _, _, shifted, most, _ = saved
    if softcap is not None:  # d tanh(x) = 1 - tanh(x)^2; what is not allowed has no gradient anyway
        d_logits *= 1 - jnp.square(jnp.clip((shifted + most) * (temperature / softcap), -1, 1))
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum("btv,vd->btd", d_logits, embedding)
    d_transposed = jax.lax.optimization_barrier(jnp.einsum("btd,btv->dv", hidden, d_logits))
    return d_hidden, d_transposed.T.astype(embedding.dtype), None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stats_with_entropy(
    temperature: float, softcap: float | None, hidden: Array, embedding: Array, allowed: Array, tokens: Array
) -> tuple:
    return _stats_forward(temperature, softcap, hidden, embedding, allowed, tokens)[0]


_stats.defvjp(_stats_forward, _stats_backward)
_stats_with_entropy.defvjp(_stats_forward, _backward_with_entropy)


def _one_hot(tokens: Array, size: int) -> Array:
    return tokens[..., None] == jnp.arange(size)[None, None, :]
