"""Score completions (texts or chats) with a reward model, using its own tokenizer and template, or Python functions."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rlhf_jax.data.formats import checked_row
from rlhf_jax.data.pipeline import Content, Example, encode_pairs, ragged
from rlhf_jax.data.rows import NO_TRUNCATION, numbered, shortest
from rlhf_jax.loading.models import RewardModel
from rlhf_jax.rewards.functions import weighted_sum
from rlhf_jax.rewards.scorers import RESERVED_COLUMNS
from rlhf_jax.rewards.sources import AnyReward, Reward, as_reward
from rlhf_jax.sampling.batches import score_sequences
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import RlhfError

BATCH = 128
"""Completions per forward pass."""


def score(
    reward: AnyReward, rows: pd.DataFrame | Iterable[Mapping[str, Any]], *, batch_size: int = BATCH
) -> pd.DataFrame:
    """Add the score that a reward gives to each completion, as `rlhf-jax score` does.

        score(reward_model, [{"prompt": "The film", "completion": " was good."}])
        score(lambda prompts, completions, **columns: [-len(text) for text in completions], rows)

    Args:
        reward: a reward model, which encodes the texts with its own tokenizer and chat template, or a function
            `(prompts, completions, **columns) -> list of numbers`, which is called once per row.
        rows: with `prompt` and `completion`, texts or chats; other columns are kept and passed to a function.
        batch_size: rows per forward pass of a reward model.

    Returns: the rows with `score`.

    Raises RlhfError, naming the row, if it lacks a column, exceeds the model's context, or has no finite score.
    """
    found = [row for batch in with_scores(as_reward(reward), numbered(rows), batch_size) for row in batch]
    return pd.DataFrame(found, columns=None if found else ["score"])


def with_scores(
    reward: RewardModel | Reward, rows: Iterator[tuple[int, dict[str, Any]]], batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of numbered rows with `score`. Raises RlhfError as `score` does."""
    while batch := list(itertools.islice(rows, batch_size)):
        pairs = [checked_row(row, ("prompt", "completion"), f"row {number}") for number, row in batch]
        if isinstance(reward, Reward):
            scores = np.concatenate(
                [
                    function_scores(reward, None, pair["prompt"], [pair["completion"]], row)
                    for pair, (_, row) in zip(pairs, batch, strict=True)
                ]
            )
        else:
            examples = [
                example
                for pair, (number, _) in zip(pairs, batch, strict=True)
                for example in scored_examples(reward, pair["prompt"], [pair["completion"]], [True], number)
            ]
            scores = model_scores(reward, examples, batch_size)
            for (number, _), value in zip(batch, scores, strict=True):
                if not np.isfinite(value):
                    raise RlhfError(f"row {number}: the reward model returned a non-finite score ({value})")
        yield [row | {"score": value} for (_, row), value in zip(batch, shortest(scores), strict=True)]


def scored_examples(
    model: RewardModel, prompt: Content, completions: Sequence[Content], ended: Sequence[bool], number: int
) -> list[Example]:
    """Encode completions of one prompt for a reward model, without EOS after completions that were cut off.

    Raises RlhfError, naming the row, for a chat if the model has no chat template, and if a row exceeds its context.
    """
    if isinstance(prompt, list) and model.tokenizer.chat_template is None:
        raise RlhfError(
            f"row {number} of the data: the prompt is a chat, but the reward model has no chat template: give a text"
        )
    prompts = [prompt] * len(completions)
    examples, _ = encode_pairs(prompts, completions, model.tokenizer, NO_TRUNCATION, first=number, ended=ended)
    context, longest = model.network.config.context, max(len(a.prompt) + len(a.response) for a in examples)
    if context is not None and longest > context:
        raise RlhfError(
            f"row {number} has {longest} tokens including an answer, but the reward model's context is {context}: "
            "shorten the prompt or reduce max_new_tokens"
        )
    return examples


def model_scores(model: RewardModel, examples: Sequence[Example], batch_size: int) -> np.ndarray:
    """Score encoded completions with a reward model: float32[N]."""
    return score_sequences(model.network, model.params, ragged(examples), batch_size)


def function_scores(
    reward: Reward,
    tokenizer: Tokenizer | None,
    prompt: Content,
    completions: Sequence[Content],
    columns: Mapping[str, Any],
) -> np.ndarray:
    """Score completions of one prompt with Python functions: float32[N].

    Args: columns are the columns of the prompt's row. With a tokenizer, the functions also receive `completion_ids`,
    the completions' tokens including the stop token.
    """
    prompts = [prompt] * len(completions)
    repeated = {name: [value] * len(completions) for name, value in columns.items() if name not in RESERVED_COLUMNS}
    if tokenizer is not None:
        examples, _ = encode_pairs(prompts, list(completions), tokenizer, NO_TRUNCATION)
        repeated["completion_ids"] = [example.response for example in examples]
    parts = [function(prompts, completions, repeated) for function in reward.functions]
    sources = [function.source for function in reward.functions]
    return weighted_sum(np.stack(parts, axis=1), reward.weights, sources, prompts, completions)
