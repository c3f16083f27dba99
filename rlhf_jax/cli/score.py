"""`rlhf-jax score`: scores of completions under a reward model or Python functions, as JSON lines."""

import sys
from pathlib import Path

from rlhf_jax.cli import flags
from rlhf_jax.cli.json_lines import StandardOutput, read_objects
from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.inference.score import BATCH, with_scores
from rlhf_jax.types import RlhfError

DESCRIPTION = """\
Read JSON rows with a prompt and a completion (texts, or lists of messages) from standard input, and write them in the
same order with one more column:

  score   score of the completion given the prompt

A reward model encodes the texts with its own tokenizer and chat template. A function of --reward receives one row at a
time, with the row's other columns. Texts are not truncated.
"""


def score_verb(arguments: list[str]) -> None:
    """Add scores to rows of prompts and completions."""
    parser = Parser("rlhf-jax score", DESCRIPTION)
    flags.add_judge_flags(parser)
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="work directory of --reward-stage")
    parser.add_argument("--inputs", type=Path, metavar="DIR", help="work directory given to the experiment as --inputs")
    parser.add_argument("--batch-size", type=int, default=BATCH, metavar="N", help=f"rows per batch (default {BATCH})")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise RlhfError(f"--batch-size={options.batch_size} must be at least 1")
    reward = flags.require_judge(options)
    if sys.stdin.isatty():
        raise RlhfError("no input rows: use rlhf-jax score --reward-model=DIR < rows.jsonl > out.jsonl")
    with until_closed():
        rows = read_objects(sys.stdin.buffer, "{'prompt': ..., 'completion': ...}")
        for batch in with_scores(reward, rows, options.batch_size):
            StandardOutput().write(batch)
