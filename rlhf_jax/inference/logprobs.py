"""Log-probabilities of completions under a policy."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rlhf_jax.data.formats import checked_row
from rlhf_jax.data.pipeline import Example, encode_pairs, ragged
from rlhf_jax.data.rows import NO_TRUNCATION, numbered, shortest
from rlhf_jax.loading.models import Policy
from rlhf_jax.sampling.batches import logprobs_of_sequences
from rlhf_jax.types import RlhfError

BATCH = 8

SORTED = 16
"""Batches whose rows are sorted by length together."""


class EncodedRow(NamedTuple):
    """Columns of a row, and the tokens of its prompt and completion."""

    columns: dict[str, Any]
    example: Example


def logprobs(
    policy: Policy, rows: pd.DataFrame | Iterable[Mapping[str, Any]], *, eos: bool = True, batch_size: int = BATCH
) -> pd.DataFrame:
    """Add the log-probability of each completion given its prompt, as `rlhf-jax logprobs` does.

        logprobs(policy, [{"prompt": "The film", "completion": " was good."}])

    Args:
        rows: with `prompt` and `completion`, texts or chats; other columns are kept.
        eos: include the stop token of the completion, as in training.
        batch_size: rows per forward pass.

    Returns: the rows with `logprob` (nats, the sum) and `token_logprobs` (nats, a list).

    Raises RlhfError, naming the row, if it lacks a column or is longer than the model's context.
    """
    encoded = encode_rows(numbered(rows), policy, [], eos=eos)
    return pd.DataFrame([row for batch in with_logprobs(policy, encoded, batch_size) for row in batch])


def encode_rows(
    rows: Iterable[tuple[int, dict[str, Any]]], policy: Policy, separate: list[int], *, eos: bool
) -> Iterator[EncodedRow]:
    """Encode numbered rows; append to `separate` the numbers of rows encoded separately from their prompts.

    Raises RlhfError naming the row that cannot be read.
    """
    for number, columns in rows:
        row = checked_row(columns, ("prompt", "completion"), f"row {number}")
        (example,), more = encode_pairs(
            [row["prompt"]], [row["completion"]], policy.tokenizer, NO_TRUNCATION, first=number
        )
        separate += more
        response = example.response
        if not eos and response[-1] in policy.tokenizer.stop_ids:
            example = Example(example.prompt, response[:-1])
        length, context = len(example.prompt) + len(example.response), policy.network.config.context
        if context is not None and length > context:
            raise RlhfError(f"row {number} has {length} tokens, but the model's context is {context}: shorten it")
        yield EncodedRow(columns, example)


def with_logprobs(policy: Policy, rows: Iterator[EncodedRow], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows with `logprob` and `token_logprobs`, in nats, `SORTED` batches at a time."""
    while part := list(itertools.islice(rows, SORTED * batch_size)):
        sequences = ragged([row.example for row in part])
        width = int(sequences.responses.lengths.max())
        logprobs = logprobs_of_sequences(policy.network, policy.params, sequences, batch_size, width=width)
        yield [row.columns | _columns(padded, row.example) for row, padded in zip(part, logprobs, strict=True)]


def _columns(padded_logprobs: np.ndarray, example: Example) -> dict[str, Any]:
    tokens = shortest(padded_logprobs[: len(example.response)])
    return {"logprob": math.fsum(tokens), "token_logprobs": tokens}
