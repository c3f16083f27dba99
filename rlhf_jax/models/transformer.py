"""Decoder-only transformer body from tokens to hidden states, with or without a key-value cache."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlhf_jax.core.row_sharding import split_rows
from rlhf_jax.models.layers import Block, Norm, Place
from rlhf_jax.models.model_config import ModelConfig, Remat, Rope
from rlhf_jax.models.rotary import rope_angles

EMPTY = -1
"""Position of an empty cache slot."""


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, one pair of arrays per layer, and the position of each slot's token.

    Tokens can be in any slots, in any order: attention depends only on positions.
    """

    keys: tuple[Array, ...]  # L x [B, G, C, K]: in this order, decoding on CPUs needs no transposition
    values: tuple[Array, ...]  # L x [B, G, C, K]
    positions: Array  # int32[B, C]; EMPTY for empty slots


def empty_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """Create an empty cache with `slots` slots per row."""
    shape = (batch, config.kv_heads, slots, config.head_width)
    layers = tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.n_layers))
    return KVCache(layers, layers, jnp.full((batch, slots), EMPTY, jnp.int32))


class Transformer(nn.Module):
    """Transformer body: embedding, layers, final norm. Positions count only tokens whose mask is True."""

    config: ModelConfig
    vocab_size: int

    def setup(self) -> None:
        """Declare the parameters."""
        config = self.config
        table = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", table, (self.vocab_size, config.d_model), config.param_dtype)
        if not config.tied:
            self.head = self.param("head", table, (self.vocab_size, config.d_model), config.param_dtype)
        if config.positions == "learned":
            self.position_table = self.param("positions", table, (config.context, config.d_model), config.param_dtype)
        self.blocks = [
            _block(config.remat)(config, config.window(i), name=f"block_{i}") for i in range(config.n_layers)
        ]
        self.final_norm = Norm(config, config.norm)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        sequence: Int[Array, "B S"] | None = None,
        place: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Hidden states of full sequences, which may have padding anywhere; arbitrary at padding.

        Args: for packed rows, sequence numbers the sequences, which do not see one another, and place the tokens of
        each.
        """
        positions = jnp.where(mask, _positions(mask) if place is None else place, EMPTY)
        cached = [None] * self.config.n_layers
        hidden, _ = self._layers(tokens, positions, positions, cached, 0, tokens.shape[1], sequence)
        return hidden

    def extend(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        cache: KVCache,
        slot: Int[Array, ""] | int,
        room: int | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Hidden states of S more tokens per row, which are written to the cache from `slot` (the same for all rows).

        Args: room is the maximum sequence length, if it exceeds the number of slots.
        """
        seen = jnp.max(cache.positions, axis=1) + 1
        positions = jnp.where(mask, seen[:, None] + _positions(mask), EMPTY)
        known = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1)
        layers = list(zip(cache.keys, cache.values, strict=True))
        hidden, layers = self._layers(tokens, positions, known, layers, slot, room or known.shape[1])
        return hidden, KVCache(tuple(k for k, _ in layers), tuple(v for _, v in layers), known)

    def _layers(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        known: Int[Array, "B C"],
        cached: list,
        slot: Array | int,
        room: int,
        sequence: Int[Array, "B S"] | None = None,
    ) -> tuple[Array, list]:
        """Run the layers on S tokens at `positions` (EMPTY: padding); each sees `known` positions up to its own."""
        config, present = self.config, jnp.maximum(positions, 0)
        x = jnp.take(self.embedding, tokens, axis=0).astype(config.compute_dtype)
        if config.embedding_scale != 1:
            x = x * jnp.array(config.embedding_scale, x.dtype)
        if config.positions == "learned":
            # Positions beyond the table give NaN, which attention masks do not remove: callers must avoid them.
            x = x + jnp.take(self.position_table, present, axis=0).astype(config.compute_dtype)
        angles: dict[Rope, tuple[Array | None, Array | None]] = {}
        masks: dict[int | None, Array] = {}
        numbered = jnp.zeros_like(positions) if sequence is None else sequence
        segments = jnp.where(positions == EMPTY, EMPTY, numbered) if cached[0] is None else None
        places = []
        for i in range(config.n_layers):
            rope, window = config.layer_rope(i), config.window(i)
            if rope not in angles:
                rotary = config.positions == "rotary"
                angles[rope] = rope_angles(rope, config.head_width, present, room) if rotary else (None, None)
            if window not in masks:
                masks[window] = _visible(positions, known, window, sequence)
            places.append(Place(*angles[rope], masks[window], segments, slot))
        if config.scan_layers and cached[0] is None and not self.is_initializing():
            return self.final_norm(self._scanned(x, places[: config.period])), cached
        layers = []
        for block, place, layer in zip(self.blocks, places, cached, strict=True):
            if layer is None:  # when decoding, this would gather the weights for every token
                x = split_rows(x)
            x, layer = block(x, place, layer)
            layers.append(layer)
        return self.final_norm(x), layers

    def _scanned(self, x: Float[Array, "B S D"], places: list[Place]) -> Float[Array, "B S D"]:
        """Run the blocks as a loop of periods. Args: places of the layers of one period."""
        config = self.config
        blocks = [_block(config.remat)(config, config.window(i), parent=None) for i in range(config.period)]

        def run(x: Array, weights: list[PyTree]) -> tuple[Array, None]:
            for block, place, params in zip(blocks, places, weights, strict=True):
                x, _ = block.apply({"params": params}, split_rows(x), place, None)
            return x, None

        each = [block.variables["params"] for block in self.blocks]
        stacked = [
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *each[i :: config.period]) for i in range(config.period)
        ]
        return jax.lax.scan(run, x, stacked)[0]


def _block(remat: Remat) -> type[Block]:
    """Block whose activations are recomputed in the backward pass as `ModelConfig.remat` says."""
    if not remat:
        return Block
    return nn.remat(Block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None)


def _positions(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _visible(
    positions: Int[Array, "B S"], known: Int[Array, "B C"], window: int | None, sequence: Int[Array, "B S"] | None
) -> Bool[Array, "B S C"]:
    back = positions[:, :, None] - known[:, None, :]
    visible = (back >= 0) & (known[:, None, :] != EMPTY)
    if window is not None:
        visible &= back < window
    return visible if sequence is None else visible & (sequence[:, :, None] == sequence[:, None, :])
