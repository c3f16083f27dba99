"""Frozen weights in 8 or 4 bits (Dettmers et al. 2023, QLoRA, arXiv:2305.14314), quantised by qwix.

A quantised kernel is a `qwix.QArray`, which takes the kernel's place in the tree of parameters: integers with the
kernel's shape, and a float32 scale for every block of inputs of an output. Layers dequantise it where they use it
(`models/linear.py`). qwix takes half a second to import, and is only imported when weights are quantised.
"""

import functools
import re
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

BaseDType = Literal["int8", "int4", "nf4"]

BLOCK = 64
"""Inputs that share a scale, as in section 4 of the paper; all inputs where the block does not divide them."""

P = TypeVar("P", bound=PyTree)


def is_quantised(leaf: Any) -> bool:
    """Return whether a node of a tree of parameters is a quantised kernel."""
    return hasattr(leaf, "qvalue")


def quantise(path: str, weights: PyTree, dtype: BaseDType | None) -> PyTree:
    """Quantise one parameter if it is the kernel of a linear layer in a block; any other is returned as it is.

    A weight w is stored as the integer nearest to w / s, with s = max |w| / 127.5 over the block for int8 and
    max |w| / 7.5 for int4, so that it changes by at most s / 2; for nf4, as the nearest of 16 quantiles of a normal
    distribution (appendix E of the paper), times s = max |w|. Scales are not quantised again.

    Args: path of the parameter, with names separated by /; dtype None leaves all parameters as they are.
    """
    if dtype is None or is_quantised(weights) or not re.search(r"(^|/)block_\d+/.*kernel$", path):
        return weights
    inputs = 1 if path.endswith("attention/o/kernel") else 0  # after the heads
    return _quantise(weights, inputs, dtype)


def quantised(params: P, dtype: BaseDType | None) -> P:
    """Quantise the kernels of a tree of parameters; see `quantise`."""

    def one(path: tuple, leaf: Any) -> Any:
        return quantise(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantised)


def dequantise(kernel: PyTree) -> Array:
    """Weights of a quantised kernel, in float32."""
    from qwix import dequantize

    return dequantize(kernel)


def dequantised(params: P, dtype: Any) -> P:
    """Dequantise the kernels of a tree of parameters, in a dtype. Other parameters keep theirs."""
    return jax.tree.map(
        lambda leaf: dequantise(leaf).astype(dtype) if is_quantised(leaf) else leaf, params, is_leaf=is_quantised
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantise(weights: Array, inputs: int, dtype: BaseDType) -> PyTree:
    from qwix import quantize

    size, channels = weights.shape[inputs], [axis for axis in range(weights.ndim) if axis != inputs]
    block = size if size % BLOCK else BLOCK
    return quantize(weights.astype(jnp.float32), dtype, channelwise_axes=channels, tiled_axes={inputs: block})
