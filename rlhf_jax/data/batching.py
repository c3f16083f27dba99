"""Batches of a table: their rows as a function of seed and step, and the widths that they are padded to."""

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

Fit = Callable[[RowWidths], RowWidths]
"""Rounds the smallest widths of a batch up to those of a compiled program."""


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Endless shuffled batches of a table's rows; each row is in at most one batch of an epoch.

    Rows that do not fill a batch are left out, different ones every epoch. Batches are a function of seed and step, so
    that checkpoints need no iterator state.
    """

    rows: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < self.batch_size:
            raise RlhfError(
                f"{self.rows} training rows do not fill one batch of {self.batch_size}: lower batch_size or add data"
            )

    def __getitem__(self, step: int) -> Int[np.ndarray, "B"]:
        """Row numbers of the batch of a step, counted from 0."""
        epoch, place = divmod(step, self.rows // self.batch_size)
        first = place * self.batch_size
        return _permutation(self.seed, epoch, self.rows)[first : first + self.batch_size]


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
