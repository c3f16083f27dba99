"""Answers of one method to the prompts of a split, their metrics, and win rates against another method."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rlhf_jax.core.selection import best_of_n_kl
from rlhf_jax.core.statistics import (
    bootstrap_interval,
    distinct_n,
    length_controlled_win_rate,
    repetition,
    standard_error,
    wilson_interval,
)
from rlhf_jax.data import formats, pipeline
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.data.ragged import Table
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.samples import sample_rows
from rlhf_jax.rewards.judging import TextScorer
from rlhf_jax.rewards.lexicon import vader
from rlhf_jax.rewards.scorers import Scorer
from rlhf_jax.runtime.files import measured
from rlhf_jax.sampling.batches import (
    Divergences,
    response_logprobs_all,
    sample_all,
    sequence_divergences,
    sequence_sums,
)
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.types import Rollout, TokenBatch

Z_95 = 1.959964

Texts = Table[TokenBatch[np.ndarray]]
"""Tokens of held-out texts."""


class EvaluatedMethod(NamedTuple):
    """Method in an evaluation: a policy with one answer per prompt, or Best-of-N by the reward model."""

    name: str
    source: str  # a stage, or a checkpoint
    seed: int
    best_of: int


class Split(NamedTuple):
    """Prompts of a split, with the reference, reward model and judge that evaluate its answers."""

    name: str
    prompts: pipeline.Prompts
    texts: Texts | None  # held-out texts, if the data has any
    reference: Policy
    score: Scorer  # score of the reward model
    judge: TextScorer | None


class Answers(NamedTuple):
    """One method's answers to the prompts of a split, in the order of the prompts."""

    rows: list[dict[str, Any]]  # prompt, completion, score, kl, length, gold
    divergences: Divergences | None  # None for Best-of-N
    ref_nll: float  # nats per token
    text_nll: float | None

    def judged(self) -> np.ndarray:
        """Scores for comparing answers: from the judge, or from the reward model if no judge gives scores."""
        column = "score" if self.rows[0]["gold"] is None else "gold"
        return np.array([row[column] for row in self.rows])

    def lengths(self) -> np.ndarray:
        """Number of tokens of each answer, including EOS."""
        return np.array([row["length"] for row in self.rows])


def answer(
    policy: Policy, split: Split, key: PRNGKeyArray, sampling: Sampling, *, best_of: int, batch_size: int
) -> Answers:
    """Sample one answer of a policy to each prompt, or the best of several by the reward model, and measure it."""
    rollout = sample_all(
        policy.network, policy.params, split.prompts, key, sampling, samples=best_of, batch_size=batch_size
    )
    scores = split.score(rollout)
    best = np.arange(0, len(scores), best_of) + scores.reshape(-1, best_of).argmax(axis=1)
    rollout, scores = jax.tree.map(lambda leaf: leaf[best], rollout), scores[best]
    divergences = None  # Best-of-N has no tractable density; its KL has a closed-form bound
    if best_of == 1:
        divergences = sequence_divergences(
            policy.network,
            policy.params,
            (split.reference.network, split.reference.params),
            rollout,
            batch_size=batch_size,
            temperature=sampling.temperature,
        )
    kl = [None] * len(scores) if divergences is None else divergences.k1.tolist()
    rows = sample_rows(policy.tokenizer, rollout, scores.tolist(), kl)
    judged = [None] * len(rows)
    if split.judge is not None:
        judged = split.judge(rollout, [row["prompt"] + row["completion"] for row in rows]).tolist()
    return Answers(
        [row | {"gold": gold} for row, gold in zip(rows, judged, strict=True)],
        divergences,
        answers_nll(split.reference, rollout, batch_size),
        texts_nll(policy, split.texts, batch_size) if best_of == 1 else None,
    )


def measures(answers: Answers, best_of: int) -> dict[str, Any]:
    """Compute the metrics of a method that need no other method; None if not measured."""
    judged = answers.judged() if answers.rows[0]["gold"] is not None else None
    texts = [row["prompt"] + row["completion"] for row in answers.rows]
    words = [row["completion"].split() for row in answers.rows]
    k1, k3 = (None, None) if answers.divergences is None else answers.divergences
    return {
        "gold_score": None if judged is None else float(judged.mean()),
        "gold_se": None if judged is None else measured(standard_error(judged)),
        "reward_score": float(np.mean([row["score"] for row in answers.rows])),
        "kl": float(best_of_n_kl(best_of)) if k1 is None else float(np.mean(k1.tolist())),
        "kl_se": 0.0 if k1 is None else measured(standard_error(k1)),
        "length": float(np.mean(answers.lengths())),
        "vader": float(vader(texts).mean()),
        "distinct_2": measured(distinct_n(words, 2)),
        "kl_k3": None if k3 is None else float(np.mean(k3.tolist())),
        "kl_k3_se": None if k3 is None else measured(standard_error(k3)),
        "ref_nll": answers.ref_nll,
        "text_nll": answers.text_nll,
        "distinct_1": measured(distinct_n(words, 1)),
        "distinct_3": measured(distinct_n(words, 3)),
        "repetition_4": measured(repetition(words, 4)),
    }


def win_rate(
    wins: Float[np.ndarray, "N"], own: Answers, other: Answers, *, rounds: int, seed: int
) -> dict[str, float | None]:
    """Compute the win rate, in which ties count half, with 95 % intervals: Wilson, and bootstrap over prompts.

    The result also has the share of ties and the length-controlled win rate.

    Args: rounds and seed are those of the bootstrap; with the same seed, it draws the same prompts for every method.
    """
    low, high = wilson_interval(float(wins.sum()), len(wins), z=Z_95)
    boot_low, boot_high = bootstrap_interval(wins, level=0.95, rounds=rounds, seed=seed)
    controlled = length_controlled_win_rate(wins, own.lengths(), other.lengths())
    return {
        "win_rate": float(wins.sum()) / len(wins),
        "win_low": low,
        "win_high": high,
        "tie_rate": float(np.mean(wins == 0.5)),
        "boot_low": measured(boot_low),
        "boot_high": measured(boot_high),
        "lc_win_rate": controlled.rate,
        "lc_win_se": controlled.se,
    }


def held_out_texts(rows: list[dict[str, Any]], policy: Policy, data: DataConfig) -> Texts | None:
    """Tokenise the completions or plain texts of the rows as SFT would; None if the rows are not demonstrations."""
    if formats.kind_of(rows) in ("prompt", "unpaired", "ranked"):
        return None
    return pipeline.demonstrations(rows, policy.tokenizer, data)


def answers_nll(reference: Policy, rollout: Rollout[np.ndarray], batch_size: int) -> float:
    """Log-perplexity of answers under the reference, nats per token."""
    logprobs = response_logprobs_all(reference.network, reference.params, rollout, batch_size)
    return float(-np.sum(logprobs, dtype=np.float64) / np.sum(rollout.response_mask))


def texts_nll(policy: Policy, texts: Texts | None, batch_size: int) -> float | None:
    """Log-perplexity of held-out texts under a policy, nats per token; None without texts."""
    if texts is None:
        return None
    sums = sequence_sums(policy.network, policy.params, texts, batch_size)
    return float(np.sum(sums.nll, dtype=np.float64) / np.sum(sums.tokens))
