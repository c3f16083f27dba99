"""Packed rows: tokens moved from padded rows to packed ones, and a network's outputs moved back.

A network computes on the positions of packed rows only, and its head on the predictions that a loss reads only. Losses
read padded rows [B, ...] in either case.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.core import masking
from rlhf_jax.types import Packing


class PackedRows(NamedTuple):
    """Rows with several sequences each: the arguments of `Transformer.__call__`."""

    tokens: Int[Array, "GR W"]
    mask: Bool[Array, "GR W"]
    sequence: Int[Array, "GR W"]
    place: Int[Array, "GR W"]  # index of a token in its sequence


class _Move(NamedTuple):
    """Entries that go from one array to another, each to at most one place; -1: none."""

    source: Int[Array, "G I"]  # for each place in the result, the entry that goes there
    target: Int[Array, "G J"]  # for each entry, the place in the result


def packed_rows(tokens: Int[Array, "B S"], packing: Packing) -> PackedRows:
    """Move the tokens of padded rows to packed rows."""
    groups, rows, width = packing.sequence.shape
    sequence, place = packing.sequence.reshape(groups, -1), _places(packing)
    found = _take(tokens.reshape(groups, -1), jnp.where(sequence < 0, -1, sequence * tokens.shape[1] + place))
    shape = (groups * rows, width)
    return PackedRows(*(x.reshape(shape) for x in (found, sequence >= 0, sequence, place)))


def first_in_rows(x: Shaped[Array, "B *rest"], packing: Packing) -> Shaped[Array, "GR *rest"]:
    """Give each packed row the entry of its first sequence; the group's first entry if it has none."""
    groups, rows, _ = packing.sequence.shape
    first = jnp.maximum(packing.sequence[:, :, 0], 0)
    grouped = x.reshape(groups, -1, *x.shape[1:])
    return jax.vmap(lambda entries, which: entries[which])(grouped, first).reshape(groups * rows, *x.shape[1:])


def predictors(
    x: Shaped[Array, "GR W *rest"], start: Int[Array, "B"], mask: Bool[Array, "B T"], packing: Packing
) -> Shaped[Array, "G M *rest"]:
    """Select the positions that predict the tokens that a loss reads; 0 for unused entries.

    Args: start is the index of the first response token in each sequence, mask that of the response tokens.
    """
    groups, length = len(packing.sequence), mask.shape[1]
    start = start.reshape(groups, -1)
    row, token = packing.read // length, packing.read % length  # -1 is in row -1
    position = _take(packing.first, row) + _take(start, row) + token - 1
    sequence = packing.sequence.reshape(groups, -1)
    predicted = _places(packing) + 1 - _take(start, sequence)
    inside = (sequence >= 0) & (predicted >= 0) & (predicted < length)
    target = _take(_numbers(mask, packing), jnp.where(inside, sequence * length + predicted, -1), empty=-1)
    move = _Move(jnp.where(packing.read < 0, -1, position), target)
    return _moved(x.reshape(groups, -1, *x.shape[2:]), move)


def targets(tokens: Int[Array, "B T"], packing: Packing) -> Int[Array, "G M"]:
    """Select the tokens that a loss reads; 0 for unused entries."""
    return _take(tokens.reshape(len(packing.read), -1), packing.read)


def by_token(x: Shaped[Array, "G M"], mask: Bool[Array, "B T"], packing: Packing) -> Shaped[Array, "B T"]:
    """Move numbers of the tokens that a loss reads to their places in padded rows; 0 elsewhere.

    Args: mask is that of the tokens that a loss reads.
    """
    return _moved(x, _Move(_numbers(mask, packing), packing.read)).reshape(mask.shape)


def sums(x: Float[Array, "GR W D"], packing: Packing) -> Float[Array, "B D"]:
    """Sum a network's outputs over the tokens of each sequence."""
    groups, sequences = packing.first.shape
    sequence = packing.sequence.reshape(groups, 1, -1)
    belongs = sequence == jnp.arange(sequences, dtype=jnp.int32)[None, :, None]
    outputs = x.reshape(groups, -1, x.shape[-1])
    found = jnp.einsum("gnp,gpd->gnd", belongs.astype(x.dtype), outputs, precision=jax.lax.Precision.HIGHEST)
    return found.reshape(-1, x.shape[-1])


def lasts(x: Float[Array, "GR W D"], mask: Bool[Array, "B S"], packing: Packing) -> Float[Array, "B D"]:
    """Select a network's output at the last token of each sequence; 0 for sequences without tokens."""
    lengths = masking.lengths(mask).reshape(packing.first.shape)
    sequence = packing.sequence.reshape(len(packing.first), -1)
    is_last = (sequence >= 0) & (_places(packing) == _take(lengths, sequence) - 1)
    move = _Move(jnp.where(lengths > 0, packing.first + lengths - 1, -1), jnp.where(is_last, sequence, -1))
    return _moved(x.reshape(len(packing.first), -1, x.shape[-1]), move).reshape(-1, x.shape[-1])


def _places(packing: Packing) -> Int[Array, "G RW"]:
    sequence = packing.sequence.reshape(len(packing.sequence), -1)
    return jnp.arange(sequence.shape[1], dtype=jnp.int32)[None] - _take(packing.first, sequence)


def _numbers(mask: Bool[Array, "B T"], packing: Packing) -> Int[Array, "G NT"]:
    """Number the tokens that a loss reads, in the order of `packing.read`; -1 for others."""
    flat = mask.reshape(len(packing.read), -1)
    return jnp.where(flat, jnp.cumsum(flat, axis=1, dtype=jnp.int32) - 1, -1)


def _take(x: Shaped[Array, "G J *rest"], which: Int[Array, "G I"], *, empty: int = 0) -> Shaped[Array, "G I *rest"]:
    found = jax.vmap(lambda entries, chosen: entries[jnp.maximum(chosen, 0)])(x, which)
    return jnp.where((which >= 0).reshape(*which.shape, *[1] * (x.ndim - 2)), found, jnp.asarray(empty, x.dtype))


def _moved(x: Shaped[Array, "G J *rest"], move: _Move) -> Shaped[Array, "G I *rest"]:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _take(x, move.source)
    return _moved_floats(x, move)


@jax.custom_vjp
def _moved_floats(x: Array, move: _Move) -> Array:
    """Move entries; the gradient moves them back. Automatic differentiation would add them up one by one."""
    return _take(x, move.source)


def _moved_forward(x: Array, move: _Move) -> tuple[Array, Int[Array, "G J"]]:
    return _take(x, move.source), move.target


def _moved_backward(target: Int[Array, "G J"], d_out: Array) -> tuple[Array, None]:
    return _take(d_out, target), None


_moved_floats.defvjp(_moved_forward, _moved_backward)
