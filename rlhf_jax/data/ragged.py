"""Token sequences of different lengths, which are padded only when a batch of them is made."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int, Shaped

from rlhf_jax.types import PreferenceBatch, Rollout, Sequences, TokenBatch

Batch = TypeVar("Batch", bound=tuple, covariant=True)
Other = TypeVar("Other", bound=tuple)


class RowWidths(NamedTuple):
    """Lengths that the rows of a batch are padded to."""

    sequence: int  # S
    response: int  # T


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array."""

    values: Shaped[np.ndarray, "total"]
    ends: Int[np.ndarray, "N"]  # end of each row in `values`

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], dtype: type = np.int32) -> "Ragged":
        """Concatenate rows."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter(itertools.chain.from_iterable(rows), dtype, int(lengths.sum()))
        return cls(values, np.cumsum(lengths))

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Number of values of each row."""
        return np.diff(self.ends, prepend=0)

    def take(self, rows: Int[np.ndarray, "M"]) -> "Ragged":
        """Select rows."""
        values, mask = self.padded(rows, int(self.lengths.max()))
        return Ragged(values[mask], np.cumsum(self.lengths[rows]))

    def padded(
        self, rows: Int[np.ndarray, "B"], width: int
    ) -> tuple[Shaped[np.ndarray, "B width"], Bool[np.ndarray, "B width"]]:
        """Pad some rows with 0 on the right; also return the mask. Raises ValueError if a row is longer than width."""
        lengths = self.lengths[rows]
        if np.any(lengths > width):
            raise ValueError(f"a row of {lengths.max()} tokens does not fit into {width}")
        places = np.arange(width)
        mask = places < lengths[:, None]
        values = np.zeros(mask.shape, self.values.dtype)
        values[mask] = self.values[((self.ends[rows] - lengths)[:, None] + places)[mask]]
        return values, mask


@dataclasses.dataclass(frozen=True)
class RaggedSequences:
    """Prompts with one response each. Raises ValueError if a prompt has no token."""

    prompts: Ragged
    responses: Ragged

    def __post_init__(self) -> None:
        if not np.all(self.prompts.lengths):
            raise ValueError("a prompt has no token: the first token of its response would have no prediction")

    def __len__(self) -> int:
        return len(self.prompts.ends)

    @classmethod
    def of_rollout(cls, rollout: Rollout[np.ndarray]) -> "RaggedSequences":
        """Drop the padding of a rollout."""
        prompt, prompt_mask, response, response_mask = map(np.asarray, rollout)
        return cls(
            Ragged(prompt[prompt_mask], np.cumsum(prompt_mask.sum(axis=1))),
            Ragged(response[response_mask], np.cumsum(response_mask.sum(axis=1))),
        )

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Number of tokens of each row, prompt and response."""
        return self.prompts.lengths + self.responses.lengths

    def needed(self, prompts: Int[np.ndarray, "B"], responses: Int[np.ndarray, "B"]) -> RowWidths:
        """Return the smallest widths for the prompts and the responses of some rows, which may differ."""
        lengths = self.responses.lengths[responses]
        return RowWidths(int((self.prompts.lengths[prompts] + lengths).max()), int(lengths.max()))

    def padded(
        self, prompts: Int[np.ndarray, "B"], responses: Int[np.ndarray, "B"], widths: RowWidths
    ) -> Sequences[np.ndarray]:
        """Pad the prompts of some rows with the responses of some rows, usually the same."""
        start = self.prompts.lengths[prompts]
        tokens, mask = self.prompts.padded(prompts, widths.sequence)
        response, response_mask = self.responses.padded(responses, widths.response)
        row, place = np.nonzero(response_mask)
        tokens[row, start[row] + place] = response[response_mask]
        mask[row, start[row] + place] = True
        return Sequences(tokens, mask, start.astype(np.int32), response, response_mask)


class RaggedPairs(NamedTuple):
    """Pairs of responses to the same prompts."""

    chosen: RaggedSequences
    rejected: RaggedSequences


@dataclasses.dataclass(frozen=True)
class Table(Generic[Batch]):
    """Rows of data of different lengths, and functions from their numbers to a padded batch."""

    lengths: Int[np.ndarray, "N"]  # number of tokens of the longest sequence of each row
    needed: Callable[[Int[np.ndarray, "B"]], RowWidths]  # smallest widths for a batch
    padded: Callable[[Int[np.ndarray, "B"], RowWidths], Batch]
    longest: int  # width that holds every batch

    def to(self, make: Callable[[Batch, Int[np.ndarray, "B"]], Other]) -> "Table[Other]":
        """Make batches of another type from a batch and the numbers of its rows."""
        return Table(
            self.lengths, self.needed, lambda rows, widths: make(self.padded(rows, widths), rows), self.longest
        )

    def all(self) -> Batch:
        """Pad all rows to the longest."""
        rows = np.arange(len(self.lengths))
        return self.padded(rows, self.needed(rows))


def token_table(tokens: Ragged, trained: Ragged) -> Table[TokenBatch[np.ndarray]]:
    """Make a table of sequences. Args: trained marks the tokens whose prediction is trained."""

    def needed(rows: Int[np.ndarray, "B"]) -> RowWidths:
        longest = int(tokens.lengths[rows].max())
        return RowWidths(longest, longest)

    def padded(rows: Int[np.ndarray, "B"], widths: RowWidths) -> TokenBatch[np.ndarray]:
        return TokenBatch(*tokens.padded(rows, widths.sequence), trained.padded(rows, widths.sequence)[0])

    return Table(tokens.lengths, needed, padded, int(tokens.lengths.max()))


def sequence_table(sequences: RaggedSequences) -> Table[Sequences[np.ndarray]]:
    """Make a table of prompts with one response each."""
    return Table(
        sequences.lengths,
        lambda rows: sequences.needed(rows, rows),
        lambda rows, widths: sequences.padded(rows, rows, widths),
        int(sequences.lengths.max()),
    )


def pair_table(pairs: RaggedPairs) -> Table[PreferenceBatch[np.ndarray]]:
    """Make a table of pairs, both responses padded to the same widths, so that one forward pass computes both."""

    def needed(rows: Int[np.ndarray, "B"]) -> RowWidths:
        return widest(side.needed(rows, rows) for side in pairs)

    def padded(rows: Int[np.ndarray, "B"], widths: RowWidths) -> PreferenceBatch[np.ndarray]:
        return PreferenceBatch(*(side.padded(rows, rows, widths) for side in pairs))

    lengths = np.maximum(pairs.chosen.lengths, pairs.rejected.lengths)
    return Table(lengths, needed, padded, int(lengths.max()))


def widest(each: Iterable[RowWidths]) -> RowWidths:
    """Return the smallest widths that hold several batches."""
    return RowWidths(*np.max(list(each), axis=0).tolist())
