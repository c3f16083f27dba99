"""`rlhf-jax best-of-n`: several answers to each prompt, and the one that a reward likes best."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

from rlhf_jax.cli import flags
from rlhf_jax.cli.rows import RowFile, StandardOutput, read_objects
from rlhf_jax.inference.best_of_n import (
    GAINED,
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
Reads rows of JSON from its input, each with a prompt, samples --n answers to it, and writes each row with four more
columns, in the same order:

  completion    the answer with the highest score; with --soft=LAMBDA one drawn with probability in proportion to
                exp(score / LAMBDA)
  score         its score
  scores        those of all answers, in the order they were sampled
  completions   all answers

A prompt is a text, which the model continues, or a chat (a list of messages), which it answers by its template; the
answers to a chat are lists of one message. The reward model reads prompt and answer as texts, by its own tokenizer and
chat template: a score is that of what the row says, and anyone can compute it again.

Instead of a reward model, --reward names a Python function of prompts and completions, which is called for each row
with all its answers and the row's columns, each repeated for every answer. Several are summed, with --reward-weights;
None leaves an answer out of one of them.

With --out=FILE a run that was ended by anything goes on when the same command is given again with the same input, and
the file is the same, byte for byte, as if it had not been ended. Rows are answered --batch-size at a time.
"""


def best_of_n_verb(arguments: list[str]) -> None:
    """Adds the best of several answers to rows of prompts."""
    parser = flags.Parser("rlhf-jax best-of-n", DESCRIPTION)
    flags.add_model_flags(parser)
    flags.add_judge_flags(parser)
    parser.add_argument("--n", type=int, default=16, help="answers to each prompt (default 16)")
    parser.add_argument("--soft", type=float, metavar="LAMBDA", help="chooses softly, at this temperature of the score")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"prompts at a time (default {QUEUE * ROWS} / --n)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a file to write, or to go on with; otherwise stdout")
    flags.add_sampling_flags(parser)
    options = parser.parse_args(arguments)
    batch_size = max(1, QUEUE * ROWS // max(1, options.n)) if options.batch_size is None else options.batch_size
    with flags.naming_flags():
        check_choice(options.n, batch_size, options.soft, options.temperature)
    policy, judge = flags.load_policy(options), flags.load_judge(options)
    if judge is None:
        raise RlhfError(
            "no reward is named: give --reward-model=DIR, or --workdir=DIR --reward-stage=NAME, or "
            "--reward=FILE.py:FUNC"
        )
    if sys.stdin.isatty():
        raise RlhfError("there are no rows to read: rlhf-jax best-of-n ... < prompts.jsonl > best.jsonl")
    sampling = flags.sampling(options, policy, MAX_NEW_TOKENS)
    chooser = Chooser(policy, judge, sampling, options.stop, options.n, options.soft, options.seed)
    out: StandardOutput | RowFile = StandardOutput()
    if options.out is not None:
        out = RowFile(options.out, _settings(options, sampling, batch_size), GAINED)
    with contextlib.closing(out), flags.until_closed():
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
            if done < len(batch):  # batches are whole: in another one, an answer could differ in its last bits
                out.write(answer(chooser, batch, first, batch_size)[done:])


def _settings(options: argparse.Namespace, sampling: Sampling, batch_size: int) -> dict[str, Any]:
    """What the rows of an output depend on, beside the input."""
    said = [*(field.name for field in dataclasses.fields(SamplingOptions)), "n", "soft", "seed", "dtype", "policy_seed"]
    settings = {name: getattr(options, name) for name in said}
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
