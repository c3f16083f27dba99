"""Weights for samples of another program, against their definition a token and a response at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from rlhf_jax.core import importance
from rlhf_jax.core.metrics import values
from tests.support.padded_arrays import ROWS, WIDTH, normal, prefix_mask, row_lengths, seeds


def case(seed):
    sampler = -jnp.abs(normal(seed, ROWS, WIDTH))
    return sampler + 0.3 * normal(seed + 1, ROWS, WIDTH), sampler


WEIGHED = {
    "token_truncate": lambda ratio, cap, floor: min(max(ratio, floor), cap),
    "token_mask": lambda ratio, cap, floor: ratio if floor <= ratio <= cap else 0.0,
}
WEIGHED |= {name.replace("token", "sequence"): function for name, function in WEIGHED.items()}


@pytest.mark.parametrize("name", importance.WEIGHTS)
@given(seed=seeds, lengths=row_lengths)
def test_importance_weights_are_truncated_or_masked_a_token_or_a_response_at_a_time(name, seed, lengths):
    (logprobs, sampler), mask, cap, floor = case(seed), prefix_mask(lengths), 1.2, 0.7
    filled = [jnp.where(mask, x, jnp.nan) for x in (logprobs, sampler)]
    got = importance.WEIGHTS[name](*filled, mask, cap=cap, floor=floor)
    assert np.isfinite(got).all()
    for row, length in enumerate(lengths):
        apart = np.asarray(logprobs, np.float64)[row, :length] - np.asarray(sampler, np.float64)[row, :length]
        ratios = np.exp(apart if name.startswith("token") else np.full(length, apart.sum()))
        expected = [WEIGHED[name](ratio, cap, floor) for ratio in ratios]
        np.testing.assert_allclose(got[row, :length], expected, rtol=1e-5)
    if np.asarray(mask).any():
        metrics = values(importance.weight_metrics(jnp.where(mask, got, jnp.nan), mask, ()))
        inside = np.asarray(got)[np.asarray(mask)]
        np.testing.assert_allclose(list(metrics.values()), [inside.min(), inside.mean(), inside.max()], rtol=1e-5)


@pytest.mark.parametrize("name", importance.WEIGHTS)
def test_importance_weights_of_far_programs_are_finite(name):
    x, mask = jnp.array([[92.0, 1e4], [-92.0, -1e4]]), jnp.ones((2, 2), bool)
    weights = importance.WEIGHTS[name](x, 0 * x, mask, cap=3.0, floor=0.0)
    np.testing.assert_allclose(weights, [[3.0 * name.endswith("truncate")] * 2, [0, 0]], atol=1e-30)


def test_the_samplers_difference_is_of_either_sign_and_of_no_padding():
    logprobs, old = case(0)
    mask = prefix_mask([WIDTH, 2, 1, 0, 3])
    expected = np.abs(np.asarray(logprobs) - np.asarray(old))[np.asarray(mask)]
    for sign in (1, -1):
        first, second = (jnp.where(mask, x, jnp.nan) for x in (logprobs, old)[::sign])
        found = values(importance.sampler_difference(first, second, mask, ()))
        np.testing.assert_allclose(list(found.values()), [expected.mean(), expected.max()], rtol=1e-6)
