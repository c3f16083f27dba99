"""Optimisers: which parameters are decayed, the rate's floor, the fields that each one reads, and their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import value_head
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.optimizers import OptimizerConfig, make_optimizer, update
from tests import tiny

ALL_BIASES = dataclasses.replace(
    tiny.MODEL,
    norm="layer",
    qk_norm="all",
    norm_placement="around",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=True,
    positions="learned",
    context=8,
    tied=False,
)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("attention/qkv", "attention/o", "up|gate|down"))
SECTION = {name: value for name, value in dataclasses.asdict(tiny.OPTIMIZER).items() if name != "name"}


def paths_of(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def one_update(config: OptimizerConfig, params, grads, updates: int = 4):
    optimizer = make_optimizer(config, updates)
    return update(optimizer, grads, params, optimizer.init(params), (), key=jax.random.key(0))[0]


def params_of(model: ModelConfig) -> dict:
    policy, reward = PolicyNetwork(model, 11, (), LORA), ScalarNetwork(model, 11, "last")
    start = policy.init(jax.random.key(0))
    return {
        "policy": start,
        "reward": reward.init(jax.random.key(1)),
        "adapter": policy.init_adapter(start, jax.random.key(2)),
        "value": value_head.init_normal(model.d_model, jax.random.key(3)),
    }


@pytest.mark.parametrize("model", [tiny.MODEL, ALL_BIASES], ids=["rms", "every bias and norm"])
def test_weight_decay_leaves_out_norms_and_biases_alone(model):
    """Without a gradient only decay moves a weight; all start at 1, so that none is 0."""
    params = jax.tree.map(jnp.ones_like, params_of(model))
    config = dataclasses.replace(tiny.OPTIMIZER, weight_decay=0.5, learning_rate=0.1)
    after = paths_of(one_update(config, params, jax.tree.map(jnp.zeros_like, params)))
    kept = {path for path, leaf in after.items() if np.all(leaf == 1)}
    assert kept == {path for path in after if path.split("/")[-1] in ("scale", "bias")}
    decayed = {path.split("/")[-1] for path in after} - {"scale", "bias"}
    assert {"embedding", "kernel", "A"} <= decayed and (model is tiny.MODEL or {"positions", "head"} <= decayed)
    for path in set(after) - kept:
        np.testing.assert_allclose(after[path], 1 - 0.1 * 0.5, rtol=1e-6, err_msg=path)


def test_what_is_not_decayed_is_a_field():
    params = jax.tree.map(jnp.ones_like, params_of(tiny.MODEL))
    for no_decay, kept in (((), ()), (("embedding$", "adapter/"), ("embedding", "adapter"))):
        config = dataclasses.replace(tiny.OPTIMIZER, weight_decay=0.5, no_decay=no_decay)
        after = paths_of(one_update(config, params, jax.tree.map(jnp.zeros_like, params)))
        still = {path for path, leaf in after.items() if np.all(leaf == 1)}
        assert still == {path for path in after if any(name in path for name in kept)}
    with pytest.raises(ValueError, match="no_decay: '\\(' is no regular expression"):
        dataclasses.replace(tiny.OPTIMIZER, no_decay=("(",))
