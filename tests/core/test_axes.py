"""Rows split over eight devices give the numbers, and the gradients, of one device that holds them all."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.core import advantages, importance, logprobs, masking, policy_losses, reward_losses, unpaired_losses
from rlhf_jax.core.metrics import Metric, values
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from tests.support.padded_arrays import normal, ppo_loss, prefix_mask
from tests.support.pairs import loss_of

DEVICES, B, T = 8, 16, 5
# Means of means would differ: devices hold between no token at all (the fourth) and ten.
MASK = prefix_mask([5, 5, 1, 0, 3, 2, 0, 0, 4, 1, 5, 0, 2, 2, 1, 1], T)
A, B_, C = (normal(seed, B, T) for seed in range(3))
SCORES = normal(3, B, 4)


def with_metrics(result: tuple[jax.Array, dict[str, Metric]]) -> dict[str, jax.Array]:
    loss, metrics = result
    return {"loss": loss, **values(metrics)}


# Two sort the rows of all devices, one takes z-scores over them, and one divides by their mean number of tokens.
MIXTURE = PreferenceLossConfig(
    losses=("aot", "aot_unpaired", "alpha_dpo", "sft", "sigmoid"), loss_weights=(1.0, 0.7, 0.5, 0.1, 0.4)
)


def preference_loss(s: jax.Array, theta: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, dict[str, Metric]]:
    tokens = jnp.abs(10 * s).astype(jnp.int32)
    logps = s[:, 0] * theta[0, 0], s[:, 1], s[:, 2], s[:, 3]
    return loss_of(MIXTURE, logps, (tokens[:, 0], tokens[:, 1]), beta=0.3, axes=axes)


# theta, the rows' arrays, axes -> a scalar, or several by name.
FUNCTIONS: dict[str, Callable] = {
    "total": lambda theta, a, b, c, mask, s, axes: masking.total(jnp.square(a * theta), axes),
    "mean": lambda theta, a, b, c, mask, s, axes: masking.mean(jnp.square(a * theta), axes),
    "masked_mean": lambda theta, a, b, c, mask, s, axes: masking.masked_mean(a * theta, mask, axes),
    "masked_variance": lambda theta, a, b, c, mask, s, axes: masking.masked_variance(a * theta, mask, axes),
    "whiten": lambda theta, a, b, c, mask, s, axes: masking.total(b * masking.whiten(a * theta, mask, axes), axes),
    "cross_entropy": lambda theta, a, b, c, mask, s, axes: logprobs.cross_entropy(a * theta, mask, axes),
    "policy_loss": lambda theta, a, b, c, mask, s, axes: (
        {"loss": ppo_loss(a * theta, a + 0.3 * b, c, mask, clip_ratio=0.2, axes=axes)[0]}
        | ppo_loss(a * theta, a + 0.3 * b, c, mask, clip_ratio=0.2, axes=axes)[1]
        | values(importance.sampler_difference(a * theta, b, mask, axes))
    ),
    "value_loss": lambda theta, a, b, c, mask, s, axes: with_metrics(
        policy_losses.value_loss(a * theta, a + 0.3 * b, c, mask, clip_range=0.2, axes=axes)
    ),
    "gspo": lambda theta, a, b, c, mask, s, axes: policy_losses.sequence_mean(
        policy_losses.gspo(a * theta, a + 0.3 * b, c, mask, clip_ratio=0.2, clip_ratio_high=0.3, dual_clip=3.0).losses,
        mask,
        max_tokens=T,
        axes=axes,
    ),
    "reinforce_plus_plus": lambda theta, a, b, c, mask, s, axes: masking.total(
        b * advantages.reinforce_plus_plus(a * theta, mask, num_generations=2, axes=axes, gamma=0.9), axes
    ),
    **{
        name: lambda theta, a, b, c, mask, s, axes, function=advantages.CRITIC_FREE[name].function: masking.total(
            b * function(a * theta, mask, num_generations=2, axes=axes), axes
        )
        for name in ("rloo_normalized", "grpo_batch_std", "reinforce_plus_plus_baseline")
    },
    "weight_metrics": lambda theta, a, b, c, mask, s, axes: (
        {"loss": masking.total(b * a * theta, axes)} | values(importance.weight_metrics(b, mask, axes))
    ),
    "explained_variance": lambda theta, a, b, c, mask, s, axes: policy_losses.explained_variance(
        a * theta, c, mask, axes
    ),
    "preference_loss": lambda theta, a, b, c, mask, s, axes: with_metrics(preference_loss(s, theta, axes)),
    "kto_loss": lambda theta, a, b, c, mask, s, axes: with_metrics(
        unpaired_losses.kto_loss(
            s[:, 0] * theta[0, 0],
            s[:, 1],
            mask[:, 0],
            baseline=unpaired_losses.kto_baseline(s[:, 2] + 1, s[:, 3], axes),
            beta=0.3,
            desirable_weight=1.3,
            undesirable_weight=0.7,
            axes=axes,
        )
    ),
    "bradley_terry_loss": lambda theta, a, b, c, mask, s, axes: with_metrics(
        reward_losses.bradley_terry_loss(s[:, 0] * theta[0, 0], s[:, 1], axes=axes)
    ),
}
WINS = jnp.arange(4)[None, :, None] < jnp.arange(4)[None, None, :]
FUNCTIONS |= {
    "margin_loss": lambda theta, a, b, c, mask, s, axes: with_metrics(
        reward_losses.margin_loss(s[:, 0] * theta[0, 0], s[:, 1], s[:, 2], axes=axes)
    ),
    "raters_loss": lambda theta, a, b, c, mask, s, axes: with_metrics(
        reward_losses.raters_loss(s[:, 0] * theta[0, 0], s[:, 1], jnp.abs(s[:, 2:]), axes=axes)
    ),
    # On the fourth device no prompt has a pair.
    "k_wise_loss": lambda theta, a, b, c, mask, s, axes: with_metrics(
        reward_losses.k_wise_loss(
            s * theta[:, :4], WINS & mask[:, :4, None] & mask[:, None, :4], label_smoothing=0.1, axes=axes
        )
    ),
    "plackett_luce_loss": lambda theta, a, b, c, mask, s, axes: with_metrics(
        reward_losses.plackett_luce_loss(s * theta[:, :4], mask[:, :4], axes=axes)
    ),
    "centering": lambda theta, a, b, c, mask, s, axes: (
        reward_losses.centering(s[:, 0] * theta[0, 0], s[:, 1], axes=axes).value
    ),
}
THETA = jnp.linspace(0.5, 1.5, T)[None, :]
ROWS = (A, B_, C, MASK, SCORES)


def main_scalar(function: Callable, axes: tuple[str, ...]) -> Callable:
    def scalar(theta, *rows):
        out = function(theta, *rows, axes)
        return (out["loss"], out) if isinstance(out, dict) else (out, {"value": out})

    return scalar


Results = dict[str, tuple[tuple[jax.Array, dict[str, jax.Array]], jax.Array]]
"""Value, metrics and gradient of each of FUNCTIONS, all from one program: they take long to compile one by one."""


def each(transform: Callable[[Callable], Callable], axes: tuple[str, ...]) -> Callable[..., Results]:
    """Compute all FUNCTIONS, with gradients; `transform` is applied to each scalar function."""

    def compute(theta, *rows):
        scalars = {name: transform(main_scalar(function, axes)) for name, function in FUNCTIONS.items()}
        return {name: jax.value_and_grad(scalar, has_aux=True)(theta, *rows) for name, scalar in scalars.items()}

    return compute


def unchanged(scalar: Callable) -> Callable:
    return scalar


@functools.cache
def on_one_device() -> Results:
    return jax.jit(each(unchanged, ()))(THETA, *ROWS)


@functools.cache
def under_pmap() -> Results:
    def step(theta, *rows):
        results = each(unchanged, ("batch",))(theta, *rows)
        return {name: (result, jax.lax.pmean(grad, "batch")) for name, (result, grad) in results.items()}

    split = [x.reshape(DEVICES, B // DEVICES, *x.shape[1:]) for x in ROWS]
    results = jax.pmap(step, axis_name="batch", in_axes=(None, 0, 0, 0, 0, 0))(THETA, *split)
    return jax.device_get(results)


@functools.cache
def under_shard_map() -> Results:
    mesh = Mesh(np.asarray(jax.devices()), ("batch",))

    def mapped(scalar: Callable) -> Callable:
        return jax.shard_map(scalar, mesh=mesh, in_specs=(P(), *(P("batch"),) * len(ROWS)), out_specs=P())

    return jax.jit(each(mapped, ("batch",)))(THETA, *ROWS)


@functools.cache
def under_jit_on_a_mesh() -> Results:
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in ROWS]
    theta = jax.device_put(THETA, NamedSharding(mesh, P()))
    return jax.jit(each(unchanged, ()))(theta, *rows)


@pytest.mark.parametrize(
    "split",
    [
        under_shard_map,
        *(pytest.param(split, marks=pytest.mark.nightly) for split in (under_pmap, under_jit_on_a_mesh)),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_metrics_and_gradients_are_those_of_one_device(name, split):
    found = split()[name]
    if split is under_pmap:
        for leaf in jax.tree.leaves(found):  # every device has the same answer
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        found = jax.tree.map(lambda leaf: leaf[0], found)
    (value, metrics), grad = found
    (expected, expected_metrics), expected_grad = on_one_device()[name]
    assert np.any(np.abs(expected_grad) > 1e-4), "a gradient of zero proves nothing"
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for key, number in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], number, rtol=1e-5, atol=1e-6, err_msg=key)


def on_every_device(function: Callable, *rows: jax.Array):
    return jax.pmap(function, axis_name="batch")(*rows)


def test_every_device_gathers_all_rows_in_their_order():
    x, y = jnp.arange(2 * B).reshape(DEVICES, 2, 2), normal(0, DEVICES, 2)
    gathered = on_every_device(lambda *tree: masking.gather_rows(tree, ("batch",)), x, y)
    for device in range(DEVICES):
        np.testing.assert_array_equal(gathered[0][device], x.reshape(B, 2))
        np.testing.assert_array_equal(gathered[1][device], y.reshape(B))


def test_tokens_are_counted_over_all_devices():
    counted = on_every_device(lambda mask: masking.count(mask, ("batch",)), MASK.reshape(DEVICES, -1, T))
    np.testing.assert_array_equal(counted, np.full(DEVICES, np.count_nonzero(MASK)))


def local_rows(rows: jax.Array):
    return on_every_device(lambda _: masking.local_rows(rows, ("batch",)), jnp.arange(DEVICES))


def test_devices_share_the_rows_evenly_and_in_order():
    rows = jnp.asarray(np.random.default_rng(0).permutation(B), jnp.int32)
    np.testing.assert_array_equal(local_rows(rows), rows.reshape(DEVICES, B // DEVICES))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="12 rows do not divide over 8 devices"):
        local_rows(jnp.arange(12))


def test_a_minibatch_of_gathered_rows_is_the_same_minibatch_on_one_device():
    minibatch = jnp.asarray(np.random.default_rng(1).permutation(B)[:DEVICES], jnp.int32)

    def loss(a, mask, axes=("batch",)):
        a, mask = masking.gather_rows((a, mask), axes)
        own = masking.local_rows(minibatch, axes)
        return masking.masked_mean(a[own], mask[own], axes)

    got = on_every_device(loss, *(x.reshape(DEVICES, -1, T) for x in (A, MASK)))
    np.testing.assert_allclose(got, np.full(DEVICES, loss(A, MASK, axes=())), rtol=1e-5)
