"""Sizes of stages' models and batches, from their configs, without loading or training anything."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from rlhf_jax.core.slices import slice_count
from rlhf_jax.loading.models import Pretrained
from rlhf_jax.methods.offline import OfflineConfig
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.optimizers import micro_batches
from rlhf_jax.runtime.programs import check_divides
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.stages.group_rl import GroupRLConfig
from rlhf_jax.stages.kinds import StageConfig
from rlhf_jax.stages.kto import KTOConfig
from rlhf_jax.stages.online_dpo import OnlineDPOConfig
from rlhf_jax.stages.reward_model import RewardModelConfig
from rlhf_jax.stages.sft import SFTConfig
from rlhf_jax.types import RlhfError


def parameters(stages: Mapping[str, StageConfig], name: str) -> int | None:
    """Count the parameters of the policy or reward model that a stage trains.

    The count of a model trained from scratch is for the largest vocabulary that its tokenizer may have. None for a
    stage that trains nothing, and for one that starts from a checkpoint.

    Args: stages are the configs of all stages, by name.
    """
    network = _network(stages, name)
    if network is None:
        return None
    key = jax.eval_shape(lambda: jax.random.key(0))  # only its shape, to avoid compiling a program
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(network.init, key)))


def _network(stages: Mapping[str, StageConfig], name: str) -> PolicyNetwork | ScalarNetwork | None:
    stage = stages.get(name)
    if isinstance(stage, DPOConfig | KTOConfig | OnlineConfig):
        return _network(stages, stage.policy)
    if not isinstance(stage, SFTConfig | RewardModelConfig):
        return None
    if isinstance(stage.model, Pretrained):
        start = _network(stages, stage.model.init)
        from_policy = isinstance(stage, RewardModelConfig) and isinstance(start, PolicyNetwork)
        return ScalarNetwork(start.config, start.vocab_size, stage.pooling) if from_policy else start
    if isinstance(stage, SFTConfig):
        assert stage.tokenizer is not None
        return PolicyNetwork(stage.model, stage.tokenizer.vocab_size, ())
    assert stage.policy is not None
    policy = _network(stages, stage.policy)
    return None if policy is None else ScalarNetwork(stage.model, policy.vocab_size, stage.pooling)


def update_rows(stage: Any) -> int:
    """Rows of one update of a stage that trains."""
    return stage.batch_size // stage.minibatches if isinstance(stage, OnlineConfig) else stage.batch_size


def check_batches(stage: StageConfig, *, devices: int, seeds: int) -> None:
    """Raise RlhfError unless a stage's batches divide over the devices and into slices, and its slots can sample.

    Args: devices is the number of devices that rows are split over.
    """
    if isinstance(stage, OnlineConfig):
        _check_iteration(stage, devices, seeds)
    if isinstance(stage, OfflineConfig | OnlineConfig):
        check_divides(update_rows(stage), devices)
        micro_batches(update_rows(stage), stage.optimizer.micro_batch, devices)


def _check_iteration(stage: OnlineConfig, devices: int, seeds: int) -> None:
    each = 2 if isinstance(stage, OnlineDPOConfig) else 1  # responses per row
    group = stage.num_generations if isinstance(stage, GroupRLConfig) else each  # responses per prompt
    responses = stage.batch_size * each
    check_divides(responses // group, devices)
    slice_count(responses, stage.forward_batch, devices, field="forward_batch")
    if stage.slots is not None and stage.slots < group:
        raise RlhfError(f"slots = {stage.slots} must be at least {group}, the responses to a prompt: raise it")
    if stage.slots is not None and seeds > 1:
        raise RlhfError(
            f"slots = {stage.slots} cannot sample for seeds = {seeds} at once: set slots to None, or seeds to 1"
        )
