"""Masked reductions whose result does not depend on how a batch is split over devices.

Every function takes `axes`, the mapped axes over which the rows are split: `()` inside `jit` (the compiler sees the
whole batch), `("batch",)` inside `pmap`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from rlhf_jax.core.row_sharding import split_rows


def total(x: Float[Array, "..."] | Int[Array, "..."], axes: tuple[str, ...]) -> Array:
    """Sum of all elements over all devices: the `psum` of the local sum, or the local sum for `axes=()`."""
    local = jnp.sum(x)
    return jax.lax.psum(local, axes) if axes else local


def count(mask: Bool[Array, "..."], axes: tuple[str, ...]) -> Int[Array, ""]:
    """Number of True entries, over all devices."""
    return total(mask.astype(jnp.int32), axes)


def share(mask: Bool[Array, "..."], axes: tuple[str, ...]) -> Float[Array, ""]:
    """Share of True entries, over all devices."""
    return count(mask, axes) / total(jnp.ones(mask.shape, jnp.int32), axes)


def rows(x: Shaped[Array, "B ..."], axes: tuple[str, ...]) -> Int[Array, ""]:
    """Number of rows of a batch, over all devices."""
    return total(jnp.ones(x.shape[0], jnp.int32), axes)


def masked_mean(x: Float[Array, "*dims"], mask: Bool[Array, "*dims"], axes: tuple[str, ...]) -> Float[Array, ""]:
    """Mean of x where the mask is True, over all devices; 0 (not NaN) if the mask is empty."""
    return total(jnp.where(mask, x, 0), axes) / jnp.maximum(count(mask, axes), 1).astype(x.dtype)


def mean(x: Float[Array, "*dims"], axes: tuple[str, ...]) -> Float[Array, ""]:
    """Mean of all elements over all devices."""
    return masked_mean(x, jnp.ones(x.shape, bool), axes)


def masked_variance(x: Float[Array, "*dims"], mask: Bool[Array, "*dims"], axes: tuple[str, ...]) -> Float[Array, ""]:
    """Population variance (divided by the count) of x where the mask is True, over all devices."""
    x = jnp.where(mask, x, 0)  # before any arithmetic: 0 times NaN in the padding would give NaN gradients
    return masked_mean(jnp.square(x - masked_mean(x, mask, axes)), mask, axes)


def whiten(x: Float[Array, "B T"], mask: Bool[Array, "B T"], axes: tuple[str, ...]) -> Float[Array, "B T"]:
    """Shift and scale to mean 0 and variance 1 over the masked entries of the whole batch; 0 elsewhere.

    As `masked_whiten` of Huang et al. 2024 (arXiv:2403.17031), with 1e-8 added to the variance; their variance divides
    by the count minus one, ours by the count.
    """
    x = jnp.where(mask, x, 0)
    scaled = (x - masked_mean(x, mask, axes)) * jax.lax.rsqrt(masked_variance(x, mask, axes) + 1e-8)
    return jnp.where(mask, scaled, 0)


def lengths(mask: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """Number of tokens in each row."""
    return jnp.sum(mask, axis=1, dtype=jnp.int32)


def at_last_token(x: Float[Array, "B"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Place one number per row at the last token of its (prefix) mask; 0 elsewhere and in rows with an empty mask."""
    is_last = jnp.arange(mask.shape[1])[None, :] == (lengths(mask) - 1)[:, None]
    return jnp.where(is_last & mask, x[:, None], 0)


def gather_rows(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Gather the whole batch on every device along the first axis; the identity for `axes=()`."""
    if not axes:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), tree)


def local_rows(indices: Int[Array, "M"], axes: tuple[str, ...]) -> Int[Array, "m"]:
    """This device's equal share of a list of global row numbers, in order; the whole list for `axes=()`.

    Raises ValueError, at trace time, if the list does not divide evenly.
    """
    if not axes:
        return indices
    devices = jax.lax.axis_size(axes)
    if len(indices) % devices:
        raise ValueError(f"{len(indices)} rows do not divide over {devices} devices")
    share = len(indices) // devices
    return jax.lax.dynamic_slice_in_dim(indices, jax.lax.axis_index(axes) * share, share)


def take_rows(tree: PyTree, indices: Int[Array, "M"], axes: tuple[str, ...]) -> PyTree:
    """Take the rows with these numbers from a whole batch, and return this device's share of them."""
    own = local_rows(indices, axes)
    return split_rows(jax.tree.map(lambda leaf: leaf[own], tree))
