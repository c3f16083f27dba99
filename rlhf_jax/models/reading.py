"""Rows that a network reads of a batch, padded or packed."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlhf_jax.core import masking, packing
from rlhf_jax.types import Sequences, TokenBatch


class Reading(NamedTuple):
    """Arguments of `Transformer.__call__`, and a dropout key for each row."""

    rows: tuple[Int[Array, "rows width"] | Bool[Array, "rows width"], ...]
    dropout_keys: Key[Array, "rows"] | None


def reading(batch: TokenBatch | Sequences, dropout_keys: Key[Array, "B"] | None) -> Reading:
    """Make the rows that a network reads: B of width S, or G R packed ones of width W.

    The sequences of a packed row share the dropout key of its first one, at different positions.
    """
    if batch.packing is None:
        return Reading((batch.tokens, batch.mask), dropout_keys)
    keys = None if dropout_keys is None else packing.first_in_rows(dropout_keys, batch.packing)
    return Reading(packing.packed_rows(batch.tokens, batch.packing), keys)


def mean_hidden(hidden: Float[Array, "rows width D"], sequences: Sequences) -> Float[Array, "B D"]:
    """Mean hidden state of prompt and response, from those of the rows that were read."""
    count = jnp.maximum(masking.lengths(sequences.mask), 1).astype(hidden.dtype)[:, None]
    if sequences.packing is not None:
        return packing.sums(hidden, sequences.packing) / count
    return jnp.sum(jnp.where(sequences.mask[..., None], hidden, 0), axis=1) / count


def last_hidden(hidden: Float[Array, "rows width D"], sequences: Sequences) -> Float[Array, "B D"]:
    """Hidden state of the last token, from those of the rows that were read."""
    mask = sequences.mask
    if sequences.packing is not None:
        return packing.lasts(hidden, mask, sequences.packing)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
