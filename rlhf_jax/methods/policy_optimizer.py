"""The optimiser of a policy-gradient method: shared by policy and value function or one for each, and value warm-up.

By default, policy and value function share one optimiser, learning rate and gradient-norm clipping, as in TRL's
PPOTrainer: a large value gradient then also scales down the policy's. With `value_optimizer` each has its own, as in
verl (`actor.optim` and `critic.optim`).
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.methods.policy_method import OnlineMethod
from rlhf_jax.methods.policy_parts import Params
from rlhf_jax.runtime.optimizers import (
    Optimizer,
    OptimizerConfig,
    algorithm,
    clip_gradients,
    learning_rate,
    with_freezing,
)


def check_value_optimizer(value: OptimizerConfig | None) -> None:
    """Raise ValueError for a field that can only be set in `optimizer`, for policy and value function together."""
    for name in ("micro_batch", "freeze", "low_precision", "moments"):
        if value is not None and getattr(value, name) != OptimizerConfig.__dataclass_fields__[name].default:
            raise ValueError(
                f"value_optimizer.{name} = {getattr(value, name)!r} has no effect: optimizer.{name} applies to policy "
                "and value function"
            )


def make_optimizer(config: OnlineConfig, method: OnlineMethod) -> Optimizer:
    """Make the optimiser of `{"policy": ..., "value": ...}`, which holds the policy fixed during value warm-up.

    During the first `method.value_warmup` iterations the policy's moments, step count and schedule do not change, so
    that its first update equals that of a run without warm-up; its schedule covers the remaining iterations. Shared
    clipping uses the norm of both gradients; the policy's is 0 during warm-up.
    """
    warmup, value = _warmup_updates(config, method), method.value_optimizer
    own, updates = config.optimizer, config.updates
    if not warmup and value is None:
        return with_freezing(own, optax.chain(clip_gradients(own), algorithm(own, updates)))

    def is_over(step: ArrayLike, **_: PyTree) -> jax.Array:
        return jnp.asarray(step) >= warmup

    policy = algorithm(own, updates - warmup)
    if value is not None:
        policy = optax.chain(clip_gradients(own), policy)
    if warmup:
        policy = optax.conditionally_mask(policy, is_over)
    value_part = (
        algorithm(own, updates) if value is None else optax.chain(clip_gradients(value), algorithm(value, updates))
    )
    each = optax.partition({"policy": policy, "value": value_part}, lambda params: {name: name for name in params})
    return with_freezing(own, each if value is not None else optax.chain(clip_gradients(own), each))


def freeze_policy(grads: Params, method: OnlineMethod, step: jax.Array) -> Params:
    """Set the policy's gradient to 0 during value warm-up, so that shared clipping sees only the value gradient."""
    if not method.value_warmup:
        return grads
    warming = step < method.value_warmup
    return {**grads, "policy": jax.tree.map(lambda grad: jnp.where(warming, 0, grad), grads["policy"])}


def learning_rates(config: OnlineConfig, method: OnlineMethod, step: jax.Array) -> dict[str, jax.Array]:
    """Learning rates at an iteration's first update: `learning_rate`, and `learning_rate/value` if it may differ."""
    warmup = _warmup_updates(config, method)
    done = step * (config.updates // config.iterations)
    own = jnp.asarray(learning_rate(config.optimizer, config.updates - warmup)(jnp.maximum(done - warmup, 0)))
    if not warmup and method.value_optimizer is None:
        return {"learning_rate": own}
    value_rate = jnp.asarray(learning_rate(method.value_optimizer or config.optimizer, config.updates)(done))
    return {"learning_rate": jnp.where(done < warmup, 0.0, own), "learning_rate/value": value_rate}


def _warmup_updates(config: OnlineConfig, method: OnlineMethod) -> int:
    return method.value_warmup * (config.updates // config.iterations)
