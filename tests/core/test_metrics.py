"""A metric over micro-batches is the whole batch's, and over updates their mean."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import metrics
from rlhf_jax.core.metrics import BeforeUpdates, Difference
from tests.support.padded_arrays import WIDTH, normal, prefix_mask

X, MASK = normal(0, 6, WIDTH), prefix_mask([5, 1, 0, 3, 2, 4])


def measure(x: jax.Array, mask: jax.Array) -> dict[str, metrics.Metric]:
    mean = metrics.masked_mean(x, mask, ())
    return {
        "mean": mean,
        "smallest": metrics.smallest(x, ()),
        "largest": metrics.largest(x, ()),
        "difference": Difference(mean, metrics.masked_mean(x, ~mask, ())),
        "before": BeforeUpdates(mean),
    }


def test_parts_of_unequal_weight_combine_to_the_whole_batch():
    parts = jax.lax.map(lambda rows: measure(*rows), (X.reshape(3, 2, WIDTH), MASK.reshape(3, 2, WIDTH)))
    got = metrics.values(metrics.combine(parts))
    for name, value in metrics.values(measure(X, MASK)).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)
    x, inside = np.asarray(X), np.asarray(MASK)
    np.testing.assert_allclose(got["difference"], x[inside].mean() - x[~inside].mean(), rtol=1e-5)
    assert abs(got["mean"] - np.mean(parts["mean"].value)) > 0.01  # a mean of means is another number


def test_a_part_without_weight_does_not_count():
    parts = [metrics.masked_mean(X[rows], MASK[rows], ()) for rows in (slice(2, 3), slice(0, 1))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    assert (float(parts[0].value), int(parts[0].weight)) == (0, 0)
    assert metrics.combine({"x": stacked})["x"].value == parts[1].value


def test_updates_count_alike_and_some_metrics_are_of_the_parameters_before_them():
    updates = jax.lax.map(lambda rows: measure(*rows), (X.reshape(3, 2, WIDTH), MASK.reshape(3, 2, WIDTH)))
    got, each = metrics.over_updates(updates), metrics.values(updates)
    for name in ("mean", "smallest", "largest", "difference"):
        np.testing.assert_allclose(got[name], np.mean(each[name]), rtol=1e-6)
    assert got["before"] == each["mean"][0] != each["mean"][1]


def test_extremes_may_stand_in_a_loss_that_is_differentiated():
    def loss(x):
        return jnp.sum(x), metrics.values(measure(x, MASK))

    np.testing.assert_array_equal(jax.grad(loss, has_aux=True)(X)[0], np.ones(X.shape))
