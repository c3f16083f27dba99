"""`rlhf-jax logprobs`: how likely completions are, a line of JSON in and a line of JSON out."""

import json
import sys

from rlhf_jax.cli import flags
from rlhf_jax.cli.rows import read_objects
from rlhf_jax.inference.logprobs import BATCH, encode_rows, with_logprobs
from rlhf_jax.types import RlhfError

DESCRIPTION = """\
Reads rows of JSON from its input, each with a prompt and a completion (texts, or lists of messages, which the model's
chat template writes), and writes each one with two more columns, in the same order:

  logprob          the completion's log-probability given the prompt, in nats: the sum of
  token_logprobs   those of its tokens

The last token is the one that ends the completion (EOS, or the end of the turn), as in training: the log-probability
is that of saying this and no more. With --no-eos it is left out. Text is cut nowhere. A completion whose beginning
would share a token with the end of its prompt is encoded apart from it.
"""


def logprobs_verb(arguments: list[str]) -> None:
    """Adds log-probabilities to rows of prompts and completions."""
    parser = flags.Parser("rlhf-jax logprobs", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--batch-size", type=int, default=BATCH, metavar="N", help="rows at a time (default 8)")
    parser.add_argument("--no-eos", action="store_true", help="leave out the token that ends a completion")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise RlhfError(f"--batch-size={options.batch_size} must be at least 1")
    if sys.stdin.isatty():
        raise RlhfError("there are no rows to read: rlhf-jax logprobs --model=DIR < rows.jsonl > out.jsonl")
    policy = flags.load_policy(options)
    apart: list[int] = []
    with flags.until_closed():
        objects = read_objects(sys.stdin.buffer, "{'prompt': ..., 'completion': ...}")
        rows = encode_rows(objects, policy, apart, eos=not options.no_eos)
        for batch in with_logprobs(policy, rows, options.batch_size):
            for row in batch:
                print(json.dumps(row, ensure_ascii=False))
            sys.stdout.flush()
    if apart:
        print(f"{len(apart)} completions (the first is row {apart[0]}) were encoded apart", file=sys.stderr)
