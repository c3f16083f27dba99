"""The choice of a token against the softmax: by count, and by an exact inverse of its distribution function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.sampling.choice import BLOCK, choose, row_uniforms

HIGHEST = np.float32(1 - 2**-24)  # the largest float32 below 1
VOCABULARIES = [5, BLOCK, BLOCK + 1, 3 * BLOCK - 7]


@functools.partial(jax.jit, static_argnums=2)
def chosen(logits, uniforms, temperature):
    return choose(logits, uniforms, temperature=temperature)


def draw_logits(vocab, seed=0):
    return np.random.default_rng(seed).normal(size=vocab).astype(np.float32)


def p_value(tokens, logits):
    """p-value of a chi-square test of tokens against softmax(logits), with tokens expected under 5 times pooled."""
    expected = len(tokens) * scipy.special.softmax(np.asarray(logits, np.float64))
    counts = np.bincount(tokens, minlength=len(expected))
    order = np.argsort(expected)
    group = np.empty(len(expected), int)
    _, group[order] = np.unique(np.cumsum(np.cumsum(expected[order]) > 5), return_inverse=True)
    return scipy.stats.chisquare(np.bincount(group, counts), np.bincount(group, expected)).pvalue


@pytest.mark.nightly_rest
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tokens_are_distributed_as_the_softmax(vocab, temperature):
    logits = 1.5 * draw_logits(vocab)
    uniforms = row_uniforms(jax.random.key(vocab), jnp.arange(4000), 25).ravel()
    tokens = chosen(np.broadcast_to(logits, (len(uniforms), vocab)), uniforms, temperature)
    assert p_value(tokens, logits / temperature) > 0.01
    # The test has the power to tell what is nearly right.
    assert p_value(tokens, logits / (1.1 * temperature)) < 1e-6
    assert p_value(tokens, np.roll(logits, 1) / temperature) < 1e-6


@given(st.integers(0, 2**32 - 1), st.sampled_from(VOCABULARIES), st.sampled_from([0.3, 1.0]))
def test_inverts_the_distribution_function(seed, vocab, temperature):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(200, vocab)).astype(np.float32)
    uniforms = rng.random(200, np.float32)
    ends = np.cumsum(scipy.special.softmax(logits.astype(np.float64) / temperature, axis=1), axis=1)
    tokens = np.asarray(chosen(logits, uniforms, temperature), int)
    rows = np.arange(200)
    starts = np.where(tokens > 0, ends[rows, tokens - 1], 0)
    assert np.all(starts - 1e-6 <= uniforms) and np.all(uniforms <= ends[rows, tokens] + 1e-6)


@pytest.mark.parametrize("cumsum", [jnp.cumsum, functools.partial(jax.lax.associative_scan, jnp.add)], ids=["", "tree"])
def test_a_token_of_probability_0_is_never_chosen(monkeypatch, cumsum):
    """Not at either end of the uniforms, nor where they fall between two tokens, however the running sum is rounded."""
    monkeypatch.setattr(jnp, "cumsum", cumsum)
    rows, vocab = 4000, 2 * BLOCK + 3
    rng = np.random.default_rng(0)
    logits = np.log(rng.gamma(0.3, size=(rows, vocab))).astype(np.float32)
    ruled_out = rng.random((rows, vocab)) < 0.6
    ruled_out[: rows // 4, BLOCK : 2 * BLOCK] = True  # a whole block between two others
    ruled_out[rows // 4 : rows // 2, -5:] = True  # the end
    ruled_out[rows // 2 : rows // 2 + 100, :BLOCK] = True  # the start
    ruled_out[:, 7] = False
    logits[ruled_out] = np.finfo(np.float32).min / 2
    masses = np.exp(logits - logits.max(axis=1, keepdims=True))
    ends = np.cumsum(masses, axis=1, dtype=np.float32)
    choice = jax.jit(functools.partial(choose, temperature=1.0))
    assert np.all(masses[~ruled_out] > 0)
    for _ in range(20):
        borders = ends[np.arange(rows), rng.integers(vocab, size=rows)] / ends[:, -1]
        near = np.clip(borders + rng.integers(-2, 3, rows) * 2**-24, 0, HIGHEST)
        for uniforms in (near.astype(np.float32), np.zeros(rows, np.float32), np.full(rows, HIGHEST)):
            tokens = np.asarray(choice(logits, uniforms))
            assert not np.any(ruled_out[np.arange(rows), tokens])


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_ends_of_the_uniforms_choose_the_first_and_the_last_possible_token(vocab):
    logits = np.full((2, vocab), np.finfo(np.float32).min / 2, np.float32)
    logits[:, [1, vocab - 2]] = 0.0
    np.testing.assert_array_equal(chosen(logits, np.array([0, HIGHEST]), 1.0), [1, vocab - 2])


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_low_temperature_chooses_the_most_likely_token(vocab):
    logits = np.random.default_rng(0).permuted(np.tile(np.linspace(-3, 3, vocab, dtype=np.float32), (500, 1)), axis=1)
    uniforms = np.random.default_rng(1).random(500, np.float32)
    uniforms[:2] = 0, HIGHEST
    np.testing.assert_array_equal(chosen(logits, uniforms, 1e-4), logits.argmax(axis=1))


def test_logits_far_from_0_neither_overflow_nor_choose_another_token():
    near = np.round(4 * draw_logits(BLOCK + 1))  # whole numbers, which lose nothing far from 0
    uniforms = np.linspace(0, HIGHEST, 100, dtype=np.float32)
    expected = np.asarray(chosen(np.broadcast_to(near, (100, len(near))), uniforms, 1.0))
    assert len(np.unique(expected)) > 5
    for shift in (1e4, -1e4):
        far = np.broadcast_to(near + np.float32(shift), (100, len(near)))
        np.testing.assert_array_equal(chosen(far, uniforms, 1.0), expected)


def test_uniforms_are_fixed_by_key_row_and_position_and_are_uniform():
    key = jax.random.key(0)
    uniforms = np.asarray(row_uniforms(key, jnp.arange(1000), 20))
    np.testing.assert_array_equal(row_uniforms(key, jnp.asarray([7, 3, 7]), 5), uniforms[[7, 3, 7], :5])
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert len(np.unique(uniforms)) > 0.99 * uniforms.size  # of 2^23 numbers, about a thousandth are drawn twice
    assert scipy.stats.kstest(uniforms.ravel(), "uniform").pvalue > 0.01
    for sums in (uniforms.sum(axis=1) / 20, uniforms.sum(axis=0) / 1000):  # neither rows nor positions hang together
        count = uniforms.size / len(sums)
        assert 0.5 < np.var(sums) * 12 * count < 2
    assert not np.any(uniforms == np.asarray(row_uniforms(jax.random.key(1), jnp.arange(1000), 20)))
