"""Batches of rows of similar length: their order as a function of seed and step, and the widths that they share."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from rlhf_jax.data.ragged import RowWidths
from rlhf_jax.types import RlhfError

LEAST = 32
"""Smallest width. For shorter ones, compiling another program would cost more than computing on padding."""

MULTIPLE = 8
"""Factor of all widths."""

WINDOWS = 4
"""Least number of windows in an epoch, so that epochs differ in which rows share a batch."""

Fit = Callable[[RowWidths], RowWidths]
"""Rounds the smallest widths of a batch up to those of a compiled program."""


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Endless shuffled batches of rows of similar length; each row is in one batch of an epoch.

    Every epoch, the rows are shuffled. Then the rows of each window of `window` calls are sorted by length and divided
    into batches, and the calls of the window are shuffled. Shuffling the calls does not depend on the seed, so that
    runs with other seeds have batches of similar length at the same step. Rows that do not fill a batch are left out,
    different ones every epoch. Batches are a function of seed and step, so that checkpoints need no iterator state.
    """

    lengths: Int[np.ndarray, "N"]
    batch_size: int
    seed: int
    window: int  # calls whose rows are sorted together; 1: do not sort
    steps_per_call: int  # batches in a call

    def __post_init__(self) -> None:
        if len(self.lengths) < self.batch_size:
            raise RlhfError(
                f"{len(self.lengths)} training rows do not fill one batch of {self.batch_size}: lower batch_size or "
                "add data"
            )

    def __getitem__(self, step: int) -> Int[np.ndarray, "B"]:
        """Row numbers of the batch of a step, counted from 0."""
        batches = len(self.lengths) // self.batch_size
        epoch, place = divmod(step, batches)
        size = 1 if self.window == 1 else max(1, min(self.window * self.steps_per_call, batches // WINDOWS))
        first = place // size * size
        count = min(size, batches - first)
        shuffled = _permutation(self.seed, epoch, len(self.lengths))
        window = shuffled[first * self.batch_size : (first + count) * self.batch_size]
        by_length = np.argsort(self.lengths[window], kind="stable").reshape(count, self.batch_size)
        _, call = np.unique((epoch * batches + first + np.arange(count)) // self.steps_per_call, return_inverse=True)
        rank = np.random.default_rng([epoch, first]).permutation(call.max() + 1)[call]
        which = int(np.flatnonzero(np.argsort(rank, kind="stable") == place - first)[0])
        return window[np.sort(by_length[which])]  # in random order again


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> Int[np.ndarray, "N"]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Widths of sequences, in ascending order."""

    widths: tuple[int, ...]

    @classmethod
    def best(cls, lengths: Int[np.ndarray, "N"], most: int) -> "Buckets":
        """Choose at most `most` widths with the least padding if each row is padded to the next width.

        By dynamic programming over the different lengths, rounded up to multiples of `MULTIPLE`.
        """
        rounded = -(-lengths // MULTIPLE) * MULTIPLE
        widths, counts = np.unique(np.maximum(rounded, min(LEAST, rounded.max())), return_counts=True)
        before = np.concatenate([[0], np.cumsum(counts)])
        rows = before[1:, None] - before[None, :-1]  # [i, j]: rows with widths j to i
        positions = np.where(rows > 0, rows * widths[:, None], np.inf)  # if all of them are padded to width i
        least, cuts = np.full(len(before), np.inf), []
        least[0] = 0
        for _ in range(min(most, len(widths))):
            total = positions + least[None, :-1]
            cuts.append(np.argmin(total, axis=1))
            least = np.append(np.inf, np.min(total, axis=1))
        chosen, end = [], len(widths)
        for cut in reversed(cuts):
            chosen.append(int(widths[end - 1]))
            end = cut[end - 1]
        return cls(tuple(reversed(chosen)))

    def fit(self, needed: RowWidths) -> RowWidths:
        """Return the next width, and for the response the smallest of it and its halves. Implements `Fit`."""
        sequence = next(width for width in self.widths if width >= needed.sequence)
        return RowWidths(sequence, halved(sequence, needed.response))


def halved(width: int, needed: int) -> int:
    """Halve a width while it holds the number of tokens needed and is at least `LEAST`."""
    while width // 2 >= max(needed, LEAST):
        width //= 2
    return width
