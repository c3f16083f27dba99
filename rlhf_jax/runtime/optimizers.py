"""Optimisers by config: AdamW with a schedule and a bound on the gradient's norm, and the gradients they take."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rlhf_jax.types import RlhfError

Schedule = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW: the rate rises linearly over `warmup_steps` updates, then follows the schedule (to 0, unless constant)."""

    learning_rate: float
    schedule: Schedule
    warmup_steps: int
    weight_decay: float
    epsilon: float
    max_grad_norm: float
    micro_batch: int | None = None  # rows whose gradient is computed at one time; None: the whole batch's
    freeze: tuple[str, ...] = ()  # regular expressions on paths (policy/block_0/attention/q/kernel): not trained

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch = {self.micro_batch} must be at least 1, or None for the whole batch")
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"freeze: {pattern!r} is no regular expression ({error})") from error


def learning_rate(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """The rate at each of `updates` updates."""
    decay_steps = max(1, updates - config.warmup_steps)
    after_warmup = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, decay_steps),
    }[config.schedule]()
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, after_warmup], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """The optimiser for a run of `updates` updates."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(learning_rate(config, updates), eps=config.epsilon, weight_decay=config.weight_decay),
    )
    if not config.freeze:
        return optimizer
    labels = functools.partial(_frozen, config.freeze)
    return optax.multi_transform({False: optimizer, True: optax.set_to_zero()}, labels)


def gradients(
    config: OptimizerConfig,
    loss_fn: Callable[[PyTree, Any], tuple[Array, dict[str, Array]]],
    params: PyTree,
    batch: Any,
    weight: Callable[[Any], Array],
    axes: tuple[str, ...],
    metrics_weight: Callable[[Any], Array] | None = None,
) -> tuple[Array, dict[str, Array], PyTree]:
    """Loss, metrics and gradient of a batch: all at one time, or accumulated over micro-batches of its rows.

    Args: loss_fn gives a mean, and metrics, of the rows it is given; weight says what it is a mean over (tokens, rows),
    as a count over all devices. Micro-batches are weighted by it, so that accumulating changes nothing but rounding.
    Metrics are weighted by metrics_weight, where that is something else; those under `loss/` always like the loss.
    Raises RlhfError where the rows do not divide into micro-batches.
    """
    if config.freeze:
        frozen = _frozen(config.freeze, params)

        def of_rows(params: PyTree, rows: Any) -> tuple[Array, dict[str, Array]]:
            held = jax.tree.map(lambda leaf, still: jax.lax.stop_gradient(leaf) if still else leaf, params, frozen)
            return loss_fn(held, rows)
    else:
        of_rows = loss_fn
    value_and_grad = jax.value_and_grad(of_rows, has_aux=True)
    if config.micro_batch is None:
        (loss, metrics), grads = value_and_grad(params, batch)
        return loss, metrics, grads

    parts = _micro_batches(batch, config.micro_batch, axes)
    shares = _shares(weight, parts)

    def accumulate(sums: PyTree, part: tuple[Any, Array]) -> tuple[PyTree, dict[str, Array]]:
        rows, share = part
        (loss, metrics), grads = value_and_grad(params, rows)
        sums = jax.tree.map(lambda total, grad: total + share * grad.astype(jnp.float32), sums, grads)
        return sums, {"loss": loss, **metrics}

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    grads, each = jax.lax.scan(accumulate, zeros, (parts, shares))
    loss = jnp.sum(each.pop("loss") * shares)
    of_metrics = shares if metrics_weight is None else _shares(metrics_weight, parts)
    metrics = {
        name: _over_parts(name, values, shares if name.startswith("loss/") else of_metrics)
        for name, values in each.items()
    }
    return loss, metrics, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)


def update(
    optimizer: optax.GradientTransformation, grads: PyTree, params: PyTree, opt_state: Any, axes: tuple[str, ...]
) -> tuple[PyTree, Any, Array]:
    """One optimiser step: new parameters, new optimiser state, and the norm of the gradient before it is bounded.

    Over mapped axes the gradient is the mean of the devices': losses reduce with `psum`, whose derivative sums the
    devices' cotangents, so each device's gradient is its share times the number of devices.
    """
    if axes:
        grads = jax.lax.pmean(grads, axes)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)


def _micro_batches(batch: PyTree, rows: int, axes: tuple[str, ...]) -> PyTree:
    """A batch as [parts, rows, ...]; each part takes every so manieth row, so that every device has its share of it."""
    local = jax.tree.leaves(batch)[0].shape[0]
    devices = jax.lax.axis_size(axes) if axes else 1
    parts = local * devices // rows
    if not parts or parts * rows != local * devices or local % parts:
        raise RlhfError(
            f"a batch of {local * devices} rows does not divide into micro-batches of {rows}"
            f"{f' over {devices} devices' if devices > 1 else ''}: change optimizer.micro_batch"
        )
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(local // parts, parts, *leaf.shape[1:]), 0, 1), batch)


def _shares(weight: Callable[[Any], Array], parts: PyTree) -> Array:
    weights = jax.lax.map(weight, parts).astype(jnp.float32)
    return weights / jnp.maximum(jnp.sum(weights), 1)


def _over_parts(name: str, values: Array, shares: Array) -> Array:
    """A metric of the batch, given that of each micro-batch: the lowest, the highest, or else the weighted mean."""
    reduce = {"min": jnp.min, "max": jnp.max}.get(name.split("/")[-1].split("_")[0])
    return reduce(values) if reduce else jnp.sum(values * shares)


def _frozen(patterns: tuple[str, ...], params: PyTree) -> PyTree:
    """Which parameters are not trained. Raises RlhfError naming a pattern that no path matches."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise RlhfError(f"optimizer.freeze: {pattern!r} matches no parameter; one of them is {paths[0]!r}")
    if all(any(re.search(pattern, path) for pattern in patterns) for path in paths):
        raise RlhfError(f"optimizer.freeze = {patterns} leaves nothing to train")
    still = [any(re.search(pattern, path) for pattern in patterns) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), still)
