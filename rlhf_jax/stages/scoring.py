"""Scores of responses by a reward model, which may read them through a tokenizer of its own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import pipeline
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.stages.models import Policy, RewardModel
from rlhf_jax.stages.samples import texts
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Rollout

ROOM = 2
"""How many times as many tokens a text may have for another tokenizer as for the policy's."""

Scorer = Callable[[Rollout], np.ndarray]


def reads_same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give every text, and every chat, the same tokens."""
    return (
        one.backend.to_str() == other.backend.to_str()
        and one.prefix == other.prefix
        and one.chat_template == other.chat_template
    )


def make_scorer(
    reward_model: RewardModel, policy: Policy, rows: Sequence[dict[str, Any]], data: DataConfig, batch_size: int
) -> Scorer:
    """The scores of the policy's responses, float32[N]: of its tokens, or of their text in the reward model's tokens.

    Args: rows are those that the prompts were made from. Their chats are written anew, by the reward model's template.
    """
    if reads_same_tokens(reward_model.tokenizer, policy.tokenizer):
        return lambda rollout: score_all(reward_model.network, reward_model.params, rollout, batch_size)
    wider = dataclasses.replace(
        data, max_prompt_tokens=ROOM * data.max_prompt_tokens, max_response_tokens=ROOM * data.max_response_tokens
    )
    original = _originals(rows, policy.tokenizer, data)

    def score(rollout: Rollout) -> np.ndarray:
        shown, completions = texts(policy.tokenizer, rollout)
        keys = [_key(ids[mask]) for ids, mask in zip(*map(np.asarray, rollout[:2]), strict=True)]
        prompts = [original.get(key, prompt) for key, prompt in zip(keys, shown, strict=True)]
        if isinstance(prompts[0], list):
            completions = [[{"role": "assistant", "content": completion}] for completion in completions]
        examples, _ = pipeline.encode_pairs(prompts, completions, reward_model.tokenizer, wider)
        read = Rollout(
            *pipeline.pad_left([example.prompt for example in examples], wider.max_prompt_tokens),
            *pipeline.pad_right([example.response for example in examples], wider.max_response_tokens),
        )
        return score_all(reward_model.network, reward_model.params, read, batch_size)

    return score


def _originals(rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, data: DataConfig) -> dict[bytes, Any]:
    """The prompts as they stand in the data, by their tokens; beginnings of plain text are their own text."""
    if "prompt" not in rows[0]:
        return {}
    prompts = pipeline.prompts(list(rows), tokenizer, data)
    keys = [_key(ids[mask]) for ids, mask in zip(prompts.tokens, prompts.mask, strict=True)]
    return dict(zip(keys, (row["prompt"] for row in rows), strict=True))


def _key(ids: np.ndarray) -> bytes:
    return np.asarray(ids, np.int32).tobytes()
