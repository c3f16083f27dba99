"""What a stage trains of a model: all its parameters, or an adapter beside a base that stays as it is."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork

Network = PolicyNetwork | ScalarNetwork


class Start(NamedTuple):
    """A model before the first step: what is trained, and checkpointed, and what is not."""

    trained: PyTree
    base: PyTree  # None where everything is trained


def adapted_network(network: PolicyNetwork, lora: LoraConfig | None) -> PolicyNetwork:
    """A policy's functions, for parameters with an adapter where there is one."""
    return network if lora is None else dataclasses.replace(network, lora=lora)


def adapted_scalar(network: ScalarNetwork, lora: LoraConfig | None) -> ScalarNetwork:
    """A reward model's or a value's functions, for parameters with an adapter where there is one."""
    return network if lora is None else dataclasses.replace(network, lora=lora)


def begin(network: Network, params: PyTree, key: PRNGKeyArray) -> Start:
    """All parameters where the network has no LoraConfig; else a new adapter, with which it starts as it is."""
    if network.lora is None:
        return Start(params, None)
    return Start(network.init_adapter(params, key), params)


def whole(network: Network, trained: PyTree, frozen: PyTree, base: str) -> PyTree:
    """The parameters that a network's functions take, of what is trained and of the base among what is frozen."""
    return trained if network.lora is None else Adapted(frozen[base], trained)


def dropout_keys(
    network: Network, run_key: PRNGKeyArray, step: Array, rows: int, axes: tuple[str, ...]
) -> Key[Array, "B"] | None:
    """A key for each of a device's rows, by its number in the whole batch; None where the adapter has no dropout."""
    if network.lora is None or network.lora.dropout == 0:
        return None
    first = jax.lax.axis_index(axes) * rows if axes else 0
    key = jax.random.fold_in(run_key, step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))
