"""Slices of a batch's rows, which a program computes one after the other to limit memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax.core.row_sharding import split_rows
from rlhf_jax.types import RlhfError


def slice_count(batch: int, rows: int | None, devices: int, *, field: str) -> int:
    """Return the number of slices of `rows` rows in a batch over some devices; 1 for None.

    Args: field is the config field that sets `rows`, for the message.
    Raises RlhfError unless the batch divides into slices, and these over the devices.
    """
    if rows is None:
        return 1
    count = batch // rows
    if not count or count * rows != batch or batch // devices % count:
        raise RlhfError(
            f"a batch of {batch} rows does not divide into slices of {rows}"
            f"{f' over {devices} devices' if devices > 1 else ''}: change {field}"
        )
    return count


def strided(batch: PyTree, count: int) -> PyTree:
    """Split a batch with a stride into slices [count, rows, ...], so that each device has a share of each."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(-1, count, *leaf.shape[1:]), 0, 1), batch)


def in_slices(function: Callable[[PyTree], PyTree], batch: PyTree, count: int, *, each: int = 1) -> PyTree:
    """Apply a function of rows to `count` slices of a batch, one after the other; results are in the batch's order.

    Args: each is the number of rows of the result per row of the batch.
    """
    if count == 1:
        return function(batch)
    found = jax.lax.map(lambda rows: function(split_rows(rows)), strided(batch, count))
    merged = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
    return split_rows(by_row(merged, count, each=each))


def by_row(results: PyTree, count: int, *, each: int) -> PyTree:
    """Arrange the results of `count` strided slices, one slice after the other, in the order of the batch's rows.

    Args: each is the number of rows of the result per row of the batch.
    """

    def arranged(leaf: jax.Array) -> jax.Array:
        by_slice = leaf.reshape(count, -1, each, *leaf.shape[1:])
        return jnp.swapaxes(by_slice, 0, 1).reshape(leaf.shape)

    return jax.tree.map(arranged, results)
