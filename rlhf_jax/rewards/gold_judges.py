"""Judges that gold stages fitted, and the rewards that they give."""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.loading.context import Context
from rlhf_jax.rewards import tfidf
from rlhf_jax.rewards.functions import RewardFunction
from rlhf_jax.rewards.tfidf import TfidfJudge
from rlhf_jax.types import RlhfError

JUDGE_FILE = "judge.joblib"
"""File with a gold stage's judge, in the stage's directory."""


def has_judge(context: Context, stage: str) -> bool:
    """Return whether an earlier stage is a gold stage."""
    return stage in context.stages and (context.workdir.find(stage) / JUDGE_FILE).exists()


def load_judge(context: Context, stage: str) -> TfidfJudge:
    """Load the judge that an earlier gold stage fitted."""
    return tfidf.load(context.workdir.find(stage) / JUDGE_FILE)


def judge_reward(context: Context, stage: str) -> RewardFunction:
    """Make a reward of the judge's scores of prompt and completion: the true reward, where the judge labels the pairs.

    The function raises RlhfError for chats, of which judges know nothing.
    """
    judge = load_judge(context, stage)

    def score(prompts: Sequence[object], completions: Sequence[object]) -> np.ndarray:
        if not all(isinstance(text, str) for text in (*prompts, *completions)):
            raise RlhfError(
                f"config.{context.name}: the judge of stage {stage} scores texts, but the prompts are chats: use a "
                "reward model or a function"
            )
        return judge.score([f"{prompt}{completion}" for prompt, completion in zip(prompts, completions, strict=True)])

    return RewardFunction(stage, score)
