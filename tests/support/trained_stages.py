"""Policies, reward models and adapters as a stage leaves them on disk."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.loading import stage_models
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.stage_models import Base
from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.runtime.checkpoints import Checkpoints, TrainState


def assert_same_model(one, other) -> None:
    assert one.network == other.network
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert one.tokenizer.backend.to_str() == other.tokenizer.backend.to_str()
    assert one.tokenizer.chat_template == other.tokenizer.chat_template
    assert one.tokenizer.stop_ids == other.tokenizer.stop_ids


def write_stage(directory, model: Policy | RewardModel, base: Base | None = None, seeds: range = range(1)) -> None:
    """Parameters that a stage saves for each seed: the whole model's, or those of an adapter on `base`."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"section": {"kind": "x"}, "common": {}, "inputs": {}}))
    kind = "policy" if isinstance(model, Policy) else "reward"
    if isinstance(model, Policy):
        stage_models.save_policy_spec(directory, model, seeds, base=base)
    else:
        stage_models.save_reward_spec(directory, model, base=base)
    params = model.params.adapter if isinstance(model.params, Adapted) else model.params
    if len(seeds) > 1:
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(seeds)), params)
    with contextlib.closing(Checkpoints(directory / "checkpoints", keep=1)) as kept:
        kept.save(TrainState(jnp.int32(0), {kind: params}, ()))


LORA = LoraConfig(rank=2, alpha=4.0, targets=("attention/[qv]", "up"))


def adapted(model, lora: LoraConfig = LORA):
    """A model with an adapter that does something."""
    network = dataclasses.replace(model.network, lora=lora)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32),
        network.init_adapter(model.params, jax.random.key(0)),
    )
    return model._replace(network=network, params=Adapted(model.params, adapter))
