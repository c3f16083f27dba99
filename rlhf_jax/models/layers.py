"""Transformer layers: norms, attention and MLP, shared by all model families."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.models.model_config import AttentionBy, ModelConfig
from rlhf_jax.models.rotary import rotate
from rlhf_jax.types import RlhfError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


class Place(NamedTuple):
    """Positions of new tokens, in the form that one layer's attention needs."""

    sin: Array | None  # [B, S, pairs], or None without rotary positions
    cos: Array | None
    attention_mask: Array  # bool[B, S, C]: slots visible to each new token
    slot: Array | int  # first cache slot of the new tokens


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last axis, computed in float32."""

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise x; returns the compute dtype."""
        config, shape = self.config, x.shape[-1:]
        start = nn.initializers.constant(1 - config.norm_offset)
        scale = self.param("scale", start, shape, config.param_dtype).astype(jnp.float32) + config.norm_offset
        wide = (1,) * (x.ndim - 1) + shape
        x32 = x.astype(jnp.float32)
        if self.kind == "rms":
            mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
            out = x32 * (jax.lax.rsqrt(mean_square + config.norm_epsilon) * scale.reshape(wide))
        else:
            bias = self.param("bias", nn.initializers.zeros, shape, config.param_dtype).astype(jnp.float32)
            centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
            out = centred * (jax.lax.rsqrt(variance + config.norm_epsilon) * scale.reshape(wide)) + bias.reshape(wide)
        return out.astype(config.compute_dtype)


def attend(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B C G K"],
    v: Float[Array, "B C G K"],
    mask: Bool[Array, "B S C"],
    *,
    scale: float,
    softcap: float | None,
    by: AttentionBy,
) -> Float[Array, "B S H K"]:
    """Attention of S queries to C slots; each of G key-value heads serves H / G query heads.

    Sizes that cuDNN does not support (`cudnn_takes`) fall back to XLA, and a soft cap is computed without either.
    Raises RlhfError if cuDNN is requested without a GPU.
    """
    if by == "cudnn" and jax.default_backend() != "gpu":
        raise RlhfError(
            f"attention = 'cudnn' needs an NVIDIA GPU, but this runs on {jax.default_backend()}: set it to 'xla'"
        )
    if softcap is None:
        by = "cudnn" if by == "cudnn" and cudnn_takes(q.shape[1], k.shape[1]) else "xla"
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation=by)
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = jnp.einsum("bsgrk,bcgk->bgrsc", groups, k, preferred_element_type=jnp.float32) * scale
    capped = softcap * jnp.tanh(logits / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], capped, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bgrsc,bcgk->bsgrk", weights.astype(v.dtype), v).reshape(q.shape)


def cudnn_takes(queries: int, slots: int) -> bool:
    """Return whether cuDNN supports these sizes with a mask: gradients need even sizes.

    A single query at many slots is a decoding step, which needs no gradient.
    """
    return (queries % 2 == 0 and slots % 2 == 0) or (queries == 1 and slots > 1)


class Attention(nn.Module):
    """Causal self-attention with grouped heads."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], place: Place, cached: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B S D"], tuple[Array, Array] | None]:
        """Attend from S new tokens to C slots: the tokens themselves, or a cache to which they are written first."""
        config = self.config
        width = config.head_width
        dtypes = {"param_dtype": config.param_dtype, "dtype": config.compute_dtype}
        q, k, v = (
            nn.DenseGeneral((heads, width), name=name, use_bias=config.qkv_bias, **dtypes)(x)
            for name, heads in (("q", config.n_heads), ("k", config.kv_heads), ("v", config.kv_heads))
        )
        if config.qk_norm == "head":
            q, k = Norm(config, "rms", name="q_norm")(q), Norm(config, "rms", name="k_norm")(k)
        elif config.qk_norm == "all":
            q, k = (
                Norm(config, "rms", name=f"{name}_norm")(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
                for name, y in (("q", q), ("k", k))
            )
        if place.sin is not None and place.cos is not None:
            q, k = rotate(q, place.sin, place.cos), rotate(k, place.sin, place.cos)
        if cached is not None:
            cached = (
                jax.lax.dynamic_update_slice_in_dim(cached[0], jnp.swapaxes(k, 1, 2), place.slot, axis=2),
                jax.lax.dynamic_update_slice_in_dim(cached[1], jnp.swapaxes(v, 1, 2), place.slot, axis=2),
            )
            k, v = jnp.swapaxes(cached[0], 1, 2), jnp.swapaxes(cached[1], 1, 2)
        scale = config.query_scale if config.query_scale is not None else width**-0.5
        mixed = attend(
            q, k, v, place.attention_mask, scale=scale, softcap=config.attention_softcap, by=config.attention
        )
        out = nn.DenseGeneral(config.d_model, axis=(-2, -1), name="o", use_bias=config.out_bias, **dtypes)
        return out(mixed), cached


class Block(nn.Module):
    """Transformer block: attention and an MLP with residual connections, and norms before, after or around them."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], place: Place, cached: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B S D"], tuple[Array, Array] | None]:
        """Return the residual stream after this layer, and the layer's cache."""
        config = self.config

        def norm(y: Array, where: str, name: str) -> Array:
            return Norm(config, config.norm, name=name)(y) if config.norm_placement in (where, "around") else y

        mixed, cached = Attention(config, name="attention")(norm(x, "before", "attention_norm"), place, cached)
        mixed = norm(mixed, "after", "attention_out_norm")
        h = self._mlp(norm(x if config.parallel else x + mixed, "before", "mlp_norm"))
        return x + mixed + norm(h, "after", "mlp_out_norm"), cached

    def _mlp(self, x: Array) -> Array:
        """Two projections with an activation between them, or three with a gated activation."""
        config = self.config
        options: dict[str, Any] = {
            "param_dtype": config.param_dtype,
            "dtype": config.compute_dtype,
            "use_bias": config.mlp_bias,
        }
        activation = ACTIVATIONS[config.activation]
        up = nn.Dense(config.d_ff, name="up", **options)(x)
        gated = config.gated
        h = activation(nn.Dense(config.d_ff, name="gate", **options)(x)) * up if gated else activation(up)
        return nn.Dense(config.d_model, name="down", **options)(h)
