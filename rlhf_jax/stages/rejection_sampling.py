"""rejection_sampling: sample responses, score them with a reward model, and keep the best as demonstrations for SFT.

This distils Best-of-N. Keeping the best response per prompt and continuing SFT from the sampled policy gives RAFT (Dong
et al. 2023, arXiv:2304.06767), Llama 2's rejection sampling (Touvron et al. 2023, arXiv:2307.09288) and, repeated,
expert iteration. Keeping responses above a threshold gives ReST (Gulcehre et al. 2023, arXiv:2308.08998), whose
thresholds increase from round to round. A round is two stages, and the next round samples from the policy just trained:

    rejection_sampling (policy = sft) -> sft (model.init = sft, demonstrations = the former) -> rejection_sampling ...
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np

from rlhf_jax.config import Count, Finite, ModelSource, NonNegative, Positive, Range, check_ranges
from rlhf_jax.core.selection import soft_choice
from rlhf_jax.data import chat, pipeline
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.samples import draw_and_sample, texts
from rlhf_jax.loading.tables import DEMONSTRATIONS
from rlhf_jax.rewards.scorers import make_scorer
from rlhf_jax.rewards.sources import RewardSource, find_reward
from rlhf_jax.runtime.files import write_rows
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Keep the responses with the highest scores for each prompt."""

    best: Count  # responses kept for each prompt

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class KeepAbove:
    """Keep every response with a score above a threshold, any number per prompt."""

    threshold: Finite  # lowest score, exclusive


@dataclasses.dataclass(frozen=True)
class KeepShare:
    """Keep the share of all responses with the highest scores, regardless of their prompts."""

    share: Annotated[float, Range(above=0, at_most=1)]  # share of all responses to keep

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class KeepSoft:
    """Keep one response per prompt, with probability proportional to exp(score / temperature): Soft Best-of-N."""

    soft_temperature: Positive  # temperature, in units of the score

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class RejectionSamplingConfig:
    """Policy to sample from, reward model, and the rule that selects responses."""

    kind: Literal["rejection_sampling"]
    policy: ModelSource  # policy to sample from
    reward_model: RewardSource  # reward that selects responses
    prompts: Count  # prompts of the training split to sample for
    eval_prompts: Count  # of these prompts, those whose responses are held out
    samples_per_prompt: Count  # responses to each prompt
    temperature: NonNegative  # temperature of the samples; 0 is greedy
    keep: KeepBest | KeepAbove | KeepShare | KeepSoft  # rule that selects responses

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.eval_prompts < self.prompts:
            raise ValueError(
                f"eval_prompts = {self.eval_prompts} must be below prompts = {self.prompts}: the remaining prompts are "
                "for training"
            )
        if isinstance(self.keep, KeepBest) and self.keep.best > self.samples_per_prompt:
            raise ValueError(
                f"keep.best = {self.keep.best} is more than samples_per_prompt = {self.samples_per_prompt}"
            )
        if self.samples_per_prompt > 1 and self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature} must be above 0: at 0 all samples are the same")


def run(config: RejectionSamplingConfig, context: Context) -> dict[str, Any]:
    """Write `demonstrations.jsonl` and `demonstrations_eval.jsonl` (prompt, completion, score).

    Prompts are texts or chats as in the data, or the first tokens of plain texts. Duplicate responses are kept.
    """
    policy, reward_model = context.policy(config.policy), find_reward(context, config.reward_model)
    table = pipeline.load_rows(context.data, "train")
    report_prompts(context, policy.tokenizer, {"train": table})
    drawn = draw_and_sample(
        policy,
        table,
        context,
        prompts=config.prompts,
        samples=config.samples_per_prompt,
        temperature=config.temperature,
    )
    rollout = drawn.rollout
    shape = (config.prompts, config.samples_per_prompt)
    score = make_scorer(reward_model, policy, table, context.data, context.runtime.inference_batch)
    scores = score(rollout).reshape(shape)
    shown, completions = (np.array(column, object).reshape(shape) for column in texts(policy.tokenizer, rollout))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(context.key("choice"))))
    kept = KEEP[type(config.keep)](config.keep, scores, rng)
    rows = [
        [
            demonstration(original_prompt(table, int(row), shown[i, j]), completions[i, j])
            | {"score": float(scores[i, j])}
            for j in np.flatnonzero(kept[i])
        ]
        for i, row in enumerate(drawn.rows)
    ]
    parts = (rows[: config.eval_prompts], rows[config.eval_prompts :])
    held_out, train = (list(itertools.chain.from_iterable(part)) for part in parts)
    if not held_out or not train:
        raise RlhfError(
            f"config.{context.name}.keep leaves {len(train)} responses for training and {len(held_out)} held out, with "
            f"scores from {scores.min():.3g} to {scores.max():.3g}: keep more, or sample more prompts"
        )
    write_rows(context.directory / DEMONSTRATIONS.eval, held_out)
    write_rows(context.directory / DEMONSTRATIONS.train, train)
    figures = {"score": float(scores.mean()), "kept_score": float(scores[kept].mean())}
    context.bar.update(1, 1, {"demonstrations": len(train), **figures})
    return {
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "kept_share": float(kept.mean()),
        "score_std": float(scores.std()),
        **figures,
        "prompt_key": drawn.key,
    }


def keep_best(keep: KeepBest, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask [prompts, samples] of each prompt's best samples; ties are broken by sampling order."""
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return ranks < keep.best


def keep_above(keep: KeepAbove, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask [prompts, samples] of scores above the threshold; a prompt may keep none or all of its samples."""
    return scores > keep.threshold


def keep_share(keep: KeepShare, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask [prompts, samples] of the best share of all samples, rounded to a whole number, at least 1."""
    ranks = np.argsort(np.argsort(-scores.ravel(), kind="stable")).reshape(scores.shape)
    return ranks < max(1, round(keep.share * scores.size))


def keep_soft(keep: KeepSoft, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask [prompts, samples] of one sample per prompt, drawn by Soft Best-of-N."""
    chosen = soft_choice(scores, rng.random(len(scores)), temperature=keep.soft_temperature)
    return np.arange(scores.shape[1]) == chosen[:, None]


KEEP: dict[type, Callable[[Any, np.ndarray, np.random.Generator], np.ndarray]] = {
    KeepBest: keep_best,
    KeepAbove: keep_above,
    KeepShare: keep_share,
    KeepSoft: keep_soft,
}


def demonstration(prompt: Any, completion: str) -> dict[str, Any]:
    """Make a row for SFT; if the prompt is a chat, the completion is a message of the assistant."""
    answer = [{"role": "assistant", "content": completion}] if isinstance(prompt, list) else completion
    return {"prompt": prompt, "completion": answer}


def original_prompt(table: list[dict[str, Any]], row: int, shown: str) -> Any:
    """Return the prompt of a row: its column `prompt`, the chat before the last answer, or the text `shown`."""
    if "prompt" in table[0]:
        return table[row]["prompt"]
    return chat.question(table[row]["messages"]) if "messages" in table[0] else shown
