"""Sample responses from a policy, with their scores and their log-ratios to a reference."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd

from rlhf_jax import config as configs
from rlhf_jax.data.pipeline import Content
from rlhf_jax.data.rows import limited
from rlhf_jax.inference.encoding import as_answers, encode_prompts
from rlhf_jax.inference.score import function_scores
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.samples import respond
from rlhf_jax.rewards.scorers import make_scorer
from rlhf_jax.rewards.sources import AnyReward, Reward, as_reward
from rlhf_jax.sampling.batches import sequence_kl
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError

BATCH = 128
"""Responses per decoding or scoring batch."""

MAX_NEW_TOKENS = 128


def sample(
    policy: Policy,
    prompts: Sequence[Content],
    *,
    n: int = 1,
    seed: int = 0,
    reward: AnyReward | None = None,
    reference: Policy | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Sample n responses to each prompt, as `rlhf-jax sample` does.

        sample(policy, ["The film"], n=4, temperature=0.7, max_new_tokens=32, stop=["."])
        sample(policy, [[{"role": "user", "content": "Is it good?"}]], reward=reward_model)

    Args:
        policy: from `load_policy`, or `Run.load_policy`.
        prompts: either texts, which the policy continues, or chats (lists of `role` and `content`), which it answers.
        n: responses per prompt.
        seed: random seed; the same call returns the same responses.
        reward: reward model, or function as for `score`, that scores the responses.
        reference: policy for `kl`, the log-ratio of each response.
        options: fields of `SamplingOptions`: temperature (default 1; 0 is greedy), top_k, top_p, min_p, max_new_tokens
            (default 128) and stop (strings that end a response).

    Returns: `prompt, completion, score, kl`, n rows per prompt. The score is NaN without a reward. `kl` is
    log pi(y|x) - log pi_ref(y|x) in nats, EOS included, both at the sampling temperature (1 if it is 0) without top_k,
    top_p and min_p; NaN without a reference.

    Raises RlhfError if the tokenizer lacks a token for a word, a prompt fills the context, or an option is invalid.
    """
    sampling_options = configs.build(SamplingOptions, options, "sample")
    return draw_responses(policy, prompts, sampling_options, n=n, seed=seed, reward=reward, reference=reference)


def draw_responses(
    policy: Policy,
    prompts: Sequence[Content],
    sampling_options: SamplingOptions,
    *,
    n: int,
    seed: int,
    reward: AnyReward | None = None,
    reference: Policy | None = None,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    first: int = 0,
) -> pd.DataFrame:
    """Sample as `sample` does, with validated options and length limits.

    Args: first is the number of prompts sampled before these, for the random keys; max_new_tokens is the default of the
    option.
    """
    if n < 1:
        raise RlhfError(f"n = {n} must be at least 1")
    if len({isinstance(prompt, list) for prompt in prompts}) > 1:
        raise RlhfError("some prompts are texts and some are chats: sample them in two calls")
    ids = encode_prompts(prompts, policy, max_prompt_tokens)
    if not ids:
        return pd.DataFrame(columns=["prompt", "completion", "score", "kl"])
    batch_size = min(BATCH, len(ids) * n)
    sampling, stops = sampling_options.sampling(policy.tokenizer.stop_ids, max_new_tokens), sampling_options.stop
    responses = respond(
        policy, ids, jax.random.key(seed), sampling, stops, samples=n, batch_size=batch_size, first=first
    )
    rollout, texts = responses.rollout, responses.texts
    scores, kl = np.full((2, len(texts)), np.nan)
    judge = None if reward is None else as_reward(reward)
    if isinstance(judge, Reward):
        groups = [as_answers(prompt, texts[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]
        pairs = zip(prompts, groups, strict=True)
        scores = np.concatenate([function_scores(judge, policy.tokenizer, *pair, {}) for pair in pairs])
    elif judge is not None:
        rows = [{"prompt": prompt} for prompt in prompts]
        lengths = limited(rollout.prompt.shape[1], rollout.response.shape[1])
        scores = make_scorer(judge, policy, rows, lengths, batch_size)(rollout)
    if reference is not None:
        kl = sequence_kl(
            policy.network,
            policy.params,
            (reference.network, reference.params),
            rollout,
            batch_size=batch_size,
            temperature=sampling_options.temperature,
        )
    repeated = [prompt for prompt in prompts for _ in range(n)]
    return pd.DataFrame({"prompt": repeated, "completion": texts, "score": scores, "kl": kl})
