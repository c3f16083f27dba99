"""`rlhf-jax logprobs`: log-probabilities of completions, from JSON lines to JSON lines."""

import json
import sys

from rlhf_jax.cli import flags
from rlhf_jax.cli.json_lines import read_objects
from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.inference.logprobs import BATCH, encode_rows, with_logprobs
from rlhf_jax.types import RlhfError

DESCRIPTION = """\
Read JSON rows with a prompt and a completion (texts, or lists of messages, which are rendered with the model's chat
template) from standard input, and write them in the same order with two more columns:

  logprob          log-probability of the completion given the prompt, in nats: the sum of token_logprobs
  token_logprobs   log-probabilities of the completion's tokens

As in training, the completion includes its stop token (EOS or the end-of-turn token); --no-eos leaves it out. Texts
are not truncated. If a token would span the end of the prompt and the start of the completion, the two are encoded
separately.
"""


def logprobs_verb(arguments: list[str]) -> None:
    """Add log-probabilities to rows of prompts and completions."""
    parser = Parser("rlhf-jax logprobs", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--batch-size", type=int, default=BATCH, metavar="N", help="rows per batch (default 8)")
    parser.add_argument("--no-eos", action="store_true", help="leave out the stop token of each completion")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise RlhfError(f"--batch-size={options.batch_size} must be at least 1")
    if sys.stdin.isatty():
        raise RlhfError("no input rows: use rlhf-jax logprobs --model=DIR < rows.jsonl > out.jsonl")
    policy = flags.load_policy(options)
    separate: list[int] = []
    with until_closed():
        objects = read_objects(sys.stdin.buffer, "{'prompt': ..., 'completion': ...}")
        rows = encode_rows(objects, policy, separate, eos=not options.no_eos)
        for batch in with_logprobs(policy, rows, options.batch_size):
            for row in batch:
                print(json.dumps(row, ensure_ascii=False))
            sys.stdout.flush()
    if separate:
        print(
            f"{len(separate)} completions (the first is row {separate[0]}) were encoded separately from their prompts, "
            "because a token would span both",
            file=sys.stderr,
        )
