"""Outlines of models: networks, and the shapes of their parameters, from configs alone. No weights are read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from rlhf_jax.interop import hf, peft
from rlhf_jax.interop.hub import MODELS, checkpoint_directory
from rlhf_jax.loading.models import NO_CHANGES, Policy, Pretrained, RewardModel, Tuning, as_reward_model, tuned
from rlhf_jax.loading.trainable import trainable
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.quantised import dequantised, quantised
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.stages.kinds import StageConfig
from rlhf_jax.stages.kto import KTOConfig
from rlhf_jax.stages.reward_model import RewardModelConfig
from rlhf_jax.stages.sft import SFTConfig
from rlhf_jax.types import RlhfError

M = TypeVar("M", Policy, RewardModel)


def shapes_of(network: PolicyNetwork | ScalarNetwork) -> PyTree:
    """Shapes of a network's parameters."""
    return jax.eval_shape(lambda: network.init(jax.random.key(0)))


def _policy(network: PolicyNetwork, params: PyTree, tokenizer: Any) -> Policy:
    """Outline of a policy. Its tokenizer is a name: models with the same one read each other's tokens."""
    return Policy(network, params, tokenizer)


def _reward_model(network: ScalarNetwork, params: PyTree, tokenizer: Any) -> RewardModel:
    return RewardModel(network, params, tokenizer)


class Outlines:
    """Outlines of the models that an experiment's stages train, and of checkpoints."""

    def __init__(self, stages: Mapping[str, StageConfig]) -> None:
        """Take the configs of all stages, by name."""
        self._stages = stages

    def policy(self, source: str, tuning: Tuning = NO_CHANGES) -> Policy:
        """Outline of a policy, as `Context.policy` loads it."""
        found = self.model(source, tuning)
        if not isinstance(found, Policy):
            raise RlhfError(f"{source} is a reward model where a language model is needed")
        return found

    def reward_model(self, source: str) -> RewardModel:
        """Outline of a reward model, as `Context.reward_model` loads it."""
        found = self.model(source)
        if not isinstance(found, RewardModel):
            raise RlhfError(f"{source} is a language model where a reward model is needed")
        return found

    def model(self, source: str, tuning: Tuning = NO_CHANGES) -> Policy | RewardModel:
        """Outline of the model of a stage or a checkpoint, with the dtypes and options of `tuning`."""
        if source in self._stages:
            found = self._trained(source)
            params = jax.eval_shape(lambda params: tuned(found._replace(params=params), tuning).params, found.params)
            found = tuned(found._replace(params={}), tuning)._replace(params=params)
        else:
            found = _of_checkpoint(source, tuning)
        return found._replace(params=jax.eval_shape(lambda params: quantised(params, tuning.base_dtype), found.params))

    def initial(self, source: str, tuning: Tuning) -> Policy:
        """Outline of a stage's initial policy, configured for training, with the parameters of its source."""
        found = self.policy(source, tuning)
        return found._replace(network=trainable(found.network, tuning))

    def start_policy(self, name: str, stage: SFTConfig) -> Policy:
        """Outline of the policy that an `sft` stage starts from, before it is made trainable."""
        if isinstance(stage.model, Pretrained):
            return self.policy(stage.model.init, stage.model)
        vocab_size = stage.tokenizer.vocab_size if stage.tokenizer else 0  # the config requires one
        network = PolicyNetwork(stage.model, vocab_size, ())
        return _policy(network, shapes_of(network), name)

    def start_reward_model(self, stage: RewardModelConfig) -> RewardModel:
        """Outline of the model that a `reward_model` stage starts from, before it is made trainable."""
        if not isinstance(stage.model, Pretrained):
            policy = self.policy(str(stage.policy))
            network = ScalarNetwork(stage.model, policy.network.vocab_size, stage.pooling)
            return _reward_model(network, shapes_of(network), policy.tokenizer)
        found = self.model(stage.model.init, stage.model)
        start = found if isinstance(found, RewardModel) else outline_of_reward_model(found)
        return start._replace(network=dataclasses.replace(start.network, pooling=stage.pooling))

    def _trained(self, name: str) -> Policy | RewardModel:
        """Outline of a trained model, as later stages load it: adapters are merged."""
        stage = self._stages[name]
        if isinstance(stage, DPOConfig | KTOConfig | OnlineConfig):
            return _after_training(self.policy(stage.policy, stage.tuning), stage.tuning)
        if isinstance(stage, SFTConfig):
            tuning = stage.model if isinstance(stage.model, Pretrained) else None
            return _after_training(self.start_policy(name, stage), tuning)
        if not isinstance(stage, RewardModelConfig):
            raise RlhfError(f"config.{name} trains no model, but another stage starts from it")
        tuning = stage.model if isinstance(stage.model, Pretrained) else None
        found = _after_training(self.start_reward_model(stage), tuning)
        if stage.normalise is not None:
            network = dataclasses.replace(found.network, bias=True)
            found = found._replace(network=network, params=shapes_of(network))
        if stage.ensemble is None:
            return found
        members = stage.ensemble.members
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype), found.params)
        return found._replace(network=dataclasses.replace(found.network, ensemble=stage.ensemble), params=params)


def _after_training(start: M, tuning: Tuning | None) -> M:
    if tuning is not None and tuning.lora is not None:
        dtype = start.network.config.param_dtype
        return start._replace(params=jax.eval_shape(lambda params: dequantised(params, dtype), start.params))  # merged
    if isinstance(start, Policy):
        policy = trainable(start.network, tuning)
        return start._replace(network=policy, params=shapes_of(policy))
    reward = trainable(start.network, tuning)
    return start._replace(network=reward, params=shapes_of(reward))


def outline_of_reward_model(policy: Policy) -> RewardModel:
    """Outline of a reward model made from a policy's body and a new head."""
    outline = policy._replace(hf_config=None)
    params = jax.eval_shape(
        lambda params: as_reward_model(outline._replace(params=params), jax.random.key(0)).params, policy.params
    )
    network = ScalarNetwork(policy.network.config, policy.network.vocab_size, "last", bias=False)
    return _reward_model(network, params, policy.tokenizer)


def _of_checkpoint(source: str, tuning: Tuning) -> Policy | RewardModel:
    directory = _directory(source)
    base = peft.base_of(directory)
    if base is not None:
        directory = _directory(base)
    found = hf.read_outline(
        directory,
        param_dtype=tuning.param_dtype,
        compute_dtype=tuning.compute_dtype or "float32",
        remat=tuning.remat or False,
        scan_layers=bool(tuning.scan_layers),
        attention=tuning.attention,
        family=tuning.family,
    )
    tokenizer, network = _tokenizer(directory), hf.network_of(found)
    if isinstance(network, PolicyNetwork):
        return _policy(network, found.params, tokenizer)
    return _reward_model(network, found.params, tokenizer)


def _directory(source: str) -> Path:
    if source in MODELS or source.endswith(".gguf"):
        return checkpoint_directory(source)
    return hf.find_checkpoint(source, files=hf.OUTLINE)


def _tokenizer(directory: Path) -> str:
    """Name of a checkpoint's tokenizer: its file, or the directory where there is none."""
    file = directory / "tokenizer.json"
    return file.read_text(encoding="utf-8") if file.exists() else str(directory)
