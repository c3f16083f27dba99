"""Best-of-N: several answers to each prompt, and the one that a reward prefers."""

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
from rlhf_jax.inference.encoding import encode_prompts
from rlhf_jax.inference.score import function_scores, model_scores, scored_examples
from rlhf_jax.inference.tables import numbered, shortest
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.samples import respond
from rlhf_jax.rewards.sources import AnyReward, Reward, as_reward
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError

GAINED = ("completion", "score", "scores", "completions")
"""Columns that the rows gain."""

MAX_NEW_TOKENS = 256
ROWS = 128
"""Answers that are scored, or sampled in slots, at once."""

QUEUE = 4
"""How many times as many are sampled in one program, so that few slots are ever idle."""


class Row(NamedTuple):
    """A row with a prompt: its number, its columns, and the prompt, a text or a chat."""

    number: int
    columns: dict[str, Any]
    prompt: Content


class Chooser(NamedTuple):
    """A policy that answers, a reward that chooses, and how both do so."""

    policy: Policy
    reward: RewardModel | Reward
    sampling: Sampling
    stops: Sequence[str]
    n: int
    soft: float | None  # temperature of the choice; None takes the best
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
    """Sample n answers to each prompt and keep the one that a reward prefers, as `rlhf-jax best-of-n` does.

        best_of_n(policy, reward_model, [{"prompt": "The film"}], n=8, max_new_tokens=32)

    Args:
        policy, reward: as for `sample` and `score`.
        rows: with `prompt`, texts or chats; other columns are kept, and given to a function.
        n: answers to each prompt.
        soft: draws an answer with probability in proportion to exp(score / soft) instead of taking the best.
        seed: of the random numbers.
        batch_size: prompts at a time (512 / n).
        options: fields of `SamplingOptions`, as for `sample`; max_new_tokens is 256.

    Returns: the rows with `completion` and its `score`, and all `scores` and `completions`.

    Raises RlhfError naming the row whose prompt cannot be read or is too long, or whose score is no number.
    """
    batch_size = max(1, QUEUE * ROWS // max(1, n)) if batch_size is None else batch_size
    how = configs.build(SamplingOptions, options, "best_of_n")
    check_choice(n, batch_size, soft, how.temperature)
    sampling = how.sampling(policy.tokenizer.stop_ids, MAX_NEW_TOKENS)
    chooser = Chooser(policy, as_reward(reward), sampling, how.stop, n, soft, seed)
    checked = [*checked_rows(numbered(rows))]
    starts = range(0, len(checked), batch_size)
    found = [row for start in starts for row in answer(chooser, checked[start : start + batch_size], start, batch_size)]
    return pd.DataFrame(found)


def check_choice(n: int, batch_size: int, soft: float | None, temperature: float) -> None:
    """Raise RlhfError for numbers that make no sense."""
    if n < 1:
        raise RlhfError(f"n = {n} must be at least 1")
    if batch_size < 1:
        raise RlhfError(f"batch_size = {batch_size} must be at least 1")
    if soft is not None and not soft > 0:
        raise RlhfError(f"soft = {soft:g} must be above 0: without it the answer with the highest score is chosen")
    if n > 1 and temperature == 0:
        raise RlhfError(f"temperature = 0 gives {n} times the same answer: give one above 0, or n = 1")


def checked_rows(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Row]:
    """Yield rows with their prompts. Raises RlhfError naming the row without one, or with a column it is to gain."""
    for number, columns in rows:
        prompt = checked_row(columns, ("prompt",), f"row {number}")["prompt"]
        if prompt == []:
            raise RlhfError(f"row {number}, column prompt is a chat without a message: remove the row, or write one")
        for name in GAINED:
            if name in columns:
                raise RlhfError(f"row {number} has a column {name} already: rename it, so that it is not lost")
        yield Row(number, columns, prompt)


def answer(chooser: Chooser, rows: Sequence[Row], first: int, batch_size: int) -> list[dict[str, Any]]:
    """Answer at most `batch_size` rows; `first` counts the rows before them, and numbers their answers.

    The j-th answer to the i-th row of all has the random numbers of row i * n + j, as in `sample`.
    Raises RlhfError naming the row whose prompt cannot be read or is too long, or whose score is no number.
    """
    completions, ended = _sample(chooser, rows, first, batch_size)
    scores = _scores(chooser, rows, completions, ended, batch_size)
    if chooser.soft is None:
        chosen = np.argmax(scores, axis=1)
    else:
        uniforms = [np.random.default_rng((chooser.seed, first + i)).random() for i in range(len(rows))]
        chosen = soft_choice(scores, uniforms, temperature=chooser.soft)
    found = []
    for row, answers, own, best in zip(rows, completions, scores, chosen.tolist(), strict=True):
        values = shortest(own)
        columns = dict(zip(GAINED, (answers[best], values[best], values, answers), strict=True))
        found.append(row.columns | columns)
    return found


def _sample(
    chooser: Chooser, rows: Sequence[Row], first: int, batch_size: int
) -> tuple[list[list[Content]], list[list[bool]]]:
    """Sample answers to every row, as texts or as lists of one message, and whether each ended or was cut off."""
    policy, n = chooser.policy, chooser.n
    prompts = []
    for row in rows:
        with naming_row(row.number):
            prompts += encode_prompts([row.prompt], policy)
    found = respond(
        policy,
        prompts,
        jax.random.key(chooser.seed),
        chooser.sampling,
        chooser.stops,
        samples=n,
        batch_size=min(ROWS, batch_size * n),
        first=first,
    )
    answers = [
        [text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}] for text in own]
        for row, own in ((row, found.texts[i * n : (i + 1) * n]) for i, row in enumerate(rows))
    ]
    return answers, [found.ended[i * n : (i + 1) * n] for i in range(len(rows))]


def _scores(
    chooser: Chooser,
    rows: Sequence[Row],
    completions: Sequence[Sequence[Content]],
    ended: Sequence[Sequence[bool]],
    batch_size: int,
) -> np.ndarray:
    """Score the answers of every row on its own, whatever stands beside it: float32[rows, n]."""
    reward = chooser.reward
    if isinstance(reward, Reward):
        scores = []
        for row, answers in zip(rows, completions, strict=True):
            with naming_row(row.number):
                scores.append(function_scores(reward, chooser.policy.tokenizer, row.prompt, answers, row.columns))
        return np.stack(scores)
    examples = [
        example
        for row, answers, whole in zip(rows, completions, ended, strict=True)
        for example in scored_examples(reward, row.prompt, answers, whole, row.number)
    ]
    found = model_scores(reward, examples, min(ROWS, batch_size * chooser.n)).reshape(len(rows), chooser.n)
    for row, own in zip(rows, found, strict=True):
        if not np.isfinite(own).all():
            raise RlhfError(f"row {row.number}: the reward model's scores are not all numbers ({own.tolist()})")
    return found
