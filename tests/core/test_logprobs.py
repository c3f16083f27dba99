import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core import logprobs
from tests.support.padded_arrays import ROWS, WIDTH, assert_padding_is_inert, normal, prefix_mask, row_lengths, seeds

VOCABULARY = 9


def random_tokens(seed):
    return jnp.asarray(np.random.default_rng(seed).integers(VOCABULARY, size=(ROWS, WIDTH)), jnp.int32)


@given(seeds, st.sampled_from([0.1, 1.0, 30.0]))
def test_token_logprobs_and_entropy_are_those_of_the_softmax(seed, scale):
    logits, tokens = scale * normal(seed, ROWS, WIDTH, VOCABULARY), random_tokens(seed)
    exact = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    selected = np.take_along_axis(exact, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs.token_logprobs(logits, tokens), selected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        logprobs.entropy(logits), scipy.stats.entropy(np.exp(exact), axis=-1), rtol=1e-4, atol=1e-5
    )


def test_logits_far_from_zero_neither_overflow_nor_lose_the_differences():
    logits = jnp.asarray([[[0.0, 1.0, 2.0]]])
    for shift in (1e4, -1e4):
        for function in (lambda x: logprobs.token_logprobs(x, jnp.zeros((1, 1), jnp.int32)), logprobs.entropy):
            np.testing.assert_allclose(function(logits + shift), function(logits), rtol=1e-6)


def test_entropy_is_log_v_for_a_uniform_distribution_and_0_for_a_certain_token():
    np.testing.assert_allclose(logprobs.entropy(jnp.full((1, 2, 7), 3.0)), np.log(7), rtol=1e-6)
    certain = jnp.where(jnp.arange(4) == 2, 200.0, 0.0)[None, None, :]
    np.testing.assert_allclose(logprobs.entropy(certain), 0, atol=1e-6)


def test_tokens_ruled_out_by_a_finite_minimum_count_for_nothing():
    logits, tokens = normal(0, ROWS, WIDTH, VOCABULARY), jnp.zeros((ROWS, WIDTH), jnp.int32)
    allowed = jnp.arange(VOCABULARY)[None, None, :] < 4  # token 0 among them
    masked = jnp.where(allowed, logits, jnp.finfo(jnp.float32).min / 2)
    for function in (lambda x: logprobs.token_logprobs(x, tokens), logprobs.entropy):
        np.testing.assert_allclose(function(masked), function(logits[..., :4]), rtol=1e-5)
        gradient = jax.jit(jax.grad(lambda x, function=function: jnp.sum(function(x))))
        np.testing.assert_allclose(gradient(masked)[..., :4], gradient(logits[..., :4]), atol=1e-6)
        np.testing.assert_array_equal(gradient(masked)[..., 4:], 0)


def test_half_precision_logits_are_reduced_in_float32():
    logits, tokens = normal(0, ROWS, WIDTH, 1000).astype(jnp.bfloat16), random_tokens(0)
    for function in (lambda x: logprobs.token_logprobs(x, tokens), logprobs.entropy):
        assert function(logits).dtype == jnp.float32
        np.testing.assert_array_equal(function(logits), function(logits.astype(jnp.float32)))


@given(seeds)
def test_gradient_of_a_logprob_is_one_hot_minus_probabilities(seed):
    logits, tokens = normal(seed, ROWS, WIDTH, VOCABULARY), random_tokens(seed)
    grad = jax.grad(lambda x: jnp.sum(logprobs.token_logprobs(x, tokens)))(logits)
    expected = np.eye(VOCABULARY)[np.asarray(tokens)] - scipy.special.softmax(np.asarray(logits), axis=-1)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


@given(seeds)
def test_gradient_of_the_entropy(seed):
    logits = normal(seed, ROWS, WIDTH, VOCABULARY)
    p = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
    expected = -p * (np.log(p) + scipy.stats.entropy(p, axis=-1)[..., None])
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(logprobs.entropy(x)))(logits), expected, atol=1e-6)


@given(seeds, row_lengths)
def test_sequence_logprobs_sum_the_response_with_its_last_token(seed, lengths):
    x = normal(seed, ROWS, WIDTH)
    expected = [sum(np.asarray(x)[row, :length]) for row, length in enumerate(lengths)]
    np.testing.assert_allclose(logprobs.sequence_logprobs(x, prefix_mask(lengths)), expected, rtol=1e-5, atol=1e-6)


@given(seeds, row_lengths)
def test_cross_entropy_averages_over_tokens_not_rows(seed, lengths):
    lengths[:2] = [1, WIDTH]
    x, mask = normal(seed, ROWS, WIDTH), prefix_mask(lengths)
    np.testing.assert_allclose(
        logprobs.cross_entropy(x, mask, ()), -np.mean(np.asarray(x)[np.asarray(mask)]), rtol=1e-5, atol=1e-6
    )
    order = np.random.default_rng(seed).permutation(ROWS)
    permuted = logprobs.cross_entropy(x[order], mask[order], ())
    np.testing.assert_allclose(permuted, logprobs.cross_entropy(x, mask, ()), rtol=1e-5, atol=1e-6)


MASKED = {
    # The rows' sums, repeated along the rows, with the padding left out.
    "sequence_logprobs": lambda x, mask: jnp.where(mask, logprobs.sequence_logprobs(x, mask)[:, None], 0),
    "cross_entropy": lambda x, mask: logprobs.cross_entropy(x, mask, ()),
}


@pytest.mark.parametrize("function", MASKED.values(), ids=MASKED)
@given(seed=seeds, lengths=row_lengths)
def test_padding_is_inert(function, seed, lengths):
    assert_padding_is_inert(function, [normal(seed, ROWS, WIDTH)], prefix_mask(lengths), seed)
