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


def choose(logits: Float[Array, "B V"], uniforms: Float[Array, "B"], *, temperature: float) -> Int[Array, "B"]:
    """Samples from softmax(logits / temperature) by inverting its cumulative distribution at a uniform number.

    A Gumbel draw needs a random number for every token of the vocabulary; this needs one.
    """
    cumulative = jnp.cumsum(jax.nn.softmax(logits / temperature, axis=-1), axis=-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    passed = jnp.sum(cumulative <= threshold, axis=-1, dtype=jnp.int32)
    return jnp.minimum(passed, logits.shape[-1] - 1)
