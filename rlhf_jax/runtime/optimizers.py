"""Optimisers by config: AdamW with a schedule and a bound on the gradient's norm."""

import dataclasses
from typing import Any, Literal

import jax
import optax
from jaxtyping import Array, PyTree

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
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(learning_rate(config, updates), eps=config.epsilon, weight_decay=config.weight_decay),
    )


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
