"""Split of weights by patterns on their paths, in real trees of parameters and optimiser states."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.core.row_sharding import ROWS
from rlhf_jax.models.lora import LoraConfig, init_adapter
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.models.sharding import PARTITIONS, shardings
from tests.support.networks import config

SHAPE = config(d_model=32, n_heads=4, d_ff=64)
TREES = {
    "policy": jax.eval_shape(PolicyNetwork(SHAPE, 64, (0,)).init, jax.random.key(0)),
    "gated, untied, grouped heads": jax.eval_shape(
        PolicyNetwork(dataclasses.replace(SHAPE, gated=True, tied=False, n_kv_heads=2, qkv_bias=True), 64, ()).init,
        jax.random.key(0),
    ),
    "scalar": jax.eval_shape(ScalarNetwork(SHAPE, 64, "mean").init, jax.random.key(0)),
}
SPLIT = {  # what each weight [rows, columns, ...] should be, by its last names
    "embedding": P("tensor", "fsdp"),
    "head": P("tensor", "fsdp"),
    "gate/kernel": P("fsdp", "tensor"),
    "q/kernel": P("fsdp", "tensor", None),
    "k/kernel": P("fsdp", "tensor", None),
    "v/kernel": P("fsdp", "tensor", None),
    "o/kernel": P("tensor", None, "fsdp"),
    "up/kernel": P("fsdp", "tensor"),
    "down/kernel": P("tensor", "fsdp"),
}


def mesh(data=1, fsdp=2, tensor=2):
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def stripped(spec):
    """A spec without the None at its end, which say nothing."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return axes


def adapter_of(tree, targets):
    return jax.eval_shape(lambda key: init_adapter(LoraConfig(2, 1.0, (targets,)), tree, key), jax.random.key(0))


def expected(path):
    name = next((name for name in SPLIT if re.search(rf"(^|/){name}$", path)), None)
    return SPLIT[name] if name else P()


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_every_big_weight_is_split_over_both_axes_and_nothing_else_is(tree):
    specs = by_path(shardings(tree, mesh(), leading_axes=0))
    for path, leaf in by_path(tree).items():
        assert stripped(specs[path].spec) == stripped(expected(path)), path
        if leaf.size >= SHAPE.d_model**2 / 2:
            assert {"fsdp", "tensor"} <= set(specs[path].spec), path
            assert specs[path].shard_shape(leaf.shape) != leaf.shape
        else:
            assert specs[path].is_fully_replicated


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_every_pattern_matches_and_none_takes_from_another(tree):
    each, shared = (adapter_of(tree, targets) for targets in (r"attention/\w|up|gate|down", "attention/qkv"))
    paths = by_path({"params": tree, "adapter": each, "shared": shared})
    for pattern, spec in PARTITIONS:
        matched = [path for path in paths if re.search(pattern, path)]
        assert matched, pattern
        assert all(len(spec) == paths[path].ndim for path in matched), pattern
    for path in paths:
        assert sum(bool(re.search(pattern, path)) for pattern, _ in PARTITIONS) <= 1, path


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_optimiser_states_follow_their_parameters(tree):
    schedule = optax.linear_schedule(1e-3, 0, 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    state = {"params": tree, "opt_state": jax.eval_shape(optimizer.init, tree)}
    found = by_path(shardings(state, mesh(), leading_axes=0))
    followers = {path: 0 for path in by_path(tree)}
    for path, sharding in found.items():
        parameter = next((name for name in followers if path.endswith("/" + name)), None)
        if parameter:
            followers[parameter] += 1
            assert stripped(sharding.spec) == stripped(expected(parameter)), path
        else:
            assert sharding.is_fully_replicated, path
    assert set(followers.values()) == {3}  # itself, and Adam's two moments


@pytest.mark.parametrize("targets", [r"attention/\w|up|gate|down", "attention/qkv|attention/o|gate_up|down"])
def test_adapters_are_split_as_the_kernels_and_their_rank_is_not(targets):
    tree = TREES["gated, untied, grouped heads"]
    specs = by_path(shardings(adapter_of(tree, targets), mesh(), leading_axes=0))
    for path, leaf in by_path(adapter_of(tree, targets)).items():
        layer, which, part = re.split(r"/([AB])/?", path)
        part = part or {"qkv": "q", "gate_up": "up"}.get(layer.rpartition("/")[2])
        kernel = f"{layer.rpartition('/')[0]}/{part}" if part else layer
        whole = list(expected(f"{kernel}/kernel"))
        whole += [None] * (by_path(tree)[f"{kernel}/kernel"].ndim - len(whole))
        inputs = 2 if kernel.endswith("/o") else 1
        assert leaf.shape[-1 if which == "A" else 0] == 2
        split = [*whole[:inputs], None] if which == "A" else [None, *whole[inputs:]]
        assert stripped(specs[path].spec) == stripped(P(*split)), path


def test_what_does_not_divide_stays_whole_along_that_axis_alone():
    tree = {"embedding": jnp.zeros((50, 16)), "block_0": {"up": {"kernel": jnp.zeros((16, 15))}}}
    specs = by_path(shardings(tree, mesh(fsdp=2, tensor=4), leading_axes=0))
    assert stripped(specs["embedding"].spec) == [None, "fsdp"]
    assert stripped(specs["block_0/up/kernel"].spec) == ["fsdp"]
    placed = jax.device_put(tree, shardings(tree, mesh(fsdp=2, tensor=4), leading_axes=0))
    assert placed["embedding"].addressable_shards[0].data.shape == (50, 8)


@pytest.mark.parametrize("leading_axes", [1, 2])
def test_leading_axes_are_never_split(leading_axes):
    def stacked(leaf):
        return jax.ShapeDtypeStruct((3,) * leading_axes + leaf.shape, leaf.dtype)

    tree = {"params": TREES["policy"], "step": jax.ShapeDtypeStruct((), jnp.int32)}
    single = by_path(shardings(tree, mesh(), leading_axes=0))
    several = by_path(shardings(jax.tree.map(stacked, tree), mesh(), leading_axes=leading_axes))
    for path, sharding in several.items():
        assert list(sharding.spec)[:leading_axes] == [None] * leading_axes
        assert stripped(list(sharding.spec)[leading_axes:]) == stripped(single[path].spec), path


def test_rows_are_split_over_data_and_fsdp():
    sharding = NamedSharding(mesh(data=2), ROWS)
    assert sharding.shard_shape((8, 5)) == (2, 5)
