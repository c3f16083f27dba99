"""Batches are a function of seed and step, with every row once an epoch, and are padded to few widths."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.batching import LEAST, BatchOrder, Buckets, halved
from rlhf_jax.data.ragged import RowWidths
from rlhf_jax.types import RlhfError


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (12, 12), (13, 4), (1, 1), (1000, 8)])
def test_every_epoch_has_every_row_once_and_in_another_order(count, batch_size):
    batches = BatchOrder(count, batch_size, seed=0)
    per_epoch = count // batch_size
    epochs = []
    for epoch in range(5):
        steps = [batches[epoch * per_epoch + i] for i in range(per_epoch)]
        assert all(rows.shape == (batch_size,) for rows in steps)
        epochs.append(np.concatenate(steps))
        assert len(set(epochs[-1].tolist())) == per_epoch * batch_size  # rows that do not fill a batch are left out
    if count > 1:
        assert len({tuple(epoch) for epoch in epochs}) == 5
        assert not np.array_equal(np.sort(epochs[0]), epochs[0])
    left_out = set(range(count)) - set(np.concatenate(epochs).tolist())
    assert not left_out or count == 13  # other rows are left out each time


def test_a_batch_is_a_function_of_seed_and_step_alone():
    in_order = [BatchOrder(1000, 8, seed=0)[step] for step in range(300)]
    again = BatchOrder(1000, 8, seed=0)
    for step in np.random.default_rng(0).permutation(300):  # as after a restart
        np.testing.assert_array_equal(again[int(step)], in_order[step])
    assert len(again[10**9]) == 8  # endless
    other = BatchOrder(1000, 8, seed=1)
    assert not any(np.array_equal(other[step], in_order[step]) for step in range(3))


def test_too_few_rows_for_one_batch_are_an_error():
    with pytest.raises(RlhfError, match="3 training rows do not fill one batch of 4"):
        BatchOrder(3, 4, seed=0)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 4))
def test_the_widths_have_the_least_padding_of_all(lengths, most):
    widths = Buckets.best(np.array(lengths), most).widths
    assert list(widths) == sorted(set(widths)) and len(widths) <= most
    possible = sorted({max(-(-n // 8) * 8, min(LEAST, -(-max(lengths) // 8) * 8)) for n in lengths})
    assert set(widths) <= set(possible) and widths[-1] == possible[-1]

    def positions(widths):
        return sum(min(width for width in widths if width >= n) for n in lengths)

    every = (c for k in range(1, most + 1) for c in itertools.combinations(possible, k) if c[-1] == possible[-1])
    assert positions(widths) == min(map(positions, every))


def test_a_batch_gets_the_next_width_and_its_responses_a_half_that_holds_them():
    buckets = Buckets((64, 160))
    assert buckets.fit(RowWidths(64, 40)) == (64, 64) and buckets.fit(RowWidths(64, 32)) == (64, 32)
    assert buckets.fit(RowWidths(65, 41)) == (160, 80) and buckets.fit(RowWidths(160, 3)) == (160, 40)
    assert halved(40, 5) == 40 and halved(64, 5) == LEAST
