"""Shapes of batches, and shapes of states with their shardings."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.methods.policy_parts import OnlineBatch
from rlhf_jax.models.sharding import shardings
from rlhf_jax.runtime.programs import MeshPlacement
from rlhf_jax.types import ComparisonBatch, LabelledPairs, PreferenceBatch, PromptBatch, Sequences, TokenBatch


def array(dtype: Any, *shape: int) -> Any:
    """Shape and dtype in an array's place."""
    return jax.ShapeDtypeStruct(shape, dtype)


def width_of(data: DataConfig) -> int:
    """Length of a row."""
    return data.max_prompt_tokens + data.max_response_tokens


def tokens(data: DataConfig, rows: int) -> TokenBatch:
    """Shapes of demonstrations."""
    mask = array(jnp.bool_, rows, width_of(data))
    return TokenBatch(array(jnp.int32, rows, width_of(data)), mask, mask)


def sequences(data: DataConfig, *rows: int) -> Sequences:
    """Shapes of prompts with a response each."""
    width, most = width_of(data), data.max_response_tokens
    return Sequences(
        array(jnp.int32, *rows, width),
        array(jnp.bool_, *rows, width),
        array(jnp.int32, *rows),
        array(jnp.int32, *rows, most),
        array(jnp.bool_, *rows, most),
    )


def pairs(data: DataConfig, rows: int) -> PreferenceBatch:
    """Shapes of preference pairs."""
    return PreferenceBatch(sequences(data, rows), sequences(data, rows))


def labelled_pairs(data: DataConfig, rows: int) -> LabelledPairs:
    """Shapes of preference pairs with margins and votes."""
    return LabelledPairs(pairs(data, rows), array(jnp.float32, rows), array(jnp.float32, rows, 2))


def comparisons(data: DataConfig, rows: int, most: int) -> ComparisonBatch:
    """Shapes of prompts with several responses each."""
    return ComparisonBatch(sequences(data, rows, most), array(jnp.bool_, rows, most, most))


def prompts(data: DataConfig, *rows: int) -> PromptBatch:
    """Shapes of prompts, [B], or of those of several rounds, [B, rounds]."""
    most = data.max_prompt_tokens
    return PromptBatch(array(jnp.int32, *rows, most), array(jnp.bool_, *rows, most), array(jnp.int32, *rows))


def online(data: DataConfig, *rows: int, demonstrations: int | None) -> OnlineBatch:
    """Shapes of an iteration's inputs."""
    return OnlineBatch(prompts(data, *rows), None if demonstrations is None else tokens(data, demonstrations))


def one_step(batch: PyTree, seeds: int) -> PyTree:
    """Shapes of a batch of one step, with all leading axes."""
    lead = (1, seeds) if seeds > 1 else (1,)
    return jax.tree.map(lambda x: array(x.dtype, *lead, *x.shape), batch)


def placed(tree: PyTree, placement: MeshPlacement, *, leading_axes: int) -> PyTree:
    """Shapes of parameters, or of a state, with their shardings."""
    places = shardings(tree, placement.mesh, leading_axes=leading_axes)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def bytes_of_device(tree: PyTree) -> int:
    """Bytes that shapes with shardings take on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def parameters_of(tree: PyTree) -> int:
    """Number of elements of all arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
