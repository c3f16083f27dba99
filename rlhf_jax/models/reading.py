"""Rows that a network reads of a batch, padded or packed."""

from collections.abc import Callable

from jaxtyping import Array, Float, Key

from rlhf_jax.core.packing import first_in_rows, packed_rows
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
    rows = packed_rows(batch.tokens, batch.packing)
    keys = None if dropout_keys is None else first_in_rows(dropout_keys, batch.packing)
    return apply(rows.tokens, rows.mask, rows.sequence, rows.place, dropout_keys=keys)
