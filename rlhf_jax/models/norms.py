"""Root-mean-square normalisation with a hand-written gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, "D"], *, epsilon: float) -> Float[Array, "*rows D"]:
    r"""Compute $y = r x \odot s$ with $r = (\frac{1}{D} \sum_i x_i^2 + \epsilon)^{-1/2}$ in the dtype of the scale s.

    Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    return _rms_norm(epsilon, x.reshape(-1, x.shape[-1]), scale).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(epsilon: float, x: Float[Array, "N D"], scale: Float[Array, "D"]) -> Float[Array, "N D"]:
    return _forward(epsilon, x, scale)[0]


def _forward(epsilon: float, x: Array, scale: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    wide = x.astype(scale.dtype)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + epsilon)
    return wide * inverse[:, None] * scale[None, :], (x, inverse, scale)


def _backward(epsilon: float, saved: tuple[Array, Array, Array], d_out: Array) -> tuple[Array, Array]:
    r"""Compute $\partial x = r (\partial y \odot s) - x \, r^3 / D \sum_i \partial y_i x_i s_i$.

    The sums are products with vectors: automatic differentiation on CPUs writes s and r to arrays as large as x first,
    and keeps them from the forward pass on.
    """
    x, inverse, scale = saved
    wide = x.astype(scale.dtype)
    products, exact = d_out * wide, jax.lax.Precision.HIGHEST
    shift = jnp.einsum("nd,d->n", products, scale, precision=exact) * inverse**3 / x.shape[-1]
    d_x = d_out * inverse[:, None] * scale[None, :] - wide * shift[:, None]
    return d_x.astype(x.dtype), jnp.einsum("nd,n->d", products, inverse, precision=exact)


_rms_norm.defvjp(_forward, _backward)
