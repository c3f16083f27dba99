"""Judges of pairs: gold judges and reward models, which compare scores, and language models over HTTP."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.data import fetch
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.samples import texts
from rlhf_jax.rewards.gold_judges import has_judge, load_judge
from rlhf_jax.rewards.http_judge import HTTPJudge, HTTPJudgeConfig, Pair
from rlhf_jax.rewards.scorers import HostScorer, make_scorer
from rlhf_jax.rewards.sources import RewardSource, find_reward
from rlhf_jax.rewards.tfidf import TfidfJudge
from rlhf_jax.runtime.two_programs import Scored
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Rollout

TextScorer = Callable[[Rollout[np.ndarray], Sequence[str]], np.ndarray]
"""Scores of responses, float[N], from their tokens or from the texts of prompt and response."""


def make_http_judge(config: HTTPJudgeConfig) -> HTTPJudge:
    """Create an HTTP judge that stores its replies in `fetch.data_dir()`, where all experiments share them."""
    return HTTPJudge(config, fetch.data_dir() / "judge")


def make_judge(source: RewardSource, context: Context) -> Callable[[Policy, Sequence[dict[str, Any]]], TextScorer]:
    """Create a judge from a gold stage or from any reward, such as a larger reward model than the one trained on.

    Returns: a function that takes a policy and the rows of its prompts, and returns a scorer of the policy's answers.
    """
    if isinstance(source, str) and has_judge(context, source):
        judge = load_judge(context, source)
        return lambda policy, rows: lambda rollout, texts: judge.score(texts)
    model, batch_size = find_reward(context, source), context.runtime.inference_batch

    def make(policy: Policy, rows: Sequence[dict[str, Any]]) -> TextScorer:
        scorer = make_scorer(model, policy, rows, context.data, batch_size)
        return lambda rollout, texts: scorer(rollout)

    return make


def preferred_by_score(own: Float[np.ndarray, "N"], other: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Compare scores: 1 where `own` is higher, 0 where `other` is, 1/2 for a tie."""
    return 0.5 * (1 + np.sign(own - other))


def preferred_by_asking(
    judge: HTTPJudge,
    own: Sequence[dict[str, Any]],
    other: Sequence[dict[str, Any]],
    progress: Callable[[int, int], None],
) -> Float[np.ndarray, "N"]:
    """Compare answers with an HTTP judge: 1 where `own` wins, 0 where `other` wins, 1/2 for a tie.

    Args: own and other are rows of samples.jsonl.
    """
    pairs = [Pair(a["prompt"], a["completion"], b["completion"]) for a, b in zip(own, other, strict=True)]
    return judge.prefer(pairs, progress)


def pair_scorer(judge: TfidfJudge | HTTPJudge, tokenizer: Tokenizer) -> HostScorer:
    """Create a scorer for rollouts in which rows 2i and 2i + 1 are two responses to one prompt.

    An HTTP judge scores the preferred response 1 and the other 0, or both 1/2 for a tie.
    """

    def score(rollout: Rollout[np.ndarray]) -> Scored:
        prompts, completions = texts(tokenizer, rollout)
        if isinstance(judge, TfidfJudge):
            joined = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            return Scored(judge.score(joined), {})
        pairs = zip(prompts[::2], completions[::2], completions[1::2], strict=True)
        wins = judge.prefer([Pair(*pair) for pair in pairs])
        return Scored(np.stack([wins, 1 - wins], axis=1).reshape(-1), {})

    return score
