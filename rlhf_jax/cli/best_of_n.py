"""`rlhf-jax best-of-n`: sample several answers to each prompt and keep the one with the highest reward."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

from rlhf_jax.cli import flags
from rlhf_jax.cli.json_lines import RowFile, StandardOutput, read_objects
from rlhf_jax.cli.output import counting_rows, until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.inference.best_of_n import (
    ADDED,
    MAX_NEW_TOKENS,
    QUEUE,
    ROWS,
    Chooser,
    answer,
    check_choice,
    checked_rows,
)
from rlhf_jax.interop.hub import checkpoint_hash
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError
from rlhf_jax.user_code import file_hash

DESCRIPTION = """\
Read JSON rows with a prompt from standard input, sample --n answers to each, and write the rows in the same order
with four more columns:

  completion    the answer with the highest score; with --soft=LAMBDA, an answer drawn with probability proportional
                to exp(score / LAMBDA)
  score         the score of that answer
  scores        the scores of all answers, in the order of sampling
  completions   all answers

A prompt is either a text, which the model continues, or a chat (a list of messages), which the model answers using its
chat template. Answers to a chat are lists of one message. The reward model encodes the texts of prompt and answer with
its own tokenizer and chat template, so scores can be recomputed from the output rows.

Instead of a reward model, --reward names a Python function of prompts and completions. It is called once per row with
all answers and with the row's columns, each repeated for every answer. Several functions are summed with
--reward-weights; a function that returns None for an answer does not contribute to that answer's score.

With --out=FILE, an interrupted run resumes when the same command is given again with the same input; the finished file
is identical, byte for byte, to that of an uninterrupted run. --batch-size sets the number of prompts per batch.
"""


def best_of_n_verb(arguments: list[str]) -> None:
    """Add the best of several sampled answers to each row of prompts."""
    parser = Parser("rlhf-jax best-of-n", DESCRIPTION)
    flags.add_model_flags(parser)
    flags.add_judge_flags(parser)
    parser.add_argument("--n", type=int, default=16, help="answers per prompt (default 16)")
    parser.add_argument("--soft", type=float, metavar="LAMBDA", help="draw from softmax(score / LAMBDA)")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"prompts per batch (default {QUEUE * ROWS} / --n)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write or resume; default standard output")
    flags.add_sampling_flags(parser)
    options = parser.parse_args(arguments)
    batch_size = max(1, QUEUE * ROWS // max(1, options.n)) if options.batch_size is None else options.batch_size
    with flags.naming_flags():
        check_choice(options.n, batch_size, options.soft, options.temperature)
    policy, judge = flags.load_policy(options), flags.require_judge(options)
    if sys.stdin.isatty():
        raise RlhfError("no input rows: use rlhf-jax best-of-n ... < prompts.jsonl > best.jsonl")
    sampling = flags.sampling(options, policy, MAX_NEW_TOKENS)
    chooser = Chooser(policy, judge, sampling, options.stop, options.n, options.soft, options.seed)
    out: StandardOutput | RowFile = StandardOutput()
    if options.out is not None:
        out = RowFile(options.out, _settings(options, sampling, batch_size), ADDED)
    with contextlib.closing(out), until_closed(), counting_rows() as count:
        rows = checked_rows(read_objects(sys.stdin.buffer, "{'prompt': ...}"))
        for first in itertools.count(0, batch_size):
            batch = list(itertools.islice(rows, batch_size))
            done = max(0, min(out.done - first, batch_size))
            for row in batch[:done]:
                out.check(row.number, row.columns)
            if len(batch) < done:
                raise RlhfError(f"--out={options.out} holds {out.done} rows, and the input only {first + len(batch)}")
            if not batch:
                break
            if done < len(batch):  # recompute the whole batch: in a smaller one, answers could differ in the last bits
                out.write(answer(chooser, batch, first, batch_size)[done:])
                count.add(len(batch) - done)


def _settings(options: argparse.Namespace, sampling: Sampling, batch_size: int) -> dict[str, Any]:
    """Collect everything that determines the output rows besides the input."""
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    settings = {name: getattr(options, name) for name in [*names, "n", "soft", "seed", "dtype", "policy_seed"]}
    settings |= {"max_new_tokens": sampling.max_new_tokens, "batch_size": batch_size}
    return settings | {
        "model": _fingerprint(options, options.model, options.stage),
        "reward_model": None if options.reward else _fingerprint(options, options.reward_model, options.reward_stage),
        "reward": options.reward and [[source, file_hash(source)] for source in options.reward],
        "reward_weights": options.reward_weights,
    }


def _fingerprint(options: argparse.Namespace, source: str | None, stage: str | None) -> str:
    if source is not None:
        return checkpoint_hash(source)
    assert stage is not None
    return Workdir(options.workdir, options.inputs).fingerprint(stage)
