"""Transformer layers: norms, attention and MLP, shared by all model families."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models.attention import attend
from rlhf_jax.models.linear import dot_general, promote
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.norms import rms_norm
from rlhf_jax.models.rotary import rotate

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
    segments: Array | None  # int32[B, S]: sequences of the new tokens, -1 at padding; None with a cache
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
        if self.kind == "rms":
            out = rms_norm(x, scale, epsilon=config.norm_epsilon)
        else:
            bias = self.param("bias", nn.initializers.zeros, shape, config.param_dtype).astype(jnp.float32)
            x32 = x.astype(jnp.float32)
            centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
            out = rms_norm(centred, scale, epsilon=config.norm_epsilon) + bias.reshape((1,) * (x.ndim - 1) + shape)
        return out.astype(config.compute_dtype)


def linear_options(config: ModelConfig) -> dict[str, Any]:
    """Options of all linear layers: their dtypes, and products with hand-written gradients or quantised kernels."""
    return {
        "param_dtype": config.param_dtype,
        "dtype": config.compute_dtype,
        "promote_dtype": promote,
        "dot_general": dot_general,
    }


class Attention(nn.Module):
    """Causal self-attention with grouped heads, within a window of tokens (None: unlimited)."""

    config: ModelConfig
    window: int | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], place: Place, cached: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B S D"], tuple[Array, Array] | None]:
        """Attend from S new tokens to C slots: the tokens themselves, or a cache to which they are written first."""
        config = self.config
        width = config.head_width
        linear = linear_options(config)
        q, k, v = (
            nn.DenseGeneral((heads, width), name=name, use_bias=config.qkv_bias, **linear)(x)
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
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        if cached is not None:
            k, v = cached = (
                jax.lax.dynamic_update_slice_in_dim(cached[0], k, place.slot, axis=2),
                jax.lax.dynamic_update_slice_in_dim(cached[1], v, place.slot, axis=2),
            )
        scale = config.query_scale if config.query_scale is not None else width**-0.5
        mixed = attend(
            q,
            k,
            v,
            place.attention_mask,
            scale=scale,
            softcap=config.attention_softcap,
            by=config.attention,
            segments=place.segments,
            window=self.window,
        )
        out = nn.DenseGeneral(config.d_model, axis=(-2, -1), name="o", use_bias=config.out_bias, **linear)
        return out(mixed), cached


class Block(nn.Module):
    """Transformer block: attention and an MLP with residual connections, and norms before, after or around them."""

    config: ModelConfig
    window: int | None  # of the attention

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], place: Place, cached: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B S D"], tuple[Array, Array] | None]:
        """Return the residual stream after this layer, and the layer's cache."""
        config = self.config

        def norm(y: Array, where: str, name: str) -> Array:
            return Norm(config, config.norm, name=name)(y) if config.norm_placement in (where, "around") else y

        mixed, cached = Attention(config, self.window, name="attention")(
            norm(x, "before", "attention_norm"), place, cached
        )
        mixed = norm(mixed, "after", "attention_out_norm")
        h = self._mlp(norm(x if config.parallel else x + mixed, "before", "mlp_norm"))
        return x + mixed + norm(h, "after", "mlp_out_norm"), cached

    def _mlp(self, x: Array) -> Array:
        """Two projections with an activation between them, or three with a gated activation."""
        config = self.config
        options = linear_options(config) | {"use_bias": config.mlp_bias}
        activation = ACTIVATIONS[config.activation]
        up = nn.Dense(config.d_ff, name="up", **options)(x)
        # The gradient recomputes the activation from its inputs, which takes no longer than reading it from memory.
        if config.gated:
            gate = nn.Dense(config.d_ff, name="gate", **options)(x)
            h = jax.checkpoint(lambda gate, up: activation(gate) * up)(gate, up)
        else:
            # A barrier would keep the compiler from sharing this forward pass with one outside the gradient.
            h = jax.checkpoint(activation, prevent_cse=False)(up)
        return nn.Dense(config.d_model, name="down", **options)(h)
