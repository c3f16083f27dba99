"""Trainable parameters of a stage: all parameters of a model, or an adapter on a frozen base."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from rlhf_jax.config import ModelSource
from rlhf_jax.core.keys import derive
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy, Tuning, refuse_float16
from rlhf_jax.loading.stage_models import save_policy_spec
from rlhf_jax.models.lora import Adapted
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.types import RlhfError

Network = PolicyNetwork | ScalarNetwork
N = TypeVar("N", PolicyNetwork, ScalarNetwork)

DEEP = 8
"""Number of layers from which a loop over them saves much of the compilation."""


class Start(NamedTuple):
    """Initial parameters of a model, split into trained ones, which are checkpointed, and frozen ones."""

    trained: PyTree  # copies, which the first step may donate
    base: PyTree  # None if all parameters are trained


def trainable(network: N, tuning: Tuning | None) -> N:
    """Configure a network for training: with an adapter, or with parameters in the dtype of `tuning` (float32 if None).

    Args: tuning is None for a model trained from scratch, which keeps the dtype of its own config.
    Raises RlhfError for training in float16, and for an adapter of layers in a loop.
    """
    try:
        if tuning is not None and tuning.lora is not None:
            network = dataclasses.replace(network, lora=tuning.lora)
        elif tuning is not None:
            config = dataclasses.replace(network.config, param_dtype=tuning.param_dtype or "float32")
            network = dataclasses.replace(network, config=config)
        refuse_float16(network.config, adapter=network.lora is not None)
    except ValueError as error:
        raise RlhfError(str(error)) from error
    return network


def init_trainable(network: Network, params: PyTree, key: PRNGKeyArray) -> Start:
    """Split parameters into trained and frozen ones, initialising an adapter if the network has a LoraConfig.

    Without an adapter, all parameters are trained, and copied in the training dtype (see `trainable`). The original
    keeps its dtype, for example as the frozen reference; a copy in float32 has the same values.
    """
    if network.lora is None:
        dtypes = jax.eval_shape(network.init, jax.random.key(0))  # training dtypes
        return Start(jax.tree.map(lambda leaf, like: jnp.array(leaf, like.dtype), params, dtypes), None)
    return Start(jax.tree.map(jnp.copy, network.init_adapter(params, key)), params)  # it shares a reward model's head


def full_params(network: Network, trained: PyTree, frozen: PyTree, base: str) -> PyTree:
    """Combine trained parameters with a frozen base into the parameters that a network's functions take."""
    return trained if network.lora is None else Adapted(frozen[base], trained)


def dropout_keys(
    network: Network, run_key: PRNGKeyArray, step: Array, rows: int, axes: tuple[str, ...]
) -> Key[Array, "B"] | None:
    """Make a dropout key for each row of a device from its index in the global batch; None without dropout."""
    if network.lora is None or network.lora.dropout == 0:
        return None
    first = jax.lax.axis_index(axes) * rows if axes else 0
    key = jax.random.fold_in(derive(run_key, "dropout"), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))


def load_initial_policy(source: ModelSource, tuning: Tuning, context: Context) -> Policy:
    """Load a stage's initial policy (also its reference), configure it for training, and save its spec."""
    if tuning.attention == "cudnn" and len(context.runs) > 1:
        raise RlhfError(
            f"config.{context.name}: attention = 'cudnn' does not support several seeds at once: set config.seeds to "
            "1, or attention to 'xla'"
        )
    policy = context.policy(source, tuning)
    policy = policy._replace(network=trainable(policy.network, tuning))
    seeds = range(context.seed, context.seed + context.seeds)
    save_policy_spec(context.directory, policy, seeds, base=context.base(source, tuning))
    return policy


def depth_advice(network: Network) -> str | None:
    """Advise to compile one layer instead of many; None for a network with few layers, and if it is not possible."""
    layers = network.config.n_layers
    if layers < DEEP or network.config.scan_layers or network.lora is not None:
        return None
    return (
        f"the first call takes more than a minute, as it compiles {layers} layers one by one. With scan_layers = True "
        "in the stage's section model or tuning, it compiles one (results differ by rounding)"
    )


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stack the trees of several seeds along a leading axis; a single tree is returned unchanged."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
