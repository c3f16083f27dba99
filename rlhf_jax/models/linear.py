"""Products of linear layers, with hand-written gradients."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, PyTree

from rlhf_jax.models.quantised import dequantise, is_quantised


def promote(x: Array, kernel: PyTree, bias: Array | None, *, dtype: Any) -> tuple[Array, PyTree, Array | None]:
    """Cast the arrays of a linear layer, but for a quantised kernel; the `promote_dtype` of Flax's layers."""
    if is_quantised(kernel):
        x, bias = promote_dtype(x, bias, dtype=dtype)
        return x, kernel, bias
    return tuple(promote_dtype(x, kernel, bias, dtype=dtype))


def dot_general(x: Array, kernel: PyTree, dimension_numbers: tuple, precision: None) -> Array:
    """Contract the last axes of x with the first axes of a kernel; the `dot_general` of Flax's linear layers.

    The gradient is that of a product of two matrices. For inputs with several leading axes, automatic differentiation
    on CPUs computes the output's gradient twice, once transposed, which takes as long as the products.

    Args: kernel is an array, or quantised; the latter is constant and has no gradient.
    """
    del precision
    (_, contracted), _ = dimension_numbers
    inputs, outputs = kernel.shape[: len(contracted)], kernel.shape[len(contracted) :]
    rows = x.shape[: x.ndim - len(inputs)]
    size = math.prod(inputs)
    if is_quantised(kernel):
        return _constant_product(x.reshape(-1, size), kernel).reshape(*rows, *outputs)
    return _product(x.reshape(-1, size), kernel.reshape(size, -1)).reshape(*rows, *outputs)


@jax.custom_vjp
def _product(x: Float[Array, "rows inputs"], kernel: Float[Array, "inputs outputs"]) -> Float[Array, "rows outputs"]:
    return x @ kernel


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _backward(saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return jnp.einsum("no,io->ni", d_out, kernel), jnp.einsum("ni,no->io", x, d_out)


_product.defvjp(_forward, _backward)


@jax.custom_vjp
def _constant_product(x: Float[Array, "rows inputs"], kernel: PyTree) -> Float[Array, "rows outputs"]:
    x, weights = _opened(x, kernel)
    return x @ weights.reshape(x.shape[1], -1)


def _constant_forward(x: Array, kernel: PyTree) -> tuple[Array, PyTree]:
    return _constant_product(x, kernel), kernel


def _constant_backward(kernel: PyTree, d_out: Array) -> tuple[Array, None]:
    d_out, weights = _opened(d_out, kernel)
    return jnp.einsum("no,io->ni", d_out, weights.reshape(-1, d_out.shape[1])), None


_constant_product.defvjp(_constant_forward, _constant_backward)


def _opened(rows: Array, kernel: PyTree) -> tuple[Array, Array]:
    """Dequantise a kernel in the dtype of the rows that it is multiplied with. Returns rows and weights.

    The barrier keeps the compiler from dequantising before the rows are known: it would keep the weights of all layers
    from the forward to the backward pass, or throughout a decode loop.
    """
    rows, kernel = jax.lax.optimization_barrier((rows, kernel))
    return rows, dequantise(kernel).astype(rows.dtype)
