"""Every policy loss under every aggregation, against the papers' formulas written out response by response."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from rlhf_jax.core import policy_losses
from rlhf_jax.core.metrics import values
from rlhf_jax.core.policy_losses import AGGREGATIONS, POLICY_LOSSES
from tests.support.padded_arrays import ROWS, WIDTH, assert_padding_is_inert, normal, prefix_mask, row_lengths, seeds

LOW, HIGH, MOST = 0.1, 0.3, 9
CLIP = {"clip_ratio": LOW, "clip_ratio_high": HIGH, "dual_clip": math.inf}
TEMPERATURES = {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 2.5}
BOUNDS = CLIP | TEMPERATURES


def loss_of(name, aggregation):
    spec = POLICY_LOSSES[name]

    def loss(logprobs, old, advantages, mask):
        tokens = spec.function(logprobs, old, advantages, mask, **{bound: BOUNDS[bound] for bound in spec.options})
        return AGGREGATIONS[aggregation].reduce(tokens.losses, mask, max_tokens=MOST, axes=()), tokens.clipped

    return loss


evaluate = {
    (name, aggregation): jax.jit(jax.value_and_grad(loss_of(name, aggregation), has_aux=True))
    for name in POLICY_LOSSES
    for aggregation in AGGREGATIONS
}
PAIRS = [
    ("ppo", "token"),
    ("ppo", "constant"),
    ("sequence", "sequence"),
    ("gspo", "sequence"),
    ("cispo", "token"),
    ("sapo", "sequence"),
    ("reinforce", "sequence_sum"),
    ("reinforce", "sequence"),
]


def slow(name, aggregation, logprobs, old, advantages, lengths):
    """Loss, gradient and what was clipped, a token at a time."""
    logprobs, old, advantages = (np.asarray(x, np.float64) for x in (logprobs, old, advantages))
    tokens = sum(lengths)
    loss, grad, clipped = 0.0, np.zeros_like(logprobs), np.zeros(logprobs.shape, bool)
    for row, length in enumerate(lengths):
        share = {
            "token": 1 / max(tokens, 1),
            "sequence": 1 / (len(lengths) * max(length, 1)),
            "sequence_sum": 1 / len(lengths),
            "constant": 1 / (len(lengths) * MOST),
        }[aggregation]
        apart = logprobs[row, :length] - old[row, :length]
        for t in range(length):
            advantage = advantages[row, t]
            if name == "reinforce":
                loss += share * -advantage * logprobs[row, t]
                grad[row, t] += share * -advantage
                continue
            if name == "cispo":
                weight = min(np.exp(apart[t]), 1 + HIGH)
                clipped[row, t] = np.exp(apart[t]) > 1 + HIGH and advantage > 0
                loss += share * -weight * advantage * logprobs[row, t]
                grad[row, t] += share * -weight * advantage
                continue
            if name == "sapo":
                tau, ratio = (
                    TEMPERATURES["sapo_temperature_pos" if advantage > 0 else "sapo_temperature_neg"],
                    np.exp(apart[t]),
                )
                gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
                loss += share * -4 / tau * gate * advantage
                grad[row, t] += share * -4 * gate * (1 - gate) * ratio * advantage
                continue
            # What the ratio's logarithm is a sum over, and with which weight.
            which, weight = {
                "ppo": ([t], 1.0),
                "sequence": (range(length), 1.0),
                "gspo": (range(length), 1 / length),
            }[name]
            ratio = np.exp(weight * sum(apart[i] for i in which))
            bound = ratio > 1 + HIGH if advantage > 0 else ratio < 1 - LOW
            clipped[row, t] = bound
            limit = 1 + HIGH if advantage > 0 else 1 - LOW
            loss += share * -advantage * (limit if bound else ratio)
            for i in which:
                grad[row, i] += 0 if bound else share * -advantage * ratio * weight
    return loss, grad, clipped


def case(seed):
    old = -jnp.abs(normal(seed, ROWS, WIDTH))
    return old + 0.3 * normal(seed + 1, ROWS, WIDTH), old, normal(seed + 2, ROWS, WIDTH)


@pytest.mark.parametrize("name, aggregation", PAIRS)
@given(seed=seeds, lengths=row_lengths)
def test_losses_are_the_papers_formulas(name, aggregation, seed, lengths):
    arrays, mask = case(seed), prefix_mask(lengths)
    (loss, clipped), grad = evaluate[name, aggregation](*arrays, mask)
    expected, expected_grad, expected_clipped = slow(name, aggregation, *arrays, lengths)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(clipped & mask), expected_clipped)


@pytest.mark.parametrize("name, aggregation", PAIRS)
@given(seed=seeds, lengths=row_lengths)
def test_padding_is_inert(name, aggregation, seed, lengths):
    lengths[:2] = [WIDTH, 3]
    assert_padding_is_inert(evaluate_loss(name, aggregation), case(seed), prefix_mask(lengths), seed)


@functools.cache
def evaluate_loss(name, aggregation):
    return lambda *args: loss_of(name, aggregation)(*args)[0]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_the_policy_that_sampled_every_loss_has_the_policy_gradient(name):
    _, old, advantages = case(3)
    mask = prefix_mask([WIDTH, 3, 1, 0, 2])
    advantages = jnp.broadcast_to(advantages[:, :1], advantages.shape)  # one a response, as groups have it
    _, grad = evaluate[name, "sequence"](old, old, advantages, mask)
    lengths = np.maximum(np.asarray(mask).sum(axis=1, keepdims=True), 1)
    share = lengths if name == "sequence" else 1  # a product of ratios, not a mean of them
    expected = np.where(mask, -np.asarray(advantages) * share / lengths / ROWS, 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(seed=seeds, lengths=row_lengths)
def test_weighted_parts_make_the_whole(aggregation, seed, lengths):
    """A gradient-accumulating loss equals the loss of the whole batch; a plain mean over unequal parts does not."""
    function, weight = AGGREGATIONS[aggregation]
    x, mask = normal(seed, ROWS, WIDTH), prefix_mask(lengths)
    parts = [slice(0, 1), slice(1, 3), slice(3, ROWS)]
    values = [function(x[part], mask[part], max_tokens=MOST, axes=()) for part in parts]
    weights = [float(weight(mask[part], ())) for part in parts]
    whole = function(x, mask, max_tokens=MOST, axes=())
    np.testing.assert_allclose(np.dot(values, weights) / max(sum(weights), 1), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_aggregation_reads_no_padding(aggregation):
    x, mask = normal(0, ROWS, WIDTH), prefix_mask([WIDTH, 2, 1, 0, 3])
    function = jax.jit(lambda x: AGGREGATIONS[aggregation].reduce(x, mask, max_tokens=MOST, axes=()))
    assert function(jnp.where(mask, x, jnp.nan)) == function(jnp.where(mask, x, 0)) != 0


@pytest.mark.parametrize("name", ["ppo", "sequence", "gspo"])
@given(seed=seeds, lengths=row_lengths)
def test_a_second_clip_bounds_what_a_negative_advantage_can_do(name, seed, lengths):
    """Eq. 5 of Ye et al. 2020 as it stands: the greater of the clipped surrogate and c times the advantage."""
    logprobs, old, advantages = case(seed)
    logprobs, mask, c = old + 4 * (logprobs - old), prefix_mask(lengths), 1.5

    def losses(logprobs, dual_clip):
        tokens = POLICY_LOSSES[name].function(logprobs, old, advantages, mask, **CLIP | {"dual_clip": dual_clip})
        return jnp.sum(jnp.where(mask, tokens.losses, 0)), tokens

    (_, single), _ = jax.value_and_grad(losses, has_aux=True)(logprobs, math.inf)
    (_, double), gradient = jax.value_and_grad(losses, has_aux=True)(logprobs, c)
    expected = jnp.where(advantages < 0, jnp.minimum(single.losses, -c * advantages), single.losses)
    np.testing.assert_allclose(jnp.where(mask, double.losses, 0), jnp.where(mask, expected, 0), rtol=1e-5)
    bound = np.asarray(mask & (advantages < 0) & (single.losses > -c * advantages))
    np.testing.assert_array_equal(double.clipped & mask, (single.clipped & mask) | bound)
    if name == "ppo":
        np.testing.assert_array_equal(np.asarray(gradient)[bound], 0)


def test_some_ratios_reach_the_second_clip():
    """Else the test above would be of the first one alone."""
    old, mask = jnp.full((1, 2), -1.0), jnp.ones((1, 2), bool)
    for name in ("ppo", "sequence", "gspo"):
        tokens = POLICY_LOSSES[name].function(old + 1, old, 0 * old - 2, mask, **CLIP | {"dual_clip": 1.5})
        np.testing.assert_allclose(tokens.losses, 3.0)
        assert tokens.clipped.all()


def test_ratio_metrics_count_no_padding():
    logprobs, old, _ = case(0)
    mask = prefix_mask([WIDTH, 2, 1, 0, 3])
    clipped = jnp.ones(mask.shape, bool)
    metrics = values(policy_losses.ratio_metrics(logprobs, old, clipped & ~mask, mask, ()))
    assert metrics["policy/clipfrac_avg"] == 0
    assert policy_losses.ratio_metrics(logprobs, old, clipped, mask, ())["policy/clipfrac_avg"].value == 1
    filled = values(policy_losses.ratio_metrics(jnp.where(mask, logprobs, np.nan), old, clipped & ~mask, mask, ()))
    for name, value in metrics.items():
        np.testing.assert_array_equal(filled[name], value, err_msg=name)
