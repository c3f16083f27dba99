"""Top-k, top-p and min-p against slow ones, and the log-probabilities that come with a drawn token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.sampling.choice import Sampling, draw, keep_likely, row_uniforms

VOCAB = 37
PLAIN = Sampling(1, 1.0, ())
FILTERS = {
    "top_k": {"top_k": 5},
    "top_k of all": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.05},
}


def replaced(fields: dict[str, Any]) -> Sampling:
    return dataclasses.replace(PLAIN, **fields)


def slow_kept(logits, sampling):
    """The tokens left, by sorting and adding up, as transformers' processors do."""
    left = {i: float(x) for i, x in enumerate(logits)}

    def probabilities():
        total = sum(np.exp(x) for x in left.values())
        return {i: np.exp(x) / total for i, x in left.items()}

    if sampling.top_k is not None:
        left = {i: left[i] for i in sorted(left, key=lambda i: -left[i])[: sampling.top_k]}
    if sampling.top_p is not None:
        p, total, kept = probabilities(), 0.0, []
        for i in sorted(left, key=lambda i: -left[i]):
            if total >= sampling.top_p:
                break
            kept.append(i)
            total += p[i]
        left = {i: left[i] for i in kept}
    if sampling.min_p is not None:
        p = probabilities()
        left = {i: left[i] for i in left if p[i] >= sampling.min_p * max(p.values())}
    return set(left)


@functools.partial(jax.jit, static_argnums=1)
def kept(logits, sampling):
    return keep_likely(logits, sampling)


@pytest.mark.parametrize("fields", FILTERS.values(), ids=FILTERS)
@given(seed=st.integers(0, 2**32 - 1))
def test_filters_keep_what_slow_ones_keep(fields, seed):
    sampling = dataclasses.replace(PLAIN, **fields)
    logits = 3 * np.random.default_rng(seed).normal(size=(20, VOCAB)).astype(np.float32)
    got = np.asarray(kept(logits, sampling))
    for row, out in zip(logits, got, strict=True):
        assert set(np.flatnonzero(np.isfinite(out))) == slow_kept(row, sampling)
        np.testing.assert_array_equal(out[np.isfinite(out)], row[np.isfinite(out)])


def test_the_most_likely_token_always_stays_and_equals_stay_together():
    logits = jnp.array([[5.0, 0.0, 0.0, -1.0], [1.0, 1.0, 1.0, 0.0]])
    for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        finite = np.isfinite(kept(logits, replaced(fields)))
        np.testing.assert_array_equal(finite, [[True, False, False, False], [True, True, True, False]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("fields", [{}, *FILTERS.values()], ids=["none", *FILTERS])
def test_log_probabilities_are_those_of_the_distribution_drawn_from_and_of_the_model(fields, temperature):
    sampling = dataclasses.replace(replaced(fields), temperature=temperature)
    rows = 12_000
    logits = 1.5 * np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)
    uniforms = row_uniforms(jax.random.key(0), jnp.arange(rows), 1)[:, 0]
    function = jax.jit(functools.partial(draw, sampling=sampling))
    token, logprob, model = map(np.asarray, function(jnp.tile(logits, (rows, 1)), uniforms))
    own = scipy.special.log_softmax(np.asarray(kept(logits[None] / np.float32(temperature), sampling))[0])
    np.testing.assert_allclose(logprob, own[token], atol=1e-5)
    np.testing.assert_allclose(model, scipy.special.log_softmax(logits)[token], atol=1e-5)
    frequency = np.bincount(token, minlength=VOCAB) / rows
    assert not np.any(frequency[~np.isfinite(own)])
    error = np.sqrt(np.exp(own) * (1 - np.exp(own)) / rows)
    assert np.all(np.abs(frequency - np.exp(own)) < 5 * error + 1e-9)


def test_temperature_0_takes_the_most_likely():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(8, VOCAB)), jnp.float32)
    token, logprob, model = draw(logits, jnp.full(8, 0.999), Sampling(1, 0.0, ()))
    np.testing.assert_array_equal(token, np.argmax(logits, axis=-1))
    assert not np.any(logprob) and np.all(np.asarray(model) < 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0 must be at least 0"),
        ({"top_k": 0}, "top_k = 0 must be at least 1"),
        ({"top_p": 0.0}, "top_p = 0.0 must be above 0"),
        ({"min_p": 1.5}, "min_p = 1.5 must be above 0 and at most 1"),
    ],
)
def test_what_is_no_distribution_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **fields)
