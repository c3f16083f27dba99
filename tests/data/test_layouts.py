"""Layouts of packed batches: every token has a place of its own, in few rows, and devices hold whole groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.layouts import Groups, PackedSize, PackedSizes, best_fit_decreasing, layouts, packed_width
from rlhf_jax.types import TokenBatch

LENGTHS = st.lists(st.integers(0, 24), min_size=1, max_size=40)


@given(LENGTHS, st.integers(24, 60))
def test_sequences_do_not_overlap_and_few_rows_are_used(lengths, width):
    rows, offsets = best_fit_decreasing(np.array(lengths), width)
    positions = [
        row * width + offset + i for row, offset, n in zip(rows, offsets, lengths, strict=True) for i in range(n)
    ]
    assert len(set(positions)) == sum(lengths)
    assert np.all(offsets + lengths <= width)
    filled = np.bincount(rows, weights=lengths)
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > width  # two rows are never to be joined


def test_a_sequence_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit into 8"):
        best_fit_decreasing(np.array([3, 9]), 8)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_a_layout_names_the_sequence_of_every_token_and_the_tokens_that_are_read(devices, micro_batches, seed):
    rng = np.random.default_rng(seed)
    groups, count, length = Groups(devices, micro_batches), devices * micro_batches * 3, 6
    mask = np.arange(length) < rng.integers(1, length + 1, count)[:, None]
    read = mask & (rng.random(mask.shape) < 0.5)
    read[:, 0] = False
    (layout,) = layouts(TokenBatch(np.zeros(mask.shape, np.int32), mask, read), groups, 8)
    packing = layout.packing(layout.size._replace(rows=layout.size.rows + 1, read=layout.size.read + 2), 8)
    for group in range(devices * micro_batches):
        device, part = divmod(group, micro_batches)
        own = np.arange(count).reshape(devices, -1)[device][part::micro_batches]  # rows as micro-batches take them
        flat = packing.sequence[group].reshape(-1)
        assert np.sum(flat >= 0) == mask[own].sum()
        for number, row in enumerate(own):
            first = packing.first[group, number]
            assert np.all(flat[first : first + mask[row].sum()] == number)
        expected = np.flatnonzero(read[own][:, 1:])
        np.testing.assert_array_equal(packing.read[group][: len(expected)], expected)
        assert np.all(packing.read[group][len(expected) :] == -1)


@given(st.integers(1, 2000), st.integers(1, 5000), st.sampled_from([3, 6]))
def test_sizes_are_rounded_up_to_few(rows, read, per_doubling):
    rounded = PackedSize(rows, read).rounded(64, per_doubling=per_doubling)
    assert rows <= rounded.rows < rows * 2 ** (1 / per_doubling) + 1
    assert read <= rounded.read < read + 64 * rounded.rows / 4
    assert rounded.rounded(64, per_doubling=per_doubling) == rounded


def test_few_sizes_serve_many_batches():
    sizes = {PackedSize(rows, 1).rounded(64, per_doubling=3).rows for rows in range(1, 257)}
    assert len(sizes) <= 25 and max(sizes) == 256


NEEDED = st.lists(st.builds(PackedSize, st.integers(1, 200), st.integers(1, 4000)), min_size=1, max_size=30)


@given(NEEDED, st.integers(1, 5), st.builds(PackedSize, st.integers(1, 400), st.integers(1, 9000)))
def test_planned_sizes_are_few_and_hold_every_batch_that_was_planned_for(needed, most, other):
    sizes = PackedSizes.plan(needed, 64, most=most)
    assert 1 <= len(sizes.planned) <= most
    for size in needed:
        assert sizes.fit(size) in sizes.planned
    found = sizes.fit(other)  # planned or not
    assert found.rows >= other.rows and found.read >= other.read


def test_more_sizes_waste_fewer_rows_and_the_largest_has_some_to_spare():
    needed = [PackedSize(rows, 64 * rows) for rows in range(20, 60)]
    wasted = [
        sum(PackedSizes.plan(needed, 64, most=most).fit(size).rows - size.rows for size in needed) for most in (1, 2, 4)
    ]
    assert wasted[0] > wasted[1] > wasted[2]
    assert PackedSizes.plan(needed, 64, most=1).planned[0].rows >= 1.05 * 59


@pytest.mark.parametrize(
    ("longest", "sequences", "width"), [(8, 64, 64), (24, 64, 72), (32, 8, 64), (32, 7, 32), (240, 64, 240)]
)
def test_packed_rows_hold_several_short_sequences_of_a_large_group(longest, sequences, width):
    assert packed_width(longest, sequences) == width
