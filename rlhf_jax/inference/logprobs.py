"""Log-probabilities of completions under a policy."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rlhf_jax.data.formats import checked_row
from rlhf_jax.data.pipeline import Example, encode_pairs
from rlhf_jax.data.rows import NO_TRUNCATION, numbered, shortest
from rlhf_jax.inference.encoding import pad_examples
from rlhf_jax.loading.models import Policy
from rlhf_jax.sampling.batches import response_logprobs_all
from rlhf_jax.types import RlhfError

BATCH = 8


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
    """Yield batches of rows with `logprob` and `token_logprobs`, in nats."""
    while batch := list(itertools.islice(rows, batch_size)):
        logprobs = response_logprobs_all(
            policy.network, policy.params, pad_examples([row.example for row in batch]), batch_size
        )
        yield [row.columns | _columns(padded, row.example) for row, padded in zip(batch, logprobs, strict=True)]


def _columns(padded_logprobs: np.ndarray, example: Example) -> dict[str, Any]:
    tokens = shortest(padded_logprobs[: len(example.response)])
    return {"logprob": math.fsum(tokens), "token_logprobs": tokens}
