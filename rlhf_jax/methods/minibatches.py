"""Minibatches of an iteration: their rows, as a function of a random key, and their packings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from rlhf_jax.types import Packing


class Indices(NamedTuple):
    """Number of each update, and the rows of its minibatch."""

    rows: Int[Array, "updates M"]
    demonstrations: Int[Array, "updates M"] | None
    number: Int[Array, "updates"]
    packing: Packing | None  # of each minibatch, [updates, G, ...]


def minibatch_order(
    key: PRNGKeyArray, batch: PyTree, *, epochs: int, updates: int, first: int = 0
) -> Int[Array, "updates M"]:
    """Shuffle the numbers of a batch's rows anew in every epoch, and divide them over the updates.

    Args: first is the number of the first epoch, so that several batches can share a key.
    """
    count = len(jax.tree.leaves(batch)[0])
    permute = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, first + epoch), count))
    return permute(jnp.arange(epochs)).reshape(updates, -1)
