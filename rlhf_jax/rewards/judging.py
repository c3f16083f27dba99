"""Who prefers which of two answers: a gold judge or a reward model, by their scores, or a language model over HTTP."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.data import fetch
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.samples import texts
from rlhf_jax.rewards import tfidf
from rlhf_jax.rewards.http_judge import HTTPJudge, HTTPJudgeConfig, Pair
from rlhf_jax.rewards.scorers import HostScorer, make_scorer
from rlhf_jax.rewards.sources import RewardSource, find_reward
from rlhf_jax.rewards.tfidf import TfidfJudge
from rlhf_jax.runtime.programs import Scored
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Rollout

JUDGE_FILE = "judge.joblib"
"""A gold stage's judge, in the stage's directory."""

TextScorer = Callable[[Rollout, Sequence[str]], np.ndarray]
"""A judge's score of every response, float[N], by its tokens or by its text, the prompt's included."""


def make_http_judge(config: HTTPJudgeConfig) -> HTTPJudge:
    """A judge whose replies are kept with all that is fetched, so that no experiment pays for them twice."""
    return HTTPJudge(config, fetch.data_dir() / "judge")


def has_judge(context: Context, stage: str) -> bool:
    """Whether an earlier stage is a gold stage, and not, say, a reward model."""
    return (context.workdir.find(stage) / JUDGE_FILE).exists()


def load_judge(context: Context, stage: str) -> TfidfJudge:
    """The judge that an earlier gold stage fitted."""
    return tfidf.load(context.workdir.find(stage) / JUDGE_FILE)


def make_judge(source: RewardSource, context: Context) -> Callable[[Policy, Sequence[dict[str, Any]]], TextScorer]:
    """The judge that a gold stage fitted, or any reward, such as a larger model than what is trained on.

    Returns: what gives the judge of a policy's answers to the prompts that were made from rows.
    """
    if isinstance(source, str) and source in context.stages and has_judge(context, source):
        judge = load_judge(context, source)
        return lambda policy, rows: lambda rollout, texts: judge.score(texts)
    model, batch_size = find_reward(context, source), context.runtime.inference_batch

    def of_rows(policy: Policy, rows: Sequence[dict[str, Any]]) -> TextScorer:
        scorer = make_scorer(model, policy, rows, context.data, batch_size)
        return lambda rollout, texts: scorer(rollout)

    return of_rows


def preferred_by_score(own: Float[np.ndarray, "N"], other: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """1 where the own score is higher, 0 where the other is, 1/2 where they are equal."""
    return 0.5 * (1 + np.sign(own - other))


def preferred_by_asking(
    judge: HTTPJudge,
    own: Sequence[dict[str, Any]],
    other: Sequence[dict[str, Any]],
    progress: Callable[[int, int], None],
) -> Float[np.ndarray, "N"]:
    """1 where the own answer is preferred, 0 where the other is, 1/2 for a tie. Args: rows of samples, as written."""
    pairs = [Pair(a["prompt"], a["completion"], b["completion"]) for a, b in zip(own, other, strict=True)]
    return judge.prefer(pairs, progress)


def pair_scorer(judge: TfidfJudge | HTTPJudge, tokenizer: Tokenizer) -> HostScorer:
    """A judge's scores of responses that stand two by two, both to one prompt.

    Of a judge over HTTP they are 1 for the preferred one of two and 0 for the other, and 1/2 each for a tie.
    """

    def score(rollout: Rollout) -> Scored:
        prompts, completions = texts(tokenizer, rollout)
        if isinstance(judge, TfidfJudge):
            read = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            return Scored(judge.score(read), {})
        wins = judge.prefer([Pair(*two) for two in zip(prompts[::2], completions[::2], completions[1::2], strict=True)])
        return Scored(np.stack([wins, 1 - wins], axis=1).reshape(-1), {})

    return score
