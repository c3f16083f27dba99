"""Metrics that carry their own reduction, over devices, micro-batches and updates.

A loss function returns metrics of the rows it is given. Rows may be split over devices, over micro-batches whose
gradients are accumulated, and over the minibatches of an iteration, each followed by an update. The constructors below
reduce over the rows of all devices, `combine` over the micro-batches of a batch, and `over_updates` over updates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import masking


class Mean(NamedTuple):
    """Mean over tokens, rows or labels. The weight says how many there are, on all devices."""

    value: Array
    weight: Array

    def over_parts(self) -> "Mean":
        """The mean of the whole batch, given those of its parts, stacked along the first axis."""
        weights = self.weight.astype(jnp.float32)
        return Mean(jnp.sum(self.value * (weights / jnp.maximum(jnp.sum(weights), 1))), jnp.sum(self.weight))


class Smallest(NamedTuple):
    """Minimum over rows."""

    value: Array

    def over_parts(self) -> "Smallest":
        """The minimum over the whole batch."""
        return Smallest(jnp.min(self.value))


class Largest(NamedTuple):
    """Maximum over rows."""

    value: Array

    def over_parts(self) -> "Largest":
        """The maximum over the whole batch."""
        return Largest(jnp.max(self.value))


class Difference(NamedTuple):
    """Difference of two means over different rows."""

    minuend: Mean
    subtrahend: Mean

    @property
    def value(self) -> Array:
        """The first mean less the second."""
        return self.minuend.value - self.subtrahend.value

    def over_parts(self) -> "Difference":
        """The difference of the means over the whole batch."""
        return Difference(self.minuend.over_parts(), self.subtrahend.over_parts())


class BeforeUpdates(NamedTuple):
    """Metric of the parameters before the first of several updates: later updates do not count."""

    metric: "Metric"

    @property
    def value(self) -> Array:
        """The metric's value."""
        return self.metric.value

    def over_parts(self) -> "BeforeUpdates":
        """The metric of the whole batch."""
        return BeforeUpdates(self.metric.over_parts())


Metric = Mean | Smallest | Largest | Difference | BeforeUpdates


def masked_mean(x: Float[Array, "*dims"], mask: Bool[Array, "*dims"], axes: tuple[str, ...]) -> Mean:
    """Mean of x where the mask is True, over all devices; 0 where it is True nowhere."""
    return Mean(masking.masked_mean(x, mask, axes), masking.count(mask, axes))


def mean(x: Float[Array, "*dims"], axes: tuple[str, ...]) -> Mean:
    """Mean of all elements over all devices."""
    return masked_mean(x, jnp.ones(x.shape, bool), axes)


def smallest(x: Float[Array, "*dims"], axes: tuple[str, ...]) -> Smallest:
    """Minimum over all devices, without a gradient, which `pmin` does not have."""
    local = jnp.min(jax.lax.stop_gradient(x))
    return Smallest(jax.lax.pmin(local, axes) if axes else local)


def largest(x: Float[Array, "*dims"], axes: tuple[str, ...]) -> Largest:
    """Maximum over all devices, without a gradient, which `pmax` does not have."""
    local = jnp.max(jax.lax.stop_gradient(x))
    return Largest(jax.lax.pmax(local, axes) if axes else local)


def combine(parts: dict[str, Metric]) -> dict[str, Metric]:
    """Metrics of a batch, given those of its micro-batches, stacked along the first axis."""
    return {name: metric.over_parts() for name, metric in parts.items()}


def over_updates(metrics: dict[str, Metric]) -> dict[str, Array]:
    """Numbers to log, given each update's metrics stacked along the first axis: means, or those before all updates."""
    return {
        name: metric.value[0] if isinstance(metric, BeforeUpdates) else jnp.mean(metric.value)
        for name, metric in metrics.items()
    }


def values(metrics: dict[str, Metric]) -> dict[str, Array]:
    """Numbers to log."""
    return {name: metric.value for name, metric in metrics.items()}
