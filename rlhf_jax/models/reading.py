"""Rows that a network reads of a batch, padded or packed."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rlhf_jax.core import masking, packing
from rlhf_jax.types import Sequences, TokenBatch


def hidden_states(
    apply: Callable[..., Array], batch: TokenBatch | Sequences, dropout_keys: Key[Array, "B"] | None
) -> Float[Array, "rows width D"]:
    """Hidden states of the rows that a network reads: [B, S, D], or [G R, W, D] of packed rows.

    The sequences of a packed row share the dropout key of its first one, at different positions.

    Args: apply takes the arguments of `Transformer.__call__`, and `dropout_keys`, one per row.
    """
    if batch.packing is None:
        return apply(batch.tokens, batch.mask, dropout_keys=dropout_keys)
    rows = packing.packed_rows(batch.tokens, batch.packing)
    keys = None if dropout_keys is None else packing.first_in_rows(dropout_keys, batch.packing)
    return apply(rows.tokens, rows.mask, rows.sequence, rows.place, dropout_keys=keys)


def mean_hidden(hidden: Float[Array, "rows width D"], sequences: Sequences) -> Float[Array, "B D"]:
    """Mean hidden state of prompt and response, from `hidden_states`."""
    count = jnp.maximum(masking.lengths(sequences.mask), 1).astype(hidden.dtype)[:, None]
    if sequences.packing is not None:
        return packing.sums(hidden, sequences.packing) / count
    return jnp.sum(jnp.where(sequences.mask[..., None], hidden, 0), axis=1) / count


def last_hidden(hidden: Float[Array, "rows width D"], sequences: Sequences) -> Float[Array, "B D"]:
    """Hidden state of the last token, from `hidden_states`."""
    mask = sequences.mask
    if sequences.packing is not None:
        return packing.lasts(hidden, mask, sequences.packing)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
