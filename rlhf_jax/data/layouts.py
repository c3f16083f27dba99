"""Layouts of packed batches: which sequences share a row, by best-fit decreasing within each group."""

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.types import Packing, Sequences, TokenBatch

Batch = TypeVar("Batch", bound=tuple)

LEAST_GAIN = 0.8
"""Batches are packed if the mean length of their sequences is at most this share of the longest."""


NARROWEST = 64
"""Least width of packed rows: short sequences fill wide rows better, and attention costs little at this width."""


def packed_width(longest: int, sequences: int) -> int:
    """Width of rows that hold several sequences: a multiple of the longest, of which a group fills at least four."""
    return longest * min(math.ceil(NARROWEST / longest), max(1, sequences // 4))


class PackedSize(NamedTuple):
    """Shape of a packed group: rows R and tokens M that a loss reads."""

    rows: int
    read: int

    def rounded(self, width: int, *, per_doubling: int) -> "PackedSize":
        """Round up, so that few programs serve all batches. Args: width of the rows; sizes of rows per doubling.

        The tokens read are a multiple of a quarter of the positions.
        """
        sizes = (math.ceil(2 ** (step / per_doubling)) for step in itertools.count())
        rows = next(size for size in sizes if size >= self.rows)
        quarter = math.ceil(rows * width / 4)
        return PackedSize(rows, math.ceil(max(self.read, 1) / quarter) * quarter)


class Layout(NamedTuple):
    """Places of a batch's sequences, before the shapes are known."""

    lengths: Int[np.ndarray, "G N"]
    first: Int[np.ndarray, "G N"]
    read: tuple[Int[np.ndarray, "G"], ...]  # for each group
    size: PackedSize  # needed

    def packing(self, size: PackedSize, width: int) -> Packing[np.ndarray]:
        """Write the layout into arrays of a size that holds it."""
        groups = len(self.lengths)
        sequence = np.full((groups, size.rows * width), -1, np.int32)
        read = np.full((groups, size.read), -1, np.int32)
        for group, tokens in enumerate(self.read):
            lengths = self.lengths[group]
            before = np.cumsum(lengths) - lengths
            positions = np.repeat(self.first[group] - before, lengths) + np.arange(lengths.sum())
            sequence[group, positions] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            read[group, : len(tokens)] = tokens
        return Packing(sequence.reshape(groups, size.rows, width), self.first, read)


class Groups(NamedTuple):
    """Groups of a batch: each device has one for every micro-batch."""

    devices: int
    micro_batches: int

    def rows_of(self, batch: int) -> int:
        """Number of rows of a batch in each group."""
        return batch // (self.devices * self.micro_batches)

    def split(self, x: np.ndarray) -> np.ndarray:
        """Arrange rows by group, [G, rows, ...]: micro-batches take every n-th row of a device's share."""
        parts = x.reshape(self.devices, -1, self.micro_batches, *x.shape[1:])
        return np.swapaxes(parts, 1, 2).reshape(self.devices * self.micro_batches, -1, *x.shape[1:])


def layouts(batch: tuple, groups: Groups, width: int) -> list[Layout]:
    """Lay out the sequences of a batch, one layout for each of its `Sequences` or `TokenBatch`."""
    parts = jax.tree.leaves(batch, is_leaf=_has_sequences)
    return [_layout(part, groups, width) for part in parts if _has_sequences(part)]


def needed_by(given: Sequence[Layout]) -> PackedSize:
    """Smallest size that holds several layouts."""
    return PackedSize(*np.max([layout.size for layout in given], axis=0).tolist())


def size_of(given: Sequence[Layout], width: int, *, per_doubling: int) -> PackedSize:
    """Size that holds several layouts, rounded up as in `PackedSize.rounded`."""
    return needed_by(given).rounded(width, per_doubling=per_doubling)


class PackedSizes(NamedTuple):
    """Sizes that programs are compiled for: a few planned ones, and others for batches that fit into none of them."""

    planned: tuple[PackedSize, ...]  # in ascending order
    width: int

    @classmethod
    def plan(cls, needed: Sequence[PackedSize], width: int, *, most: int) -> "PackedSizes":
        """Choose at most `most` sizes, each for as many of the needed ones. The largest has a twentieth to spare."""
        ordered = sorted(needed)
        ends = sorted({max(1, len(ordered) * part // most) for part in range(1, most + 1)})
        sizes = [PackedSize(ordered[end - 1].rows, max(size.read for size in ordered[:end])) for end in ends]
        sizes[-1] = PackedSize(*(math.ceil(1.05 * number) for number in sizes[-1]))
        return cls(tuple(dict.fromkeys(size.rounded(width, per_doubling=12) for size in sizes)), width)

    def fit(self, needed: PackedSize) -> PackedSize:
        """Return the first planned size that holds the needed one, or round the needed one up by an eighth at most."""
        holding = (size for size in self.planned if size.rows >= needed.rows and size.read >= needed.read)
        return next(holding, needed.rounded(self.width, per_doubling=6))


def packed(batch: Batch, given: Iterable[Layout], size: PackedSize, width: int) -> Batch:
    """Add packings of one size to all sequences of a batch. Args: the batch's layouts."""
    parts, structure = jax.tree.flatten(batch, is_leaf=_has_sequences)
    each = iter(given)
    added = [part._replace(packing=next(each).packing(size, width)) if _has_sequences(part) else part for part in parts]
    return jax.tree.unflatten(structure, added)


def _has_sequences(x: object) -> bool:
    return isinstance(x, (Sequences, TokenBatch))


def _layout(part: Sequences[np.ndarray] | TokenBatch[np.ndarray], groups: Groups, width: int) -> Layout:
    is_read = part.response_mask if isinstance(part, Sequences) else part.loss_mask[:, 1:]
    return layout_of(part.mask.sum(axis=-1), is_read, groups, width)


def layout_of(
    lengths: Int[np.ndarray, "B *K"], is_read: Bool[np.ndarray, "B *K T"], groups: Groups, width: int
) -> Layout:
    """Lay out sequences. Args: numbers of tokens, and masks of the tokens that a loss reads."""
    lengths, is_read = groups.split(lengths), groups.split(is_read)
    read = is_read.reshape(len(lengths), -1)
    lengths = lengths.reshape(len(lengths), -1)
    places = [best_fit_decreasing(group, width) for group in lengths]
    first = np.stack([row * width + offset for row, offset in places]).astype(np.int32)
    rows = max(int(row.max(initial=0)) + 1 for row, _ in places)
    return Layout(lengths, first, tuple(map(np.flatnonzero, read)), PackedSize(rows, int(read.sum(axis=1).max())))


def best_fit_decreasing(lengths: Int[np.ndarray, "N"], width: int) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Place sequences into few rows, the longest first, each into the fullest row that it fits into.

    Returns the row and the offset of each sequence. Raises ValueError if one is longer than the width.
    """
    if lengths.max(initial=0) > width:
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit into {width}")
    row, offset = np.zeros_like(lengths), np.zeros_like(lengths)
    free: list[tuple[int, int]] = []  # room and number of each row, in ascending order
    rows = 0
    for which in np.argsort(-lengths, kind="stable"):
        length = int(lengths[which])
        if not length:
            continue
        place = bisect.bisect_left(free, (length, 0))
        if place < len(free):
            room, number = free.pop(place)
        else:
            room, number, rows = width, rows, rows + 1
        row[which], offset[which] = number, width - room
        bisect.insort(free, (room - length, number))
    return row, offset
