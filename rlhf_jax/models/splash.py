"""Splash attention, a kernel for TPUs: memory is linear in the length, and segment ids replace a mask of S x S."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LANES, LARGEST_BLOCK = 128, 512
"""The kernel's lengths are multiples of the lanes; blocks are as large as in MaxText and levanter."""


def splash_attend(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B G S K"],
    v: Float[Array, "B G S K"],
    segments: Int[Array, "B S"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B S H K"]:
    """Causal self-attention within segments, whose tokens are adjacent.

    Args: segments numbers the sequences of a row, and padding differently; window is the number of visible tokens,
    including the token itself; interpret runs the kernel on a CPU.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second to import

    length, heads = q.shape[1:3]
    whole = -(-length // LANES) * LANES
    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if whole % size == 0)
    shape = (whole, whole)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    blocks = {f"block_{name}": block for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**blocks),  # type: ignore[bad-argument-type]
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def padded(x: Array, axis: int, value: int = 0) -> Array:
        return jnp.pad(x, [(0, whole - length) if i == axis else (0, 0) for i in range(x.ndim)], constant_values=value)

    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    ids = padded(segments, 1, -1)
    inputs = jnp.swapaxes(padded(scaled, 1), 1, 2), padded(k, 2), padded(v, 2), splash.SegmentIds(ids, ids)
    by_head = jnp.asarray(jax.vmap(kernel)(*inputs))
    return jnp.swapaxes(by_head, 1, 2)[:, :length]
