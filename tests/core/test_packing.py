"""Moves between padded and packed rows: each entry arrives at its place, and its gradient comes back."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import packing
from rlhf_jax.data.layouts import Groups, layouts
from rlhf_jax.types import Sequences

WIDTH, LENGTH, RESPONSE, COUNT = 12, 7, 4, 8
RNG = np.random.default_rng(0)
PROMPTS, RESPONSES = RNG.integers(1, 4, COUNT), RNG.integers(1, RESPONSE + 1, COUNT)
MASK = np.arange(LENGTH) < (PROMPTS + RESPONSES)[:, None]
READ = np.arange(RESPONSE) < RESPONSES[:, None]
TOKENS = np.where(MASK, RNG.integers(1, 1000, MASK.shape), 0).astype(np.int32)
ANSWERS = np.where(READ, RNG.integers(1, 1000, READ.shape), 0).astype(np.int32)
START = PROMPTS.astype(np.int32)


def layout():
    (found,) = layouts(Sequences(TOKENS, MASK, START, ANSWERS, READ), Groups(2, 1), WIDTH)
    size = found.size._replace(rows=found.size.rows + 1, read=found.size.read + 3)
    return jax.tree.map(jnp.asarray, found.packing(size, WIDTH))


PACKING = layout()
ROWS = packing.packed_rows(jnp.asarray(TOKENS), PACKING)


def test_packed_rows_hold_every_token_once_with_its_index_in_the_sequence():
    for group in range(2):
        rows = slice(group * len(ROWS.mask) // 2, (group + 1) * len(ROWS.mask) // 2)
        mask, sequence, place = (np.asarray(x)[rows] for x in (ROWS.mask, ROWS.sequence, ROWS.place))
        tokens = np.asarray(ROWS.tokens)[rows]
        found = {(n, p): t for n, p, t in zip(sequence[mask], place[mask], tokens[mask], strict=True)}
        own = slice(4 * group, 4 * group + 4)
        expected = {(n, p): TOKENS[own][n, p] for n, p in np.argwhere(MASK[own])}
        assert found == expected and mask.sum() == len(expected)


def test_sums_and_last_tokens_are_those_of_the_sequences():
    x = ROWS.tokens.astype(jnp.float32)[..., None] * jnp.array([1.0, -2.0])[None, None]
    np.testing.assert_allclose(packing.sums(x, PACKING)[:, 0], np.where(MASK, TOKENS, 0).sum(axis=1))
    last = TOKENS[np.arange(COUNT), MASK.sum(axis=1) - 1]
    np.testing.assert_array_equal(packing.lasts(x, jnp.asarray(MASK), PACKING)[:, 1], -2 * last)


def test_predictors_are_the_positions_before_the_tokens_that_are_read():
    found = packing.predictors(ROWS.tokens.astype(jnp.float32), jnp.asarray(START), jnp.asarray(READ), PACKING)
    by_token = packing.by_token(found, jnp.asarray(READ), PACKING)
    for row, column in np.argwhere(READ):
        assert int(by_token[row, column]) == TOKENS[row, START[row] + column - 1]
    assert not np.any(np.asarray(by_token)[~READ])
    targets = packing.targets(jnp.asarray(ANSWERS), PACKING)
    np.testing.assert_array_equal(packing.by_token(targets, jnp.asarray(READ), PACKING), ANSWERS)


def test_gradients_are_those_of_indexing():
    weights = jnp.asarray(RNG.normal(size=READ.shape), jnp.float32)

    def by_moves(x):
        found = packing.predictors(x, jnp.asarray(START), jnp.asarray(READ), PACKING)
        numbers = packing.by_token(jnp.sum(found**2, axis=-1), jnp.asarray(READ), PACKING)
        whole = packing.sums(jnp.sin(x), PACKING), packing.lasts(x, jnp.asarray(MASK), PACKING)
        return jnp.sum(weights * numbers) + jnp.sum(whole[0] ** 2) + jnp.sum(whole[1] ** 3)

    def by_indices(x):
        flat, total = x.reshape(2, -1, 3), 0.0
        for row, first in enumerate(np.asarray(PACKING.first).reshape(-1)):
            own = flat[row // 4]
            tokens = own[first : first + MASK[row].sum()]
            total += jnp.sum(jnp.sum(jnp.sin(tokens), axis=0) ** 2) + jnp.sum(tokens[-1] ** 3)
            for token in range(RESPONSES[row]):
                total += weights[row, token] * jnp.sum(own[first + PROMPTS[row] + token - 1] ** 2)
        return total

    x = jnp.asarray(RNG.normal(size=(*ROWS.mask.shape, 3)), jnp.float32)
    ours, expected = (jax.value_and_grad(function)(x) for function in (by_moves, by_indices))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-5, atol=1e-6)


def test_a_row_has_the_entry_of_its_first_sequence():
    found = packing.first_in_rows(jnp.arange(COUNT), PACKING).reshape(2, -1)
    for group, rows in enumerate(np.asarray(PACKING.sequence)):
        for row, sequences in enumerate(rows):
            assert found[group, row] == 4 * group + max(sequences[0], 0)
