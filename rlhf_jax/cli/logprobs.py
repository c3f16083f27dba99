"""`rlhf-jax logprobs`: how likely completions are, a line of JSON in and a line of JSON out."""

import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rlhf_jax.cli import flags
from rlhf_jax.cli.rows import read_objects, shortest
from rlhf_jax.data.formats import checked_row
from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.data.pipeline import Example, encode_pairs
from rlhf_jax.loading.models import Policy
from rlhf_jax.sampling.batches import response_logprobs_all
from rlhf_jax.sampling.buckets import bucket
from rlhf_jax.types import RlhfError, Rollout

DESCRIPTION = """\
Reads rows of JSON from its input, each with a prompt and a completion (texts, or lists of messages, which the model's
chat template writes), and writes each one with two more columns, in the same order:

  logprob          the completion's log-probability given the prompt, in nats: the sum of
  token_logprobs   those of its tokens

The last token is the one that ends the completion (EOS, or the end of the turn), as in training: the log-probability
is that of saying this and no more. With --no-eos it is left out. Text is cut nowhere. A completion whose beginning
would share a token with the end of its prompt is encoded apart from it.
"""


class _Row(NamedTuple):
    columns: dict[str, Any]
    example: Example


def logprobs_verb(arguments: list[str]) -> None:
    """Adds log-probabilities to rows of prompts and completions."""
    parser = flags.Parser("rlhf-jax logprobs", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default 8)")
    parser.add_argument("--no-eos", action="store_true", help="leave out the token that ends a completion")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise RlhfError(f"--batch-size={options.batch_size} must be at least 1")
    if sys.stdin.isatty():
        raise RlhfError("there are no rows to read: rlhf-jax logprobs --model=DIR < rows.jsonl > out.jsonl")
    policy = flags.load_policy(options)
    apart: list[int] = []
    with flags.until_closed():
        rows = read_rows(sys.stdin.buffer, policy, apart, eos=not options.no_eos)
        while batch := list(itertools.islice(rows, options.batch_size)):
            for row, logprobs in zip(batch, completion_logprobs(policy, batch, options.batch_size), strict=True):
                print(json.dumps(row.columns | logprobs, ensure_ascii=False))
            sys.stdout.flush()
    if apart:
        print(f"{len(apart)} completions (the first is row {apart[0]}) were encoded apart", file=sys.stderr)


def read_rows(lines: Iterable[bytes], policy: Policy, apart: list[int], *, eos: bool) -> Iterator[_Row]:
    """Rows with their tokens; numbers of those that were encoded apart from their prompts are added to `apart`.

    Raises RlhfError naming the row that cannot be read.
    """
    for number, columns in read_objects(lines, "{'prompt': ..., 'completion': ...}"):
        row = checked_row(columns, ("prompt", "completion"), f"row {number}")
        (example,), more = encode_pairs(
            [row["prompt"]], [row["completion"]], policy.tokenizer, flags.UNCUT, first=number
        )
        apart += more
        response = example.response
        if not eos and response[-1] in policy.tokenizer.stop_ids:
            example = Example(example.prompt, response[:-1])
        _check_length(example, policy, number)
        yield _Row(columns, example)


def completion_logprobs(policy: Policy, rows: list[_Row], batch_size: int) -> list[dict[str, Any]]:
    """`logprob` and `token_logprobs` of at most `batch_size` rows, in nats."""
    prompts, responses = zip(*(row.example for row in rows), strict=True)
    rollout = Rollout(
        *pad_left(prompts, bucket(max(map(len, prompts)))), *pad_right(responses, bucket(max(map(len, responses))))
    )
    logprobs = response_logprobs_all(policy.network, policy.params, rollout, batch_size)
    tokens = [shortest(row[: len(response)]) for row, response in zip(logprobs, responses, strict=True)]
    return [{"logprob": math.fsum(row), "token_logprobs": row} for row in tokens]


def _check_length(example: Example, policy: Policy, number: int) -> None:
    length, context = len(example.prompt) + len(example.response), policy.network.config.context
    if context is not None and length > context:
        raise RlhfError(f"row {number} has {length} tokens, and the model sees {context}: shorten it")
