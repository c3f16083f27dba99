"""Answers of one method to the prompts of a split, and all that is measured of them alone."""

from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.core.selection import best_of_n_kl
from rlhf_jax.core.statistics import distinct_n, repetition, standard_error
from rlhf_jax.data import formats, pipeline
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy, load_stage_policy
from rlhf_jax.loading.samples import sample_rows
from rlhf_jax.rewards.judging import TextScorer
from rlhf_jax.rewards.lexicon import vader
from rlhf_jax.rewards.scorers import Scorer, reads_same_tokens
from rlhf_jax.runtime.files import measured
from rlhf_jax.sampling.batches import (
    Divergences,
    response_logprobs_all,
    sample_all,
    sequence_divergences,
    sequence_stats_all,
)
from rlhf_jax.types import RlhfError, Rollout, TokenBatch


class Method(NamedTuple):
    """A row of the table: one answer of a stage's policy, or the best of several by the reward model."""

    name: str
    source: str  # a stage, or a checkpoint
    seed: int
    best_of: int


class Split(NamedTuple):
    """What every method answers, and what its answers are measured by."""

    name: str
    prompts: pipeline.Prompts
    texts: TokenBatch | None  # held-out texts, if the data has any
    reference: Policy
    score: Scorer  # by the reward model
    judge: TextScorer | None


class Answers(NamedTuple):
    """One method's answers to the prompts of a split, in their order."""

    rows: list[dict[str, Any]]  # prompt, completion, score, kl, length, gold
    divergences: Divergences | None  # none for Best-of-N
    ref_nll: float  # nats a token
    text_nll: float | None

    def judged(self) -> np.ndarray:
        """Scores that may decide: the judge's, or the reward model's where no judge gives scores."""
        column = "score" if self.rows[0]["gold"] is None else "gold"
        return np.array([row[column] for row in self.rows])

    def lengths(self) -> np.ndarray:
        """Tokens of each answer, its end included."""
        return np.array([row["length"] for row in self.rows])


def answer(method: Method, split: Split, reference: str, temperature: float, context: Context) -> Answers:
    """One answer of a method to each prompt; a method has its own random numbers on each split.

    Raises RlhfError where the method's policy reads other tokens than the reference's.
    """
    policy = split.reference if method.source == reference else _policy(method, context)
    if not reads_same_tokens(policy.tokenizer, split.reference.tokenizer):
        raise RlhfError(
            f"config.{context.name}: {method.source} has another tokenizer than {reference}, so that neither their "
            "prompts nor their divergence are the same thing: compare models of one tokenizer"
        )
    batch_size = context.runtime.inference_batch
    rollout = sample_all(
        policy.network,
        policy.params,
        split.prompts,
        context.key(f"samples: {method.name} {split.name}", method.seed - context.seed),
        context.sampling(policy.tokenizer, temperature),
        samples=method.best_of,
        batch_size=batch_size,
    )
    scores = split.score(rollout)
    best = np.arange(0, len(scores), method.best_of) + scores.reshape(-1, method.best_of).argmax(axis=1)
    rollout, scores = jax.tree.map(lambda leaf: leaf[best], rollout), scores[best]
    divergences = None  # Best-of-N has no density, but a known divergence
    if method.best_of == 1:
        divergences = sequence_divergences(
            policy.network,
            policy.params,
            (split.reference.network, split.reference.params),
            rollout,
            batch_size=batch_size,
            temperature=temperature,
        )
    kl = [None] * len(scores) if divergences is None else divergences.k1.tolist()
    rows = sample_rows(policy.tokenizer, rollout, scores.tolist(), kl)
    judged = [None] * len(rows)
    if split.judge is not None:
        judged = split.judge(rollout, [row["prompt"] + row["completion"] for row in rows]).tolist()
    return Answers(
        [row | {"gold": gold} for row, gold in zip(rows, judged, strict=True)],
        divergences,
        _answers_nll(split.reference, rollout, batch_size),
        _texts_nll(policy, split.texts, batch_size) if method.best_of == 1 else None,
    )


def measures(found: Answers, best_of: int) -> dict[str, Any]:
    """A method's columns that need no other method. What was not measured is None."""
    judged = found.judged() if found.rows[0]["gold"] is not None else None
    texts = [row["prompt"] + row["completion"] for row in found.rows]
    words = [row["completion"].split() for row in found.rows]
    k1, k3 = (None, None) if found.divergences is None else found.divergences
    return {
        "gold_score": None if judged is None else float(judged.mean()),
        "gold_se": None if judged is None else measured(standard_error(judged)),
        "reward_score": float(np.mean([row["score"] for row in found.rows])),
        "kl": float(best_of_n_kl(best_of)) if k1 is None else float(np.mean(k1.tolist())),
        "kl_se": 0.0 if k1 is None else measured(standard_error(k1)),
        "length": float(np.mean(found.lengths())),
        "vader": float(vader(texts).mean()),
        "distinct_2": measured(distinct_n(words, 2)),
        "kl_k3": None if k3 is None else float(np.mean(k3.tolist())),
        "kl_k3_se": None if k3 is None else measured(standard_error(k3)),
        "ref_nll": found.ref_nll,
        "text_nll": found.text_nll,
        "distinct_1": measured(distinct_n(words, 1)),
        "distinct_3": measured(distinct_n(words, 3)),
        "repetition_4": measured(repetition(words, 4)),
    }


def held_out_texts(rows: list[dict[str, Any]], policy: Policy, context: Context) -> TokenBatch | None:
    """The completions, or plain texts, that SFT would learn from these rows; None where none is a demonstration."""
    if formats.kind_of(rows) in ("prompt", "unpaired", "ranked"):
        return None
    return pipeline.demonstrations(rows, policy.tokenizer, context.data)


def _policy(method: Method, context: Context) -> Policy:
    if method.source not in context.stages:
        return context.policy(method.source)
    find = context.workdir.find
    return load_stage_policy(find(method.source), seed=method.seed, step=None, find=find, where=context.where)


def _answers_nll(reference: Policy, rollout: Rollout, batch_size: int) -> float:
    """How unlikely the reference finds answers, nats a token: the logarithm of their perplexity under it."""
    logprobs = response_logprobs_all(reference.network, reference.params, rollout, batch_size)
    return _mean_nll(logprobs, np.asarray(rollout.response_mask))


def _texts_nll(policy: Policy, texts: TokenBatch | None, batch_size: int) -> float | None:
    """How unlikely a policy finds held-out texts, nats a token: the logarithm of its perplexity."""
    if texts is None:
        return None
    stats = sequence_stats_all(policy.network, policy.params, texts, batch_size)
    return _mean_nll(np.asarray(stats.logprobs), texts.loss_mask[:, 1:])


def _mean_nll(logprobs: np.ndarray, mask: np.ndarray) -> float:
    return float(-np.sum(logprobs, where=mask, dtype=np.float64) / np.sum(mask))
