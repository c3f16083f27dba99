"""Scores of responses: by a reward model, perhaps through a tokenizer of its own, and by Python functions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import numpy as np

from rlhf_jax.data import pipeline
from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.samples import texts
from rlhf_jax.rewards.functions import weighted_sum
from rlhf_jax.rewards.sources import Reward
from rlhf_jax.runtime.programs import Scored
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import RlhfError, Rollout

TAKEN = {"prompt", "prompts", "completion", "completions", "completion_ids"}
"""Columns that are not given to functions, because these are what the policy wrote."""

ROOM = 2
"""How many times as many tokens a text may have for another tokenizer as for the policy's."""

Scorer = Callable[[Rollout], np.ndarray]
HostScorer = Callable[[Rollout], Scored]


def reads_same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give every text, and every chat, the same tokens."""
    return (
        one.backend.to_str() == other.backend.to_str()
        and one.prefix == other.prefix
        and one.chat_template == other.chat_template
    )


def joins_program(reward: RewardModel | Reward, policy: Policy) -> TypeGuard[RewardModel]:
    """Whether a reward can be computed from the policy's tokens, and so within the compiled iteration."""
    return isinstance(reward, RewardModel) and reads_same_tokens(reward.tokenizer, policy.tokenizer)


def make_scorer(
    reward_model: RewardModel | Reward,
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    data: DataConfig,
    batch_size: int,
) -> Scorer:
    """The scores of the policy's responses, float32[N]: of its tokens, or of their text in the reward model's tokens.

    A response that was cut off is read without EOS either way, as the reward model would see its tokens.

    Args: rows are those that the prompts were made from. Their chats are written anew, by the reward model's template,
    and their columns are given to Python functions.
    """
    if isinstance(reward_model, Reward):
        total = _make_sum(reward_model, policy, rows, data, batch_size)
        return lambda rollout: total(rollout).scores
    if reads_same_tokens(reward_model.tokenizer, policy.tokenizer):
        return lambda rollout: score_all(reward_model.network, reward_model.params, rollout, batch_size)
    wider = dataclasses.replace(
        data, max_prompt_tokens=ROOM * data.max_prompt_tokens, max_response_tokens=ROOM * data.max_response_tokens
    )
    original = _originals(rows, policy.tokenizer, data)

    def score(rollout: Rollout) -> np.ndarray:
        prompts, completions, _ = _written(rollout, policy, original)
        response, mask = map(np.asarray, rollout[2:])
        ended = [
            bool(np.isin(ids[own], policy.tokenizer.stop_ids).any()) for ids, own in zip(response, mask, strict=True)
        ]
        examples, _ = pipeline.encode_pairs(prompts, completions, reward_model.tokenizer, wider, ended=ended)
        read = Rollout(
            *pad_left([example.prompt for example in examples], wider.max_prompt_tokens),
            *pad_right([example.response for example in examples], wider.max_response_tokens),
        )
        return score_all(reward_model.network, reward_model.params, read, batch_size)

    return score


def make_host_scorer(
    reward_model: RewardModel | Reward,
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    data: DataConfig,
    batch_size: int,
) -> HostScorer:
    """The same scores for an iteration's host, with a reward's parts to be logged as `rewards/NAME`."""
    if isinstance(reward_model, Reward):
        return _make_sum(reward_model, policy, rows, data, batch_size)
    score = make_scorer(reward_model, policy, rows, data, batch_size)
    return lambda rollout: Scored(score(rollout), {})


def _make_sum(
    reward: Reward, policy: Policy, rows: Sequence[dict[str, Any]], data: DataConfig, batch_size: int
) -> HostScorer:
    """The weighted sum of a reward's parts, and the parts."""
    original = _originals(rows, policy.tokenizer, data)
    columns = {name for row in original.values() for name in row} - TAKEN
    by_model = None if reward.model is None else make_scorer(reward.model, policy, rows, data, batch_size)
    sources = [function.source for function in reward.functions]

    def score(rollout: Rollout) -> Scored:
        prompts, completions, found = _written(rollout, policy, original)
        given = {name: [row[name] for row in found] for name in columns}
        response, mask = map(np.asarray, rollout[2:])
        given["completion_ids"] = [ids[kept].tolist() for ids, kept in zip(response, mask, strict=True)]
        parts = [] if by_model is None else [_finite(by_model(rollout), prompts, completions)]
        parts += [function(prompts, completions, given) for function in reward.functions]
        total = weighted_sum(np.stack(parts, axis=1), reward.weights, sources, prompts, completions)
        return Scored(total, {f"rewards/{name}": part for name, part in zip(reward.names, parts, strict=True)})

    return score


def _finite(scores: np.ndarray, prompts: list[Any], completions: list[Any]) -> np.ndarray:
    """float64[N]. Raises RlhfError where a score is none: in a sum it would pass for a function's None."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise RlhfError(
            f"the reward model gave {scores[bad[0]]} to the completion {completions[bad[0]]!r:.200} of the prompt "
            f"{prompts[bad[0]]!r:.200}: its training has diverged; train it anew, with a lower learning_rate"
        )
    return np.asarray(scores, np.float64)


def _written(
    rollout: Rollout, policy: Policy, original: dict[bytes, dict[str, Any]]
) -> tuple[list[Any], list[Any], list[dict[str, Any]]]:
    """Prompts as their data has them, completions of the same kind, and the prompts' rows."""
    shown, completions = texts(policy.tokenizer, rollout)
    keys = [_key(ids[mask]) for ids, mask in zip(*map(np.asarray, rollout[:2]), strict=True)]
    found = [original.get(key, {}) for key in keys]
    prompts: list[Any] = [row.get("prompt", prompt) for row, prompt in zip(found, shown, strict=True)]
    answers: list[Any] = completions
    if isinstance(prompts[0], list):
        answers = [[{"role": "assistant", "content": completion}] for completion in completions]
    return prompts, answers, found


def _originals(rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, data: DataConfig) -> dict[bytes, dict[str, Any]]:
    """The rows of a column of prompts, by the prompts' tokens; beginnings of plain text are their own text.

    Of their other columns there are those that all rows have, and in which the rows with one prompt agree.
    """
    if "prompt" not in rows[0]:
        return {}
    prompts = pipeline.prompts(list(rows), tokenizer, data)
    found: dict[bytes, dict[str, Any]] = {}
    kept = set.intersection(*map(set, rows))
    for ids, mask, row in zip(prompts.tokens, prompts.mask, rows, strict=True):
        other = found.setdefault(_key(ids[mask]), row)
        kept -= {name for name in kept if other[name] != row[name]}
    return {key: {name: row[name] for name in row if name in {*kept, "prompt"}} for key, row in found.items()}


def _key(ids: np.ndarray) -> bytes:
    return np.asarray(ids, np.int32).tobytes()
