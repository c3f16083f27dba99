"""`rlhf-jax best-of-n`: several answers to each prompt, and the one that a reward likes best."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.cli import flags
from rlhf_jax.cli.rows import RowFile, StandardOutput, read_objects, shortest
from rlhf_jax.core.selection import soft_choice
from rlhf_jax.data.chat import naming_row
from rlhf_jax.data.formats import checked_row
from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.data.pipeline import Example, encode_pairs
from rlhf_jax.interop.hub import checkpoint_hash
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.samples import respond
from rlhf_jax.rewards.sources import Reward
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.sampling.buckets import bucket
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError, Rollout
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
GAINED = ("completion", "score", "scores", "completions")
MAX_NEW_TOKENS = 256
ROWS = 128  # answers at a time
QUEUE = 4  # times as many are sampled together unless --batch-size says otherwise, so that few slots are ever idle


class _Row(NamedTuple):
    number: int  # of its line
    columns: dict[str, Any]
    prompt: Any  # a text or a chat


class Chooser(NamedTuple):
    """Who answers, who chooses, and how."""

    policy: Policy
    judge: RewardModel | Reward
    sampling: Sampling
    stops: list[str]
    n: int
    soft: float | None  # the temperature of the choice
    seed: int


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
    _check(options, batch_size)
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
        rows = read_rows(sys.stdin.buffer)
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


def read_rows(lines: Iterable[bytes]) -> Iterator[_Row]:
    """Rows with their prompts. Raises RlhfError naming the row that has none, or a column that it is to gain."""
    for number, columns in read_objects(lines, "{'prompt': ...}"):
        prompt = checked_row(columns, ("prompt",), f"row {number}")["prompt"]
        if prompt == []:
            raise RlhfError(f"row {number}, column prompt is a chat without a message: remove the row, or write one")
        for name in GAINED:
            if name in columns:
                raise RlhfError(f"row {number} has a column {name} already: rename it, so that it is not lost")
        yield _Row(number, columns, prompt)


def answer(chooser: Chooser, rows: list[_Row], first: int, batch_size: int) -> list[dict[str, Any]]:
    """At most `batch_size` rows with what they gain; `first` counts the rows before them, and numbers their answers.

    The j-th answer to the i-th row of all has the random numbers of row i * n + j, as in `rlhf-jax sample`.
    Raises RlhfError naming the row whose prompt cannot be read or is too long, or whose score is no number.
    """
    said, ended = _sample(chooser, rows, first, batch_size)
    scores = _scores(chooser, rows, said, ended, batch_size)
    if chooser.soft is None:
        chosen = np.argmax(scores, axis=1)
    else:
        uniforms = [np.random.default_rng((chooser.seed, first + i)).random() for i in range(len(rows))]
        chosen = soft_choice(scores, uniforms, temperature=chooser.soft)
    found = []
    for row, completions, own, best in zip(rows, said, scores, chosen.tolist(), strict=True):
        values = shortest(own)
        columns = dict(zip(GAINED, (completions[best], values[best], values, completions), strict=True))
        found.append(row.columns | columns)
    return found


def _sample(
    chooser: Chooser, rows: list[_Row], first: int, batch_size: int
) -> tuple[list[list[Any]], list[list[bool]]]:
    """The answers to every row, as texts or as lists of one message, and whether each ended or was cut off."""
    policy, sampling, n = chooser.policy, chooser.sampling, chooser.n
    prompts = []
    for row in rows:
        with naming_row(row.number):
            text = isinstance(row.prompt, str)
            judge = chooser.judge
            if not text and isinstance(judge, RewardModel) and judge.tokenizer.chat_template is None:
                raise RlhfError("the prompt is a chat, and the reward model has no chat template: give a text")
            prompts.append(flags.text_prompt(policy, row.prompt) if text else flags.chat_prompt(policy, row.prompt))
            flags.within_context(policy, prompts[-1], sampling)
    found = respond(
        policy,
        prompts,
        jax.random.key(chooser.seed),
        sampling,
        chooser.stops,
        samples=n,
        batch_size=min(ROWS, batch_size * n),
        first=first,
    )
    said = [
        [text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}] for text in own]
        for row, own in ((row, found.texts[i * n : (i + 1) * n]) for i, row in enumerate(rows))
    ]
    return said, [found.ended[i * n : (i + 1) * n] for i in range(len(rows))]


def _scores(
    chooser: Chooser, rows: list[_Row], said: list[list[Any]], ended: list[list[bool]], batch_size: int
) -> np.ndarray:
    """The reward's scores, float32[rows, n]. A reward model reads an answer that was cut off without an end."""
    judge = chooser.judge
    if isinstance(judge, Reward):
        return _by_functions(judge, chooser.policy, rows, said)
    examples: list[Example] = []
    for row, completions, whole in zip(rows, said, ended, strict=True):
        prompts, own = [row.prompt] * chooser.n, judge.tokenizer
        found, _ = encode_pairs(prompts, completions, own, flags.UNCUT, first=row.number, ended=whole)
        context, longest = judge.network.config.context, max(len(a.prompt) + len(a.response) for a in found)
        if context is not None and longest > context:
            raise RlhfError(
                f"row {row.number} has {longest} tokens with an answer, and the reward model sees {context}: shorten "
                "the prompt, or the answers by --max-new-tokens"
            )
        examples += found
    asked, responses = zip(*examples, strict=True)
    rollout = Rollout(
        *pad_left(asked, bucket(max(map(len, asked)))), *pad_right(responses, bucket(max(map(len, responses))))
    )
    at_once = min(ROWS, batch_size * chooser.n)
    scores = score_all(judge.network, judge.params, rollout, at_once).reshape(len(rows), chooser.n)
    for row, own in zip(rows, scores, strict=True):
        if not np.isfinite(own).all():
            raise RlhfError(f"row {row.number}: the reward model's scores are not all numbers ({own.tolist()})")
    return scores


def _by_functions(reward: Reward, policy: Policy, rows: list[_Row], said: list[list[Any]]) -> np.ndarray:
    """The scores of Python functions, float32[rows, n]: each row's are its own, whatever stands beside it."""
    scores = []
    for row, completions in zip(rows, said, strict=True):
        with naming_row(row.number):
            scores.append(flags.function_scores(reward, policy, row.prompt, completions, row.columns))
    return np.stack(scores)


def _check(options: argparse.Namespace, batch_size: int) -> None:
    if options.n < 1:
        raise RlhfError(f"--n={options.n} must be at least 1")
    if batch_size < 1:
        raise RlhfError(f"--batch-size={batch_size} must be at least 1")
    if options.soft is not None and not options.soft > 0:
        raise RlhfError(
            f"--soft={options.soft:g} must be above 0: without it the answer with the highest score is chosen"
        )
    if options.n > 1 and options.temperature == 0:
        raise RlhfError(f"--temperature=0 gives {options.n} times the same answer: give one above 0, or --n=1")


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
