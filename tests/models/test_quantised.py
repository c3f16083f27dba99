"""A frozen base in 8 or 4 bits: its weights, what networks compute with it, its gradient and its layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.quantised import dequantise, is_quantised, quantised
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.models.sharding import shardings
from rlhf_jax.runtime.programs import make_mesh
from rlhf_jax.types import TokenBatch
from tests.support.networks import SUPPRESSED, VOCAB, config, random_params

DTYPES = ("int8", "int4", "nf4")
LORA = LoraConfig(rank=3, alpha=5.0, targets=("attention/[qv]", "up", "down"))
SHAPE = config(n_kv_heads=1, gated=True, qkv_bias=True, mlp_bias=True)
POLICY = PolicyNetwork(SHAPE, VOCAB, SUPPRESSED, LORA)
QUANTILES = [
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]
"""NF4, from appendix E of the paper."""


def by_path(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def by_hand(weights: np.ndarray, dtype: str) -> np.ndarray:
    """Quantised and dequantised weights [inputs, outputs], in blocks of 64 inputs, or of all where they are fewer."""
    blocks = weights.reshape(-1, min(64, len(weights)), weights.shape[1])
    most = np.abs(blocks).max(axis=1, keepdims=True)
    if dtype == "nf4":
        levels = np.array(QUANTILES, np.float32)
        found = levels[np.abs(levels - (blocks / most)[..., None]).argmin(axis=-1)] * most
    else:
        largest = {"int8": 127, "int4": 7}[dtype]
        scale = most / (largest + 0.5)
        found = np.clip(np.round(blocks / scale), -largest - 1, largest) * scale
    return found.reshape(weights.shape)


def layer(name: str, weights: np.ndarray, shape: tuple[int, ...]) -> dict:
    *names, last = f"block_0/{name}/kernel".split("/")
    tree: dict = {last: jnp.asarray(weights.reshape(shape))}
    for part in reversed(names):
        tree = {part: tree}
    return tree


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, shape", [("up", (128, 6)), ("down", (40, 6)), ("attention/q", (128, 3, 2))])
def test_weights_are_those_computed_by_hand(dtype, name, shape):
    weights = np.random.default_rng(0).normal(size=(shape[0], 6)).astype(np.float32)
    weights[:, 0] *= 100  # an output's scale is its own
    (kernel,) = jax.tree.leaves(quantised(layer(name, weights, shape), dtype), is_leaf=is_quantised)
    found = np.asarray(dequantise(kernel)).reshape(weights.shape)
    blocks = np.abs(weights.reshape(-1, min(64, len(weights)), 6)).max(axis=1).repeat(min(64, len(weights)), axis=0)
    below = np.abs(weights) < blocks  # a block's largest weight is as far from both numbers beside it
    np.testing.assert_allclose(found[below], by_hand(weights, dtype)[below], rtol=1e-5)
    bound = {"int8": 1 / 255, "int4": 1 / 15, "nf4": 0.1520}[dtype]  # half a step; half of NF4's widest gap
    assert np.all(np.abs(found - weights) <= (bound + 1e-6) * blocks)
    assert np.abs(found - weights).max() > 0.5 * bound * blocks.min()


def test_blocks_of_the_attentions_output_are_within_a_head():
    weights = np.random.default_rng(0).normal(size=(2, 64, 5)).astype(np.float32)
    weights[0] *= 100
    (kernel,) = jax.tree.leaves(quantised(layer("attention/o", weights, weights.shape), "int8"), is_leaf=is_quantised)
    found = np.asarray(dequantise(kernel))
    for head in range(2):
        below = np.abs(weights[head]) < np.abs(weights[head]).max(axis=0)
        np.testing.assert_allclose(found[head][below], by_hand(weights[head], "int8")[below], rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_blocks_alone_are_quantised_and_a_second_time_changes_nothing(dtype):
    network = ScalarNetwork(SHAPE, VOCAB, "last", lora=LORA)
    params = random_params(network)
    found = by_path(
        jax.tree.map(lambda leaf: None if is_quantised(leaf) else leaf, quantised(params, dtype), is_leaf=is_quantised)
    )
    kept, all_of = set(found), by_path(params)
    layers = ("attention/q", "attention/k", "attention/v", "attention/o", "up", "gate", "down")
    assert set(all_of) - kept == {f"body/block_{i}/{name}/kernel" for i in range(SHAPE.n_layers) for name in layers}
    assert all(found[path] is all_of[path] for path in kept)
    once = quantised(params, dtype)
    assert all(a is b for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(quantised(once, dtype)), strict=True))


TOKENS, ALL = jnp.asarray(np.arange(4, 16).reshape(2, 6) % 9 + 2), jnp.ones((2, 6), bool)
BATCH = TokenBatch(TOKENS, ALL, ALL)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(network, adapter, base):
    def loss(adapter):
        return jnp.sum(network.sequence_stats(Adapted(base, adapter), BATCH).logprobs)

    return jax.value_and_grad(loss)(adapter)


@functools.cache
def adapted() -> Adapted:
    base = random_params(POLICY)
    adapter = POLICY.init_adapter(base, jax.random.key(1))
    rng = np.random.default_rng(2)
    return Adapted(base, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), adapter))


def dequantised_base(params, dtype):
    return jax.tree.map(
        lambda x: dequantise(x) if is_quantised(x) else x, quantised(params, dtype), is_leaf=is_quantised
    )


@pytest.mark.nightly_rest
@pytest.mark.parametrize("dtype, remat", [("int8", False), ("int4", "dots"), ("nf4", True)])
def test_a_quantised_base_computes_what_its_dequantised_weights_compute(dtype, remat):
    """The loss, the gradient of every matrix of the adapter, and the sampled distribution."""
    base, adapter = adapted()
    small, plain = quantised(base, dtype), dequantised_base(base, dtype)
    network = dataclasses.replace(POLICY, config=dataclasses.replace(SHAPE, remat=remat))
    found, expected = value_and_gradient(network, adapter, small), value_and_gradient(POLICY, adapter, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[1])) > 0
    start = jax.jit(lambda params: network.start(params, BATCH.tokens, BATCH.loss_mask, 8)[0])
    logits = [np.delete(start(Adapted(params, adapter)), SUPPRESSED, axis=1) for params in (small, plain)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_dequantises_again_and_is_given_no_weights():
    base, adapter = adapted()
    shapes = {kernel.shape for path, kernel in by_path(base).items() if path.endswith("kernel")}
    shapes |= {(shape[0], shape[1] * shape[2]) for shape in shapes if len(shape) == 3}
    shapes |= {(shape[0] * shape[1], shape[2]) for shape in shapes if len(shape) == 3}

    def weights_kept(params) -> set:
        loss = jax.jit(lambda adapter: jnp.sum(POLICY.sequence_stats(Adapted(params, adapter), BATCH).logprobs))
        kept = jax.tree.leaves(jax.vjp(loss, adapter)[1])
        return {leaf.shape for leaf in kept if leaf.dtype == jnp.float32} & shapes

    assert weights_kept(base)
    assert not weights_kept(quantised(base, "int8"))


@pytest.mark.nightly
def test_adapters_of_several_seeds_share_a_quantised_base():
    base, adapter = adapted()
    small, other = quantised(base, "int4"), jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), adapter, other)
    found = jax.vmap(lambda tree: value_and_gradient(POLICY, tree, small))(both)
    for seed, alone in enumerate((adapter, other)):
        of_seed = jax.tree.map(lambda leaf, seed=seed: leaf[seed], found)
        expected = value_and_gradient(POLICY, alone, small)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), of_seed, expected)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_merging_gives_the_dequantised_base_with_the_adapter_in_the_models_dtype(dtype):
    base, adapter = adapted()
    found = POLICY.merge(Adapted(quantised(base, dtype), adapter))
    expected = POLICY.merge(Adapted(dequantised_base(base, dtype), adapter))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merged = POLICY.merge(Adapted(quantised(half, dtype), adapter))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_an_adapter_of_a_quantised_base_is_that_of_the_base():
    base, _ = adapted()
    found, expected = (POLICY.init_adapter(params, jax.random.key(4)) for params in (quantised(base, "int4"), base))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_kernel_is_split_as_the_kernel_and_its_scales_where_they_divide(dtype):
    shape, mesh = config(d_model=256, n_heads=4, d_ff=64), make_mesh(jax.devices()[:4], (1, 2, 2))
    tree = jax.eval_shape(PolicyNetwork(shape, 64, ()).init, jax.random.key(0))
    small = jax.eval_shape(lambda params: quantised(params, dtype), tree)
    specs, before = (by_path(shardings(each, mesh, leading_axes=0)) for each in (small, tree))
    for path, leaf in by_path(small).items():
        kernel, _, part = path.partition("/kernel/")
        expected = list(before[f"{kernel}/kernel" if part else path].spec)
        if part == "scale" and kernel.endswith("down"):
            assert leaf.shape == (1, 256)  # all 64 inputs are one block, which is not split
            expected[0] = None
        if part == "scale" and kernel.endswith("attention/o"):
            assert leaf.shape == (4, 1, 256)
        assert list(specs[path].spec) == expected, path
