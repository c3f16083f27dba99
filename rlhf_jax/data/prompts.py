"""Random prompts: a sample without replacement for offline stages, and a batch per iteration for online stages."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from rlhf_jax.data import pipeline
from rlhf_jax.data.ragged import Table
from rlhf_jax.types import A, PromptBatch, RlhfError, TokenBatch


def draw_prompts(pool: pipeline.Prompts, count: int, key: PRNGKeyArray, field: str) -> np.ndarray:
    """Draw the indices of `count` prompts of a split at random without replacement (files may be sorted).

    Raises RlhfError, naming the config field, if the split has fewer.
    """
    if count > len(pool.tokens):
        raise RlhfError(f"{field} = {count}: the data has only {len(pool.tokens)} prompts")
    return np.asarray(jax.random.choice(key, len(pool.tokens), (count,), replace=False))


class PromptSource:
    """Prompts drawn at random with replacement, as a function of key and step."""

    def __init__(
        self, pool: pipeline.Prompts, keys: tuple[PRNGKeyArray, ...], batch_size: int, *, rounds: int = 0
    ) -> None:
        """Create a source with one key per seed. With one key a batch is [B, ...], with several [seeds, B, ...].

        Args: rounds is the maximum number of batches per iteration. If it is positive, batches have an axis of rounds
        after the rows, and all rows of all rounds have different numbers. A round's prompts do not depend on the
        number of rounds.
        """
        numbers = np.arange(max(rounds, 1) * batch_size, dtype=np.int32)
        self._pool, self._keys = pool, keys
        self._rows = numbers.reshape(rounds, batch_size).T if rounds else numbers
        self._draw = jax.jit(
            lambda key, step: jax.random.randint(
                jax.random.fold_in(key, step), numbers.shape, 0, len(pool.tokens), dtype=jnp.int32
            )
        )

    def __call__(self, step: int) -> PromptBatch[np.ndarray]:
        """Draw the prompts of iteration `step`, counted from 0."""
        batches: list[PromptBatch[np.ndarray]] = []
        for key in self._keys:
            drawn = np.asarray(self._draw(key, step))[self._rows]
            batches.append(PromptBatch(self._pool.tokens[drawn], self._pool.mask[drawn], self._rows))
        return batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def at_round(prompts: PromptBatch[A], number: int | Int[Array, ""]) -> PromptBatch[A]:
    """Select the prompts of one round, [..., B, P], from all rounds, [..., B, rounds, P]."""
    row, token = (..., number), (..., number, slice(None))
    return jax.tree.map(lambda leaf, place: leaf[place], prompts, PromptBatch._make([token, token, row]))


class DemonstrationSource:
    """Demonstrations drawn at random with replacement, as a function of key and step."""

    def __init__(self, data: Table[TokenBatch[np.ndarray]], keys: tuple[PRNGKeyArray, ...], batch_size: int) -> None:
        """Create a source with one key per seed. With one key a batch is [B, ...], with several [seeds, B, ...]."""
        self._data, self._keys = data, keys
        self._widths = data.needed(np.arange(len(data.lengths)))
        self._draw = jax.jit(
            lambda key, step: jax.random.randint(
                jax.random.fold_in(key, step), (batch_size,), 0, len(data.lengths), jnp.int32
            )
        )

    def __call__(self, step: int) -> TokenBatch[np.ndarray]:
        """Draw the demonstrations of iteration `step`, counted from 0."""
        batches = [self._data.padded(np.asarray(self._draw(key, step)), self._widths) for key in self._keys]
        return batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
