"""The choice of a token from its logits, by one uniform number a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def row_uniforms(key: PRNGKeyArray, rows: Int[Array, "B"], length: int) -> Float[Array, "B T"]:
    """Uniform numbers in [0, 1): one key a sequence, `fold_in(key, row)`, folded with the position of each token.

    They depend on the key, the row's global number and the position alone, so the same row gets the same text however
    the batch is split or padded.
    """

    def of_row(row: Array) -> Array:
        row_key = jax.random.fold_in(key, row)
        return jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(row_key, t)))(jnp.arange(length))

    return jax.vmap(of_row)(rows)


BLOCK = 64
"""Tokens whose probabilities are summed into one before the running sum is taken over blocks."""


def choose(logits: Float[Array, "B V"], uniforms: Float[Array, "B"], *, temperature: float) -> Int[Array, "B"]:
    """Samples from softmax(logits / temperature) by inverting its cumulative distribution at a uniform number.

    A Gumbel draw needs a random number for every token of the vocabulary; this needs one. The running sum is taken over
    blocks of tokens and then within the chosen block, which is quicker than one over the vocabulary, and more precise.
    A token of probability 0 is never chosen.
    """
    batch, vocab = logits.shape
    shifted = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    padded = jnp.pad(jnp.exp(shifted), ((0, 0), (0, -vocab % BLOCK)))
    blocks = padded.reshape(batch, -1, BLOCK)
    block, left = _invert(jnp.sum(blocks, axis=-1), uniforms)
    within, _ = _invert(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], left)
    return block * BLOCK + within


def _invert(masses: Float[Array, "B N"], uniforms: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The item in which a uniform number falls, by mass, and how far into that item, in [0, 1)."""
    cumulative = jnp.cumsum(masses, axis=-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    # Asked of every item, because a running sum need not stand still at an item of mass 0 where it is summed in a tree.
    positive = masses > 0
    places = jnp.arange(masses.shape[-1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(positive, places, 0), axis=-1, keepdims=True)
    item = jnp.min(jnp.where(positive & (cumulative > threshold), places, last), axis=-1)
    mass, end = (jnp.take_along_axis(x, item[:, None], axis=1) for x in (masses, cumulative))
    return item, jnp.clip((threshold - (end - mass)) / mass, 0, 1)[:, 0]
