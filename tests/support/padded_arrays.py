"""Random batches with uneven masks, and the property that every masked function has."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from rlhf_jax.core.metrics import Metric, values
from rlhf_jax.core.policy_losses import AGGREGATIONS, POLICY_LOSSES, ratio_metrics

ROWS, WIDTH = 5, 6
seeds = st.integers(0, 2**32 - 1)
row_lengths = st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS)  # empty and full rows among them


def prefix_mask(lengths: Sequence[int], width: int = WIDTH) -> jax.Array:
    return jnp.asarray(np.arange(width)[None, :] < np.asarray(lengths)[:, None])


def random_mask(seed: int) -> jax.Array:
    """At least three tokens in the first row, and any elsewhere."""
    mask = np.random.default_rng(seed).random((ROWS, WIDTH)) < 0.6
    mask[0, :3] = True
    return jnp.asarray(mask)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ppo_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    response_mask: jax.Array,
    *,
    clip_ratio: float,
    axes: tuple[str, ...],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's loss and metrics of the policy, put together of the parts that training puts together."""
    tokens = POLICY_LOSSES["ppo"].function(
        logprobs,
        old_logprobs,
        advantages,
        response_mask,
        clip_ratio=clip_ratio,
        clip_ratio_high=clip_ratio,
        dual_clip=math.inf,
    )
    loss = AGGREGATIONS["token"].reduce(tokens.losses, response_mask, max_tokens=WIDTH, axes=axes)
    return loss, values(ratio_metrics(logprobs, old_logprobs, tokens.clipped, response_mask, axes))


def with_values(function: Callable[..., tuple[jax.Array, dict[str, Metric]]]) -> Callable[..., tuple]:
    """The loss, and the values of its metrics."""

    @functools.wraps(function)
    def loss_and_values(*args, **kwargs):
        loss, metrics = function(*args, **kwargs)
        return loss, values(metrics)

    return loss_and_values


@functools.cache  # one compilation for all examples
def _weighted_sum_and_gradients(function: Callable[..., jax.Array], count: int) -> Callable[..., tuple]:
    def scalar(weights, mask, *arrays):
        out = function(*arrays, mask)
        return jnp.sum(out * weights) if out.ndim else out

    return jax.jit(jax.value_and_grad(scalar, argnums=tuple(range(2, 2 + count))))


def assert_padding_is_inert(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array], mask: jax.Array, seed: int
) -> None:
    """Neither what stands in the padding nor how wide it is changes `function(*arrays, mask)` or its gradients.

    The function is one object for all examples. It returns a scalar, or one number a token: then all are summed with
    random weights, other ones in the padding.
    """
    evaluate = _weighted_sum_and_gradients(function, len(arrays))
    weights = normal(seed, *mask.shape)
    value, grads = evaluate(weights, mask, *arrays)
    assert np.isfinite(value)
    for grad in grads:
        assert np.all(np.isfinite(grad))
        assert not np.any(np.asarray(grad)[~mask])

    for filling in (1e6, -1e6, np.inf, np.nan):
        filled = [jnp.where(mask, array, filling) for array in arrays]
        filled_value, filled_grads = evaluate(jnp.where(mask, weights, 7), mask, *filled)
        np.testing.assert_array_equal(filled_value, value, err_msg=f"padding filled with {filling}")
        for got, expected in zip(filled_grads, grads, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=f"padding filled with {filling}")

    def widen(array, filling):
        return jnp.pad(array, ((0, 0), (0, 3)), constant_values=filling)

    wide_value, wide_grads = evaluate(widen(weights, 1), widen(mask, False), *(widen(array, 1e6) for array in arrays))
    np.testing.assert_allclose(wide_value, value, rtol=1e-5, atol=1e-6)
    for got, expected in zip(wide_grads, grads, strict=True):
        np.testing.assert_allclose(got, widen(expected, 0), rtol=1e-5, atol=1e-6)
