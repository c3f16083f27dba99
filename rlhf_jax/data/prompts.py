"""Prompts, drawn at random: those that a stage samples once, and those of every iteration of an online stage."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from rlhf_jax.data import pipeline
from rlhf_jax.types import PromptBatch, RlhfError, TokenBatch


def draw_prompts(pool: pipeline.Prompts, count: int, key: PRNGKeyArray, field: str) -> np.ndarray:
    """Draw the numbers of `count` different prompts of a split, at random: a file may be sorted.

    Raises RlhfError, naming the config's field, where there are fewer.
    """
    if count > len(pool.tokens):
        raise RlhfError(f"{field} = {count}: the data has only {len(pool.tokens)}")
    return np.asarray(jax.random.choice(key, len(pool.tokens), (count,), replace=False))


class PromptSource:
    """Prompts drawn at random, with replacement, from the prompt distribution: a function of key and step."""

    def __init__(
        self, pool: pipeline.Prompts, keys: tuple[PRNGKeyArray, ...], batch_size: int, *, rounds: int = 0
    ) -> None:
        """One key a seed. With one key a batch is [B, ...], with several [seeds, B, ...].

        Args: rounds is how many batches an iteration may need: there is then an axis of them after that of the rows,
        and no two rows of them have the same number. What a round draws does not depend on how many there are.
        """
        numbers = np.arange(max(rounds, 1) * batch_size, dtype=np.int32)
        self._pool, self._keys = pool, keys
        self._rows = numbers.reshape(rounds, batch_size).T if rounds else numbers
        self._draw = jax.jit(
            lambda key, step: jax.random.randint(
                jax.random.fold_in(key, step), numbers.shape, 0, len(pool.tokens), dtype=jnp.int32
            )
        )

    def __call__(self, step: int) -> PromptBatch:
        """The prompts of the iteration that follows `step` iterations."""
        batches = []
        for key in self._keys:
            drawn = np.asarray(self._draw(key, step))[self._rows]
            batches.append(PromptBatch(self._pool.tokens[drawn], self._pool.mask[drawn], self._rows))
        return batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def at_round(prompts: PromptBatch, number: int | Int[Array, ""]) -> PromptBatch:
    """The prompts of one round, [..., B, P], among those of all, [..., B, rounds, P]."""
    return PromptBatch(prompts.tokens[..., number, :], prompts.mask[..., number, :], prompts.rows[..., number])


class MixedSource:
    """Prompts, and beside them demonstrations drawn at random, with replacement, by the same keys and steps."""

    def __init__(
        self, prompts: PromptSource, data: TokenBatch, keys: tuple[PRNGKeyArray, ...], batch_size: int
    ) -> None:
        """One key a seed, other ones than the prompts'."""
        self._prompts, self._data, self._keys = prompts, data, keys
        self._draw = jax.jit(
            lambda key, step: jax.random.randint(
                jax.random.fold_in(key, step), (batch_size,), 0, len(data.tokens), jnp.int32
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
