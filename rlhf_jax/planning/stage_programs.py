"""Table of the kinds of stages whose programs can be planned."""

from collections.abc import Callable
from typing import Any

from rlhf_jax.planning import offline_programs, online_programs
from rlhf_jax.planning.stage_outlines import RunOutline, StageOutline
from rlhf_jax.stages.best_of_n import BestOfNConfig
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.stages.evaluate import EvaluateConfig
from rlhf_jax.stages.group_rl import GroupRLConfig
from rlhf_jax.stages.kto import KTOConfig
from rlhf_jax.stages.online_dpo import OnlineDPOConfig
from rlhf_jax.stages.pool import PoolConfig
from rlhf_jax.stages.ppo import PPOConfig
from rlhf_jax.stages.preferences import PreferencesConfig
from rlhf_jax.stages.rejection_sampling import RejectionSamplingConfig
from rlhf_jax.stages.reward_model import RewardModelConfig
from rlhf_jax.stages.sft import SFTConfig

OUTLINES: dict[type, Callable[[RunOutline, str, Any], StageOutline]] = {
    SFTConfig: offline_programs.sft_outline,
    RewardModelConfig: offline_programs.reward_model_outline,
    DPOConfig: offline_programs.dpo_outline,
    KTOConfig: offline_programs.kto_outline,
    PPOConfig: online_programs.policy_gradient_outline,
    GroupRLConfig: online_programs.policy_gradient_outline,
    OnlineDPOConfig: online_programs.online_dpo_outline,
    PreferencesConfig: online_programs.sampling_outline,
    BestOfNConfig: online_programs.sampling_outline,
    RejectionSamplingConfig: online_programs.sampling_outline,
    PoolConfig: online_programs.sampling_outline,
    EvaluateConfig: online_programs.sampling_outline,
}


def outline(run: RunOutline, name: str) -> StageOutline | None:
    """Outline of a stage; None for a kind without programs that take long, and for a user's own."""
    config = run.stages[name]
    make = OUTLINES.get(type(config))
    return None if make is None else make(run, name, config)
