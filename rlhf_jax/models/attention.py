"""Softmax attention with a hand-written gradient, cuDNN's in programs for NVIDIA GPUs, or splash attention on TPUs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.core.row_sharding import ROW_AXES, row_devices
from rlhf_jax.models.model_config import AttentionBy
from rlhf_jax.models.splash import splash_attend


def attend(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B G C K"],
    v: Float[Array, "B G C K"],
    mask: Bool[Array, "B S C"],
    *,
    scale: float,
    softcap: float | None,
    by: AttentionBy,
    segments: Int[Array, "B S"] | None = None,
    window: int | None = None,
) -> Float[Array, "B S H K"]:
    """Attention of S queries to C slots; each of G key-value heads serves H / G query heads.

    The device that the program is compiled for decides: cuDNN computes on NVIDIA GPUs, splash attention on TPUs, and
    XLA elsewhere. XLA also computes sizes that cuDNN does not support (`cudnn_takes`), a soft cap in place of cuDNN,
    and steps with a cache in place of splash attention, which never reads the mask. Queries without a visible slot get
    0 from XLA, and an arbitrary value from the others.

    Args: segments and window express the mask of rows without a cache. Segments number the sequences, whose tokens see
    the same sequence up to themselves, with -1 at padding (None: there is a cache). Window is the number of visible
    tokens, including the token itself (None: unlimited).
    """
    by_xla = functools.partial(_by_xla, scale, softcap)
    if by == "cudnn" and softcap is None and cudnn_takes(q.shape[1], k.shape[2]):
        by_cudnn = _on_each_device(functools.partial(_by_cudnn, scale), q, k)
        return jax.lax.platform_dependent(q, k, v, mask, cuda=by_cudnn, default=by_xla)
    if by == "splash" and segments is not None:
        splash = functools.partial(splash_attend, scale=scale, softcap=softcap, window=window)
        by_splash = _on_each_device(splash, q, k)
        return jax.lax.platform_dependent(
            q,
            k,
            v,
            mask,
            segments,
            tpu=lambda q, k, v, mask, segments: by_splash(q, k, v, segments),
            default=lambda q, k, v, mask, segments: by_xla(q, k, v, mask),
        )
    return by_xla(q, k, v, mask)


def _on_each_device(kernel: Callable[..., Array], q: Array, k: Array) -> Callable[..., Array]:
    """Apply a kernel to each device's rows and heads: the compiler cannot split it.

    Args: the kernel takes q, k, v, and another array with rows. Rows and heads that do not divide are not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not {*ROW_AXES, "tensor"} <= set(mesh.auto_axes) or mesh.size == 1:
        return kernel
    rows = None if len(q) % row_devices() else ROW_AXES
    heads = None if k.shape[1] % mesh.shape["tensor"] else "tensor"
    queries, slots = P(rows, None, heads), P(rows, heads)
    return jax.shard_map(kernel, in_specs=(queries, slots, slots, P(rows)), out_specs=queries, check_vma=False)


def _by_xla(scale: float, softcap: float | None, q: Array, k: Array, v: Array, mask: Array) -> Array:
    mixed = _attend(scale, softcap, _by_group(q, k.shape[1]), k, v, mask)
    return _by_position(mixed, q.shape[1])


def _by_cudnn(scale: float, q: Array, k: Array, v: Array, mask: Array) -> Array:
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")


def cudnn_takes(queries: int, slots: int) -> bool:
    """Return whether cuDNN supports these sizes with a mask: gradients need even sizes.

    A single query at many slots is a decoding step, which needs no gradient.
    """
    return (queries % 2 == 0 and slots % 2 == 0) or (queries == 1 and slots > 1)


def _by_group(x: Float[Array, "B S H K"], groups: int) -> Float[Array, "B G RS K"]:
    """Stack the R = H / G query heads of each group: one matrix per group multiplies its keys without transposition."""
    batch, length, _, width = x.shape
    split = x.reshape(batch, length, groups, -1, width)
    return jnp.transpose(split, (0, 2, 3, 1, 4)).reshape(batch, groups, -1, width)


def _by_position(x: Float[Array, "B G RS K"], length: int) -> Float[Array, "B S H K"]:
    """Inverse of `_by_group`."""
    batch, groups, _, width = x.shape
    split = x.reshape(batch, groups, -1, length, width)
    return jnp.transpose(split, (0, 3, 1, 2, 4)).reshape(batch, length, -1, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, softcap: float | None, q: Array, k: Array, v: Array, mask: Array) -> Array:
    r"""Compute $O = (E V) / z$ with $E_{sc} = \exp(l_{sc} - \max_c l_{sc})$ and $z_s = \sum_c E_{sc}$.

    The gradient needs two passes over the matrix of S x C weights besides its products, one exponential per weight, and
    no matrix but E (and the capped logits with a soft cap): with $G = \partial L / \partial O$ divided by z, the
    logits' gradient is $E (G V^T - \sum_k G O)$. Automatic differentiation saves and transposes several such matrices.
    """
    return _attend_forward(scale, softcap, q, k, v, mask)[0]


def _attend_forward(
    scale: float, softcap: float | None, q: Array, k: Array, v: Array, mask: Array
) -> tuple[Array, tuple]:
    wide = q.dtype if q.dtype == jnp.float64 else jnp.float32
    logits = jnp.einsum("bgsk,bgck->bgsc", q, k, preferred_element_type=wide) * scale
    capped = None if softcap is None else softcap * jnp.tanh(logits / softcap)
    seen = _seen(mask, logits if capped is None else capped)
    # A row without visible slots has the maximum -inf, and -inf - -inf is NaN.
    most = jnp.maximum(jnp.max(seen, axis=-1, keepdims=True), jnp.finfo(wide).min)
    exponentials = jnp.exp(seen - most)
    normaliser = jnp.maximum(jnp.sum(exponentials, axis=-1, keepdims=True), 1)  # 1 at least, but for such rows
    exponentials = exponentials.astype(v.dtype)
    products = jnp.einsum("bgsc,bgck->bgsk", exponentials, v, preferred_element_type=wide)
    out = (products / normaliser).astype(v.dtype)
    return out, (q, k, v, exponentials, normaliser, out, capped)


def _attend_backward(scale: float, softcap: float | None, saved: tuple, d_out: Array) -> tuple:
    q, k, v, exponentials, normaliser, out, capped = saved
    wide = normaliser.dtype
    d_products = (d_out.astype(wide) / normaliser).astype(v.dtype)
    shift = jnp.sum(d_products.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    d_weights = jnp.einsum("bgsk,bgck->bgsc", d_products, v, preferred_element_type=wide)
    d_logits = exponentials.astype(wide) * (d_weights - shift)
    if capped is not None:  # d tanh(x) = 1 - tanh(x)^2
        d_logits *= 1 - jnp.square(capped / softcap)
    d_logits = d_logits.astype(q.dtype)
    d_v = jnp.einsum("bgsc,bgsk->bgck", exponentials, d_products)
    d_q = jnp.einsum("bgsc,bgck->bgsk", d_logits, k) * scale
    d_k = jnp.einsum("bgsc,bgsk->bgck", d_logits, q) * scale
    return d_q, d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def _seen(mask: Bool[Array, "B S C"], logits: Float[Array, "B G RS C"]) -> Float[Array, "B G RS C"]:
    """Set the logits of slots that a query may not see to -inf."""
    by_head = logits.reshape(*logits.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_head, -jnp.inf).reshape(logits.shape)
