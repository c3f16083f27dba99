"""Best-of-N: sample several answers to each prompt and keep the one with the highest reward."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from rlhf_jax import config as configs
from rlhf_jax.core.selection import soft_choice
from rlhf_jax.data.chat import naming_row
from rlhf_jax.data.formats import checked_row
from rlhf_jax.data.pipeline import Content
from rlhf_jax.data.rows import numbered, shortest
from rlhf_jax.inference.encoding import as_answers, encode_prompts
from rlhf_jax.inference.score import function_scores, model_scores, scored_examples
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.samples import respond
from rlhf_jax.rewards.sources import AnyReward, Reward, as_reward
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError

ADDED = ("completion", "score", "scores", "completions")
"""Columns added to the rows."""

MAX_NEW_TOKENS = 256
ROWS = 128
"""Answers per decoding or scoring batch."""

QUEUE = 4
"""Default number of answers queued together, in multiples of ROWS, so that few decoding slots are idle."""


class Row(NamedTuple):
    """Row with its number, columns and prompt (a text or a chat)."""

    number: int
    columns: dict[str, Any]
    prompt: Content


class Chooser(NamedTuple):
    """Policy that samples the answers, reward that scores them, and their settings."""

    policy: Policy
    reward: RewardModel | Reward
    sampling: Sampling
    stops: Sequence[str]
    n: int
    soft: float | None  # temperature of soft selection; None selects the maximum
    seed: int


def best_of_n(
    policy: Policy,
    reward: AnyReward,
    rows: pd.DataFrame | Iterable[Mapping[str, Any]],
    *,
    n: int = 16,
    soft: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Sample n answers to each prompt and keep the one with the highest reward, as `rlhf-jax best-of-n` does.

        best_of_n(policy, reward_model, [{"prompt": "The film"}], n=8, max_new_tokens=32)

    Args:
        policy, reward: as for `sample` and `score`.
        rows: with `prompt`, texts or chats; other columns are kept and passed to a Python function.
        n: answers per prompt.
        soft: if given, draw an answer with probability proportional to exp(score / soft) instead of the best.
        seed: random seed.
        batch_size: prompts per batch (default 512 / n).
        options: fields of `SamplingOptions`, as for `sample`; max_new_tokens defaults to 256.

    Returns: the rows with `completion` and its `score`, and all `scores` and `completions`.

    Raises RlhfError, naming the row, if a prompt cannot be encoded or is too long, or if a score is not finite.
    """
    batch_size = max(1, QUEUE * ROWS // max(1, n)) if batch_size is None else batch_size
    sampling_options = configs.build(SamplingOptions, options, "best_of_n")
    check_choice(n, batch_size, soft, sampling_options.temperature)
    sampling = sampling_options.sampling(policy.tokenizer.stop_ids, MAX_NEW_TOKENS)
    chooser = Chooser(policy, as_reward(reward), sampling, sampling_options.stop, n, soft, seed)
    checked = [*checked_rows(numbered(rows))]
    starts = range(0, len(checked), batch_size)
    batches = (answer(chooser, checked[start : start + batch_size], start, batch_size) for start in starts)
    return pd.DataFrame([row for batch in batches for row in batch])


def check_choice(n: int, batch_size: int, soft: float | None, temperature: float) -> None:
    """Raise RlhfError if a value is out of range."""
    if n < 1:
        raise RlhfError(f"n = {n} must be at least 1")
    if batch_size < 1:
        raise RlhfError(f"batch_size = {batch_size} must be at least 1")
    if soft is not None and not soft > 0:
        raise RlhfError(f"soft = {soft:g} must be above 0: omit it to choose the answer with the highest score")
    if n > 1 and temperature == 0:
        raise RlhfError(f"temperature = 0 gives the same answer {n} times: use a positive one, or n = 1")


def checked_rows(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Row]:
    """Yield rows with their prompts.

    Raises RlhfError, naming the row, if a row has no prompt or already has one of the output columns.
    """
    for number, columns in rows:
        prompt = checked_row(columns, ("prompt",), f"row {number}")["prompt"]
        if prompt == []:
            raise RlhfError(f"row {number}, column prompt is an empty chat: remove the row or add a message")
        for name in ADDED:
            if name in columns:
                raise RlhfError(f"row {number} already has a column {name}, which would be overwritten: rename it")
        yield Row(number, columns, prompt)


def answer(chooser: Chooser, rows: Sequence[Row], first: int, batch_size: int) -> list[dict[str, Any]]:
    """Sample, score and select answers for at most `batch_size` rows; return the rows with the output columns.

    Args: first is the number of rows before these. Answer j to row i of the whole input uses the random key of row
    i * n + j, as in `sample`.

    Raises RlhfError, naming the row, if a prompt cannot be encoded or is too long, or if a score is not finite.
    """
    completions, ended = _sample(chooser, rows, first, batch_size)
    scores = _scores(chooser, rows, completions, ended, batch_size)
    if chooser.soft is None:
        chosen = np.argmax(scores, axis=1)
    else:
        uniforms = [np.random.default_rng((chooser.seed, first + i)).random() for i in range(len(rows))]
        chosen = soft_choice(scores, uniforms, temperature=chooser.soft)
    outputs = []
    for row, answers, row_scores, best in zip(rows, completions, scores, chosen.tolist(), strict=True):
        values = shortest(row_scores)
        columns = dict(zip(ADDED, (answers[best], values[best], values, answers), strict=True))
        outputs.append(row.columns | columns)
    return outputs


def _sample(
    chooser: Chooser, rows: Sequence[Row], first: int, batch_size: int
) -> tuple[list[list[Content]], list[list[bool]]]:
    """Sample answers (texts, or lists of one message) to every row; also return whether each ended before the limit."""
    policy, n = chooser.policy, chooser.n
    prompts = []
    for row in rows:
        with naming_row(row.number):
            prompts += encode_prompts([row.prompt], policy)
    responses = respond(
        policy,
        prompts,
        jax.random.key(chooser.seed),
        chooser.sampling,
        chooser.stops,
        samples=n,
        batch_size=min(ROWS, batch_size * n),
        first=first,
    )
    answers = [as_answers(row.prompt, responses.texts[i * n : (i + 1) * n]) for i, row in enumerate(rows)]
    return answers, [responses.ended[i * n : (i + 1) * n] for i in range(len(rows))]


def _scores(
    chooser: Chooser,
    rows: Sequence[Row],
    completions: Sequence[Sequence[Content]],
    ended: Sequence[Sequence[bool]],
    batch_size: int,
) -> np.ndarray:
    """Score the answers of every row: float32[rows, n]. Python functions are called once per row."""
    reward = chooser.reward
    if isinstance(reward, Reward):
        scores = []
        for row, answers in zip(rows, completions, strict=True):
            with naming_row(row.number):
                scores.append(function_scores(reward, chooser.policy.tokenizer, row.prompt, answers, row.columns))
        return np.stack(scores)
    examples = [
        example
        for row, answers, row_ended in zip(rows, completions, ended, strict=True)
        for example in scored_examples(reward, row.prompt, answers, row_ended, row.number)
    ]
    by_row = model_scores(reward, examples, min(ROWS, batch_size * chooser.n)).reshape(len(rows), chooser.n)
    for row, row_scores in zip(rows, by_row, strict=True):
        if not np.isfinite(row_scores).all():
            raise RlhfError(f"row {row.number}: the reward model returned a non-finite score ({row_scores.tolist()})")
    return by_row
