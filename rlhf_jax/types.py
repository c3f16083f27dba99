"""Dimension letters, the batches that all packages share, and the error for bad input.

Dimension letters, used in every jaxtyping annotation:

    B  rows of a batch                V  vocabulary
    P  prompt tokens (left-padded)    D  model width
    T  response tokens (right-padded) H  attention heads
    S  sequence tokens                K  width of one head

Masks are boolean and positive: True marks a token that counts. Batches are NamedTuples of arrays whose first axis is B.
"""

from typing import Any, Generic, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from typing_extensions import TypeVar

A = TypeVar("A", jax.Array, np.ndarray, default=jax.Array)
"""Arrays of a batch: `Rollout` is on the device, `Rollout[np.ndarray]` on the host."""

Json: TypeAlias = Any
"""A value of a JSON file, of any form."""

Row: TypeAlias = dict[str, Json]
"""A row of a table (data, metrics or samples): values by column name."""


class RlhfError(Exception):
    """Error for bad input: the message says what is wrong, where, and what to do. Printed without a traceback."""


class Packing(NamedTuple, Generic[A]):
    """Layout of a batch's sequences in fewer rows of W tokens, which networks read instead of padded rows.

    The sequences form G groups of N, in order. Each group has R rows of its own, so that devices and micro-batches hold
    whole groups. A position is counted over all rows of a group, from 0 to R W - 1. Unused entries are -1.
    """

    sequence: Int[A, "G R W"]  # the sequence that each position belongs to, counted within the group
    first: Int[A, "G N"]  # position of the first token of each sequence
    read: Int[A, "G M"]  # tokens whose prediction a loss reads, counted over the N x T response tokens of a group


class TokenBatch(NamedTuple, Generic[A]):
    """Right-padded sequences for next-token training."""

    tokens: Int[A, "B S"]
    mask: Bool[A, "B S"]  # a token, not padding
    loss_mask: Bool[A, "B S"]  # a token whose prediction is trained (never the first)
    packing: Packing[A] | None = None  # None: networks read the padded rows; the response tokens are all but the first


class PromptBatch(NamedTuple, Generic[A]):
    """Left-padded prompts; `rows` numbers them within the global batch, so that each row has its own random key."""

    tokens: Int[A, "B P"]
    mask: Bool[A, "B P"]
    rows: Int[A, "B"]


class Rollout(NamedTuple, Generic[A]):
    """Prompts with one sampled response each. The response mask is a prefix and includes EOS if it was sampled."""

    prompt: Int[A, "B P"]
    prompt_mask: Bool[A, "B P"]
    response: Int[A, "B T"]
    response_mask: Bool[A, "B T"]


class Sequences(NamedTuple, Generic[A]):
    """Prompts with one response each, in one row: a network reads S tokens, and a loss reads the T response tokens.

    A prompt has at least one token, so that the first response token is predicted like the others.
    """

    tokens: Int[A, "B S"]  # prompt and response, without padding between them
    mask: Bool[A, "B S"]
    start: Int[A, "B"]  # index of the first response token in `tokens`, at least 1
    response: Int[A, "B T"]
    response_mask: Bool[A, "B T"]
    packing: Packing[A] | None = None  # None: networks read the padded rows


class PreferenceBatch(NamedTuple, Generic[A]):
    """Prompts with two responses each, of which `chosen` is preferred; both have the same S and T."""

    chosen: Sequences[A]
    rejected: Sequences[A]


class UnpairedBatch(NamedTuple, Generic[A]):
    """Prompts with one response each, labelled desirable (True) or undesirable."""

    sequences: Sequences[A]
    mismatched: Sequences[A] | None  # the same prompts, each with the response to another prompt of the batch
    label: Bool[A, "B"]


class LabelledPairs(NamedTuple, Generic[A]):
    """Preference pairs, with margins and the votes of raters."""

    pairs: PreferenceBatch[A]
    margin: Float[A, "B"]  # by how much the chosen response should win
    votes: Float[A, "B 2"]  # numbers of raters who prefer the chosen and the rejected response


class ComparisonBatch(NamedTuple, Generic[A]):
    """Prompts with up to K responses each (missing ones have empty masks), and all preferences among them."""

    responses: Sequences[A]  # with an axis K after the rows: [B, K, ...]
    wins: Bool[A, "B K K"]  # wins[b, i, j] if response i is preferred to response j
