"""Rows of different lengths: what is padded, by hand."""

import numpy as np
import pytest

from rlhf_jax.data.ragged import Ragged, RaggedPairs, RaggedSequences, RowWidths, pair_table, widest
from rlhf_jax.types import Rollout

PROMPTS = Ragged.of([[5], [6, 7, 8], [9, 4]])
CHOSEN = RaggedSequences(PROMPTS, Ragged.of([[1, 2], [3], [4, 5, 6, 7]]))
REJECTED = RaggedSequences(PROMPTS, Ragged.of([[8, 8, 8, 8, 8, 8], [2], [1]]))


def test_rows_are_padded_on_the_right():
    tokens, mask = CHOSEN.responses.padded(np.array([2, 0, 2]), 5)
    np.testing.assert_array_equal(tokens, [[4, 5, 6, 7, 0], [1, 2, 0, 0, 0], [4, 5, 6, 7, 0]])
    np.testing.assert_array_equal(mask, tokens > 0)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    with pytest.raises(ValueError, match="a row of 4 tokens does not fit into 3"):
        CHOSEN.responses.padded(np.array([0, 2]), 3)
    taken = CHOSEN.responses.take(np.array([2, 1]))
    assert taken.values.tolist() == [4, 5, 6, 7, 3] and taken.ends.tolist() == [4, 5]


def test_prompt_and_response_are_one_row():
    rows = np.array([1, 2])
    batch = CHOSEN.padded(rows, rows, RowWidths(7, 4))
    np.testing.assert_array_equal(batch.tokens, [[6, 7, 8, 3, 0, 0, 0], [9, 4, 4, 5, 6, 7, 0]])
    np.testing.assert_array_equal(batch.mask, batch.tokens > 0)
    np.testing.assert_array_equal(batch.start, [3, 2])
    np.testing.assert_array_equal(batch.response, [[3, 0, 0, 0], [4, 5, 6, 7]])
    np.testing.assert_array_equal(batch.response_mask, batch.response > 0)
    assert CHOSEN.needed(rows, rows) == (6, 4) and CHOSEN.lengths.tolist() == [3, 4, 6]


def test_a_prompt_can_stand_before_the_response_to_another():
    batch = CHOSEN.padded(np.array([1, 2]), np.array([2, 0]), RowWidths(7, 4))
    np.testing.assert_array_equal(batch.tokens, [[6, 7, 8, 4, 5, 6, 7], [9, 4, 1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.start, [3, 2])
    assert CHOSEN.needed(np.array([1, 2]), np.array([2, 0])) == (7, 4)


def test_both_responses_of_a_pair_have_one_width():
    table = pair_table(RaggedPairs(CHOSEN, REJECTED))
    assert table.lengths.tolist() == [7, 4, 6] and table.longest == 7
    assert table.needed(np.array([0, 1])) == (7, 6) and table.needed(np.array([1, 2])) == (6, 4)
    batch = table.all()
    assert batch.chosen.tokens.shape == batch.rejected.tokens.shape == (3, 7)
    assert batch.rejected.response.shape == (3, 6)
    numbered = table.to(lambda batch, rows: (batch, rows)).padded(np.array([2]), RowWidths(8, 4))
    assert numbered[0].chosen.tokens.shape == (1, 8) and numbered[1].tolist() == [2]
    assert widest([RowWidths(3, 2), RowWidths(2, 9)]) == (3, 9)


def test_a_rollout_loses_its_padding():
    prompt, response = np.array([[0, 5], [6, 7]]), np.array([[1, 9], [2, 3]])
    rollout = Rollout(
        prompt, np.array([[False, True], [True, True]]), response, np.array([[True, False], [True, True]])
    )
    got = RaggedSequences.of_rollout(rollout)
    assert got.prompts.values.tolist() == [5, 6, 7] and got.responses.values.tolist() == [1, 2, 3]
    assert got.lengths.tolist() == [2, 4]
    with pytest.raises(ValueError, match="a prompt has no token"):
        RaggedSequences.of_rollout(rollout._replace(prompt_mask=np.zeros((2, 2), bool)))
