"""A decoder-only transformer body: tokens in, hidden states out, with or without a key-value cache."""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a transformer: pre-norm blocks with RMSNorm, rotary positions and a two-layer perceptron."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    activation: Literal["relu", "gelu", "silu"]
    param_dtype: DType
    compute_dtype: DType

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model = {self.d_model} must be a multiple of 2 * n_heads = {2 * self.n_heads}: "
                "rotary positions turn pairs of channels in each head"
            )


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, one pair of arrays a layer, and which slots hold a token."""

    keys: tuple[Array, ...]  # L x [B, H, S, K]: with the heads outside, decoding transposes nothing on CPUs
    values: tuple[Array, ...]  # L x [B, H, S, K]
    mask: Array  # bool[B, S]


def empty_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """A cache with room for `slots` tokens a row, none of them filled."""
    shape = (batch, config.n_heads, slots, config.d_model // config.n_heads)
    layers = tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.n_layers))
    return KVCache(layers, layers, jnp.zeros((batch, slots), bool))


def rotate(x: Float[Array, "B S H K"], positions: Int[Array, "B S"]) -> Float[Array, "B S H K"]:
    """Rotary position embedding with base 10,000 on half-rotated pairs (Su et al. 2021, arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    sin, cos = jnp.sin(angles).astype(x.dtype), jnp.cos(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        attention_mask: Bool[Array, "B S C"],
        cached: tuple[Array, Array] | None,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B S D"], tuple[Array, Array] | None]:
        """Attends from S new tokens to C slots: the tokens themselves, or a cache in which they start at `slot`."""
        config = self.config
        head_dim = config.d_model // config.n_heads
        dtypes = {"param_dtype": config.param_dtype, "dtype": config.compute_dtype, "use_bias": False}
        q = rotate(nn.DenseGeneral((config.n_heads, head_dim), name="q", **dtypes)(x), positions)
        k = rotate(nn.DenseGeneral((config.n_heads, head_dim), name="k", **dtypes)(x), positions)
        v = nn.DenseGeneral((config.n_heads, head_dim), name="v", **dtypes)(x)
        if cached is not None:
            cached = (
                jax.lax.dynamic_update_slice_in_dim(cached[0], jnp.swapaxes(k, 1, 2), slot, axis=2),
                jax.lax.dynamic_update_slice_in_dim(cached[1], jnp.swapaxes(v, 1, 2), slot, axis=2),
            )
            k, v = jnp.swapaxes(cached[0], 1, 2), jnp.swapaxes(cached[1], 1, 2)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=attention_mask[:, None])
        return nn.DenseGeneral(config.d_model, axis=(-2, -1), name="o", **dtypes)(mixed), cached


class Block(nn.Module):
    """One pre-norm layer: attention, then a perceptron, each added to the stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        attention_mask: Bool[Array, "B S C"],
        cached: tuple[Array, Array] | None,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B S D"], tuple[Array, Array] | None]:
        """The stream after this layer, and the layer's cache."""
        config = self.config
        dtypes = {"param_dtype": config.param_dtype, "dtype": config.compute_dtype}
        mixed, cached = Attention(config, name="attention")(
            nn.RMSNorm(name="attention_norm", **dtypes)(x), positions, attention_mask, cached, slot
        )
        x = x + mixed
        h = nn.Dense(config.d_ff, use_bias=False, name="up", **dtypes)(nn.RMSNorm(name="mlp_norm", **dtypes)(x))
        h = getattr(jax.nn, config.activation)(h)
        return x + nn.Dense(config.d_model, use_bias=False, name="down", **dtypes)(h), cached


class Transformer(nn.Module):
    """The body: embedding, layers, final norm. Positions count the tokens of the mask, so padding takes up none."""

    config: ModelConfig
    vocab_size: int

    def setup(self) -> None:
        """Declares the parameters."""
        config = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (self.vocab_size, config.d_model), config.param_dtype
        )
        self.blocks = [Block(config, name=f"block_{i}") for i in range(config.n_layers)]
        self.final_norm = nn.RMSNorm(param_dtype=config.param_dtype, dtype=config.compute_dtype)

    def __call__(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
        """Hidden states of whole sequences with padding anywhere; those of padding mean nothing."""
        causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
        hidden, _ = self._layers(tokens, _positions(mask), causal[None] & mask[:, None], [None] * len(self.blocks), 0)
        return hidden

    def extend(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        cache: KVCache,
        slot: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Hidden states of S more tokens a row, put into the cache at `slot` (the same for every row) and after it."""
        seen = jnp.sum(cache.mask, axis=1, dtype=jnp.int32)
        cache_mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, slot, axis=1)
        slots = jnp.arange(cache.mask.shape[1])
        causal = slots[None, :] <= slot + jnp.arange(tokens.shape[1])[:, None]
        hidden, layers = self._layers(
            tokens,
            seen[:, None] + _positions(mask),
            causal[None] & cache_mask[:, None],
            list(zip(cache.keys, cache.values, strict=True)),
            slot,
        )
        return hidden, KVCache(tuple(k for k, _ in layers), tuple(v for _, v in layers), cache_mask)

    def _layers(
        self,
        tokens: Array,
        positions: Array,
        attention_mask: Array,
        cached: list,
        slot: Array | int,
    ) -> tuple[Array, list]:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.compute_dtype)
        layers = []
        for block, layer in zip(self.blocks, cached, strict=True):
            x, layer = block(x, positions, attention_mask, layer, slot)
            layers.append(layer)
        return self.final_norm(x), layers


def _positions(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
