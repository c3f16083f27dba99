"""Minibatches of an iteration: their rows, as a function of a random key, and their packings.

A single minibatch is the whole batch, in the order of its rows. With one epoch, the update then has the same forward
pass as the old policy, and the compiler computes it once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from rlhf_jax.core import masking
from rlhf_jax.types import Packing


class Indices(NamedTuple):
    """Number of each update, and the rows of its minibatch."""

    rows: Int[Array, "updates M"] | None  # None: all
    demonstrations: Int[Array, "updates M"] | None
    number: Int[Array, "updates"]
    packing: Packing | None  # of each minibatch, [updates, G, ...]


def shuffled(
    key: PRNGKeyArray, batch: PyTree, *, epochs: int, updates: int, first: int = 0
) -> Int[Array, "updates M"] | None:
    """Shuffle the numbers of a batch's rows anew in every epoch, and divide them over the updates; None: all rows.

    Args: first is the number of the first epoch, so that several batches can share a key.
    """
    if updates == epochs:
        return None
    count = len(jax.tree.leaves(batch)[0])
    permute = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, first + epoch), count))
    return permute(jnp.arange(epochs)).reshape(updates, -1)


def shared(batch: PyTree, minibatches: int, axes: tuple[str, ...]) -> PyTree:
    """Gather the rows that minibatches are taken from; a single minibatch has each device's own rows."""
    return batch if minibatches == 1 else masking.gather_rows(batch, axes)


def taken(batch: PyTree, rows: Int[Array, "M"] | None, axes: tuple[str, ...]) -> PyTree:
    """Take this device's share of a minibatch from the shared rows. Args: rows are their numbers; None: all."""
    return batch if rows is None else masking.take_rows(batch, rows, axes)
