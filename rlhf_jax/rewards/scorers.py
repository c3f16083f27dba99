"""Scorers of responses: reward models, possibly with another tokenizer than the policy's, and Python functions."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import numpy as np

from rlhf_jax.data import pipeline
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.samples import texts
from rlhf_jax.rewards.functions import weighted_sum
from rlhf_jax.rewards.sources import Reward
from rlhf_jax.runtime.two_programs import Scored
from rlhf_jax.sampling.batches import score_all, score_sequences
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import RlhfError, Rollout

RESERVED_COLUMNS = {"prompt", "prompts", "completion", "completions", "completion_ids"}
"""Column names not passed to functions, because they denote the policy's prompts and completions."""

LENGTH_FACTOR = 2
"""Factor on the maximum lengths for a reward model with another tokenizer."""

Scorer = Callable[[Rollout[np.ndarray]], np.ndarray]
HostScorer = Callable[[Rollout[np.ndarray]], Scored]


def same_tokenizer(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether two tokenizers encode every text and every chat identically."""
    return (
        _encoder(first) == _encoder(second)
        and first.prefix == second.prefix
        and first.chat_template == second.chat_template
    )


def _encoder(tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe a tokenizer without its post-processor, which exports write differently; prefixes are compared."""
    return json.loads(tokenizer.backend.to_str()) | {"post_processor": None}


def joins_program(reward: RewardModel | Reward, policy: Policy) -> TypeGuard[RewardModel]:
    """Return whether a reward can be computed from the policy's tokens inside the compiled iteration."""
    return isinstance(reward, RewardModel) and same_tokenizer(reward.tokenizer, policy.tokenizer)


def make_scorer(
    reward_model: RewardModel | Reward,
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    data: DataConfig,
    batch_size: int,
) -> Scorer:
    """Create a scorer of the policy's responses, float32[N].

    A reward model with the policy's tokenizer scores the tokens themselves; any other one encodes the decoded texts. In
    both cases, responses that were cut off have no EOS.

    Args: rows are the rows of the prompts. Their chats are rendered with the reward model's template, and Python
    functions receive their columns.
    """
    if isinstance(reward_model, Reward):
        total = _make_sum(reward_model, policy, rows, data, batch_size)
        return lambda rollout: total(rollout).scores
    if same_tokenizer(reward_model.tokenizer, policy.tokenizer):
        return lambda rollout: score_all(reward_model.network, reward_model.params, rollout, batch_size)
    wider = dataclasses.replace(
        data,
        max_prompt_tokens=LENGTH_FACTOR * data.max_prompt_tokens,
        max_response_tokens=LENGTH_FACTOR * data.max_response_tokens,
    )
    by_prompt = _rows_by_prompt(rows, policy.tokenizer, data)

    def score(rollout: Rollout[np.ndarray]) -> np.ndarray:
        prompts, completions, _ = _decode(rollout, policy, by_prompt)
        response, mask = map(np.asarray, rollout[2:])
        ended = [
            bool(np.isin(ids[kept], policy.tokenizer.stop_ids).any()) for ids, kept in zip(response, mask, strict=True)
        ]
        examples, _ = pipeline.encode_pairs(prompts, completions, reward_model.tokenizer, wider, ended=ended)
        return score_sequences(reward_model.network, reward_model.params, pipeline.ragged(examples), batch_size)

    return score


def make_host_scorer(
    reward_model: RewardModel | Reward,
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    data: DataConfig,
    batch_size: int,
) -> HostScorer:
    """Create a scorer like `make_scorer`, which also returns a reward's parts, for the metrics `rewards/NAME`."""
    if isinstance(reward_model, Reward):
        return _make_sum(reward_model, policy, rows, data, batch_size)
    score = make_scorer(reward_model, policy, rows, data, batch_size)
    return lambda rollout: Scored(score(rollout), {})


def _make_sum(
    reward: Reward, policy: Policy, rows: Sequence[dict[str, Any]], data: DataConfig, batch_size: int
) -> HostScorer:
    """Create a scorer for the weighted sum of a reward's parts."""
    by_prompt = _rows_by_prompt(rows, policy.tokenizer, data)
    names = {name for row in by_prompt.values() for name in row} - RESERVED_COLUMNS
    model_score = None if reward.model is None else make_scorer(reward.model, policy, rows, data, batch_size)
    sources = [function.source for function in reward.functions]

    def score(rollout: Rollout[np.ndarray]) -> Scored:
        prompts, completions, prompt_rows = _decode(rollout, policy, by_prompt)
        columns = {name: [row[name] for row in prompt_rows] for name in names}
        response, mask = map(np.asarray, rollout[2:])
        columns["completion_ids"] = [ids[kept].tolist() for ids, kept in zip(response, mask, strict=True)]
        parts = [] if model_score is None else [_finite(model_score(rollout), prompts, completions)]
        parts += [function(prompts, completions, columns) for function in reward.functions]
        total = weighted_sum(np.stack(parts, axis=1), reward.weights, sources, prompts, completions)
        return Scored(total, {f"rewards/{name}": part for name, part in zip(reward.names, parts, strict=True)})

    return score


def _finite(scores: np.ndarray, prompts: list[Any], completions: list[Any]) -> np.ndarray:
    """Convert scores to float64[N]. Raises RlhfError for non-finite scores; NaN would mean "not applicable"."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise RlhfError(
            f"the reward model gave {scores[bad[0]]} to the completion {completions[bad[0]]!r:.200} of the prompt "
            f"{prompts[bad[0]]!r:.200}: its training has diverged; train it again with a lower learning_rate"
        )
    return np.asarray(scores, np.float64)


def _decode(
    rollout: Rollout[np.ndarray], policy: Policy, by_prompt: dict[bytes, dict[str, Any]]
) -> tuple[list[Any], list[Any], list[dict[str, Any]]]:
    """Prompts as in the data (texts or chats), completions of the same type, and the prompts' rows."""
    decoded, completions = texts(policy.tokenizer, rollout)
    keys = [_key(ids[mask]) for ids, mask in zip(*map(np.asarray, rollout[:2]), strict=True)]
    rows = [by_prompt.get(key, {}) for key in keys]
    prompts: list[Any] = [row.get("prompt", prompt) for row, prompt in zip(rows, decoded, strict=True)]
    answers: list[Any] = completions
    if isinstance(prompts[0], list):
        answers = [[{"role": "assistant", "content": completion}] for completion in completions]
    return prompts, answers, rows


def _rows_by_prompt(
    rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, data: DataConfig
) -> dict[bytes, dict[str, Any]]:
    """Map the tokens of each prompt to its row; empty for plain texts, whose prompts are only decoded.

    Other columns are kept if every row has them and all rows with the same prompt agree.
    """
    if "prompt" not in rows[0]:
        return {}
    prompts = pipeline.prompts(list(rows), tokenizer, data)
    by_prompt: dict[bytes, dict[str, Any]] = {}
    kept = set.intersection(*map(set, rows))
    for ids, mask, row in zip(prompts.tokens, prompts.mask, rows, strict=True):
        other = by_prompt.setdefault(_key(ids[mask]), row)
        kept -= {name for name in kept if other[name] != row[name]}
    return {key: {name: row[name] for name in row if name in {*kept, "prompt"}} for key, row in by_prompt.items()}


def _key(ids: np.ndarray) -> bytes:
    return np.asarray(ids, np.int32).tobytes()
