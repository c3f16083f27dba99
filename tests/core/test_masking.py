import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import masking
from tests.support.padded_arrays import (
    ROWS,
    WIDTH,
    assert_padding_is_inert,
    normal,
    prefix_mask,
    random_mask,
    row_lengths,
    seeds,
)


def test_total_sums_every_element():
    assert masking.total(jnp.arange(6).reshape(2, 3), ()) == 15
    assert masking.total(jnp.full((2, 2), 0.25), ()) == 1


def test_count_is_how_many_entries_are_true():
    counted = masking.count(jnp.asarray([[True, False], [True, True]]), ())
    assert counted == 3
    assert counted.dtype == jnp.int32


def test_a_share_is_of_all_entries():
    assert masking.share(jnp.asarray([[True, False], [True, True]]), ()) == 0.75


@given(seeds)
def test_mean_and_variance_are_those_of_the_selected_entries(seed):
    x, mask = normal(seed, ROWS, WIDTH), random_mask(seed)
    selected = np.asarray(x)[mask]
    np.testing.assert_allclose(masking.masked_mean(x, mask, ()), np.mean(selected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masking.masked_variance(x, mask, ()), np.var(selected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masking.mean(x, ()), np.mean(x), rtol=1e-5, atol=1e-6)


def test_variance_survives_a_large_mean():
    x = normal(0, 1, 100) + 1e3
    variance = masking.masked_variance(x, jnp.ones_like(x, bool), ())
    np.testing.assert_allclose(variance, np.var(np.asarray(x, np.float64)), rtol=1e-4)


def test_an_empty_mask_gives_zeros_and_no_nan():
    x, mask = jnp.full((2, 3), 5.0), jnp.zeros((2, 3), bool)
    for function in (masking.masked_mean, masking.masked_variance):
        value, grad = jax.value_and_grad(function)(x, mask, ())
        assert value == 0
        np.testing.assert_array_equal(grad, 0)
    np.testing.assert_array_equal(masking.whiten(x, mask, ()), 0)


def test_a_nan_in_the_padding_stays_there_outside_jit_too():
    # Inside, the compiler turns a product with a mask into a selection.
    x, mask = jnp.asarray([[1.0, 3.0, jnp.nan]]), jnp.asarray([[True, True, False]])
    assert masking.masked_mean(x, mask, ()) == 2
    assert masking.masked_variance(x, mask, ()) == 1
    np.testing.assert_allclose(masking.whiten(x, mask, ()), [[-1, 1, 0]], rtol=1e-6)


MASKED = {
    "masked_mean": lambda x, mask: masking.masked_mean(x, mask, ()),
    "masked_variance": lambda x, mask: masking.masked_variance(x, mask, ()),
    "whiten": lambda x, mask: masking.whiten(x, mask, ()),
}


@pytest.mark.parametrize("function", MASKED.values(), ids=MASKED)
@given(seed=seeds, lengths=row_lengths)
def test_padding_is_inert(function, seed, lengths):
    lengths[:2] = [WIDTH, 3]  # whitening one number, or none, amplifies rounding
    assert_padding_is_inert(function, [normal(seed, ROWS, WIDTH)], prefix_mask(lengths), seed)


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_whitening_gives_mean_0_and_variance_1_whatever_scale_and_shift_were(seed, scale, shift):
    x, mask = normal(seed, ROWS, WIDTH), random_mask(seed)
    white = np.asarray(masking.whiten(x, mask, ()))
    np.testing.assert_allclose(np.mean(white[mask]), 0, atol=1e-5)
    np.testing.assert_allclose(np.mean(white[mask] ** 2), 1, rtol=1e-4)  # the count divides, not the count less one
    assert not np.any(white[~mask])
    np.testing.assert_allclose(masking.whiten(scale * x + shift, mask, ()), white, rtol=1e-3, atol=1e-3)


def test_whitening_a_constant_gives_zeros():
    np.testing.assert_array_equal(masking.whiten(jnp.full((2, 3), 4.0), jnp.ones((2, 3), bool), ()), 0)


@given(seeds, row_lengths)
def test_a_score_lands_on_the_last_token_and_nowhere_on_empty_rows(seed, lengths):
    scores = normal(seed, ROWS) + 3
    expected = np.zeros((ROWS, WIDTH), np.float32)
    for row, length in enumerate(lengths):
        if length:
            expected[row, length - 1] = scores[row]
    np.testing.assert_array_equal(masking.at_last_token(scores, prefix_mask(lengths)), expected)


@given(row_lengths)
def test_lengths_count_the_tokens_of_each_row(lengths):
    counted = masking.lengths(prefix_mask(lengths))
    np.testing.assert_array_equal(counted, lengths)
    assert counted.dtype == jnp.int32


def test_one_device_gathers_nothing_and_owns_every_row():
    tree = {"a": jnp.arange(6), "b": (jnp.ones((2, 3)),)}
    jax.tree.map(np.testing.assert_array_equal, masking.gather_rows(tree, ()), tree)
    np.testing.assert_array_equal(masking.local_rows(jnp.arange(5), ()), np.arange(5))
