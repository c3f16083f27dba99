"""Products of linear layers, with hand-written gradients."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dot_general(x: Array, kernel: Array, dimension_numbers: tuple, precision: None) -> Array:
    """Contract the last axes of x with the first axes of a kernel; the `dot_general` of Flax's linear layers.

    The gradient is that of a product of two matrices. For inputs with several leading axes, automatic differentiation
    on CPUs computes the output's gradient twice, once transposed, which takes as long as the products.
    """
    del precision
    (_, contracted), _ = dimension_numbers
    inputs, outputs = kernel.shape[: len(contracted)], kernel.shape[len(contracted) :]
    rows = x.shape[: x.ndim - len(inputs)]
    size = math.prod(inputs)
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
