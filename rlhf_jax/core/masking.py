"""Masked reductions that are the same number whether a batch lies on one device or is split over several.

Every function takes `axes`, the names of the mapped axes the rows are split over: `()` inside `jit` (the compiler sees
the whole batch), `("batch",)` inside `pmap`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree


def total(x: Float[Array, "..."] | Int[Array, "..."], axes: tuple[str, ...]) -> Array:
    """Sum of all elements over all devices: `psum` of the local sum, the local sum alone for `axes=()`."""
    local = jnp.sum(x)
    return jax.lax.psum(local, axes) if axes else local


def count(mask: Bool[Array, "..."], axes: tuple[str, ...]) -> Int[Array, ""]:
    """How many entries are True, over all devices."""
    return total(mask.astype(jnp.int32), axes)


def rows(x: Float[Array, "B ..."] | Int[Array, "B ..."], axes: tuple[str, ...]) -> Int[Array, ""]:
    """How many rows a batch has, over all devices."""
    return total(jnp.ones(x.shape[0], jnp.int32), axes)


def masked_mean(x: Float[Array, "*dims"], mask: Bool[Array, "*dims"], axes: tuple[str, ...]) -> Float[Array, ""]:
    """Mean of x where the mask is True, over all devices; 0 where nothing is (so that an empty batch is no NaN)."""
    return total(jnp.where(mask, x, 0), axes) / jnp.maximum(count(mask, axes), 1).astype(x.dtype)


def mean(x: Float[Array, "*dims"], axes: tuple[str, ...]) -> Float[Array, ""]:
    """Mean of all elements over all devices."""
    return masked_mean(x, jnp.ones(x.shape, bool), axes)


def masked_variance(x: Float[Array, "*dims"], mask: Bool[Array, "*dims"], axes: tuple[str, ...]) -> Float[Array, ""]:
    """Population variance (divided by the count) of x where the mask is True, over all devices."""
    x = jnp.where(mask, x, 0)  # first: 0 times a NaN in the padding would be a NaN in the gradient
    return masked_mean(jnp.square(x - masked_mean(x, mask, axes)), mask, axes)


def whiten(x: Float[Array, "B T"], mask: Bool[Array, "B T"], axes: tuple[str, ...]) -> Float[Array, "B T"]:
    """Shift and scale to mean 0 and variance 1 over the masked entries of the whole batch; 0 elsewhere.

    As `masked_whiten` of Huang et al. 2024 (arXiv:2403.17031): the variance is stabilised by 1e-8 under the
    root. We divide by the count, they by the count less one.
    """
    x = jnp.where(mask, x, 0)
    scaled = (x - masked_mean(x, mask, axes)) * jax.lax.rsqrt(masked_variance(x, mask, axes) + 1e-8)
    return jnp.where(mask, scaled, 0)


def lengths(mask: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """Number of tokens in each row."""
    return jnp.sum(mask, axis=1, dtype=jnp.int32)


def at_last_token(x: Float[Array, "B"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """One number a row, on the last token of that row's mask (a prefix mask); 0 elsewhere, nothing on empty rows."""
    is_last = jnp.arange(mask.shape[1])[None, :] == (lengths(mask) - 1)[:, None]
    return jnp.where(is_last & mask, x[:, None], 0)


def gather_rows(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """The whole batch on every device: concatenates the rows (first axis) of all devices; the identity for `()`."""
    if not axes:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), tree)


def own_rows(indices: Int[Array, "M"], axes: tuple[str, ...]) -> Int[Array, "m"]:
    """This device's equal share of a list of global row numbers, in order; all of them for `()`.

    Raises ValueError (at trace time) when the list does not divide evenly.
    """
    if not axes:
        return indices
    devices = jax.lax.axis_size(axes)
    if len(indices) % devices:
        raise ValueError(f"{len(indices)} rows do not divide over {devices} devices")
    share = len(indices) // devices
    return jax.lax.dynamic_slice_in_dim(indices, jax.lax.axis_index(axes) * share, share)
