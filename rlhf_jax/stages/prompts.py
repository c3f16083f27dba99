"""The prompts of an online stage: drawn at random from the prompt distribution."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from rlhf_jax.data import pipeline
from rlhf_jax.types import PromptBatch, TokenBatch


class PromptSource:
    """Prompts drawn at random, with replacement, from the prompt distribution: a function of key and step."""

    def __init__(self, pool: pipeline.Prompts, keys: tuple[PRNGKeyArray, ...], batch_size: int) -> None:
        """One key a seed. With one key a batch is [B, ...], with several [seeds, B, ...]."""
        self._pool, self._keys, self._rows = pool, keys, np.arange(batch_size, dtype=np.int32)
        self._draw = jax.jit(
            lambda key, step: jax.random.randint(
                jax.random.fold_in(key, step), (batch_size,), 0, len(pool.tokens), dtype=jnp.int32
            )
        )

    def __call__(self, step: int) -> PromptBatch:
        """The prompts of the iteration that follows `step` iterations."""
        batches = []
        for key in self._keys:
            drawn = np.asarray(self._draw(key, step))
            batches.append(PromptBatch(self._pool.tokens[drawn], self._pool.mask[drawn], self._rows))
        return batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


class MixedSource:
    """Prompts, and beside them demonstrations drawn at random, with replacement, by the same keys and steps."""

    def __init__(
        self, prompts: PromptSource, data: TokenBatch, keys: tuple[PRNGKeyArray, ...], batch_size: int
    ) -> None:
        """One key a seed, as the prompts' own."""
        self._prompts, self._data, self._keys = prompts, data, keys
        # Folded once more than the prompts' are, so that no key is used twice.
        self._draw = jax.jit(
            lambda key, step: jax.random.randint(
                jax.random.fold_in(jax.random.fold_in(key, step), 1), (batch_size,), 0, len(data.tokens), jnp.int32
            )
        )

    def __call__(self, step: int) -> tuple[PromptBatch, TokenBatch]:
        """The prompts and the demonstrations of the iteration that follows `step` iterations."""
        batches = []
        for key in self._keys:
            drawn = np.asarray(self._draw(key, step))
            batches.append(jax.tree.map(lambda leaf, rows=drawn: leaf[rows], self._data))
        mixed = batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        return self._prompts(step), mixed
