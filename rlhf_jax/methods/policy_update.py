"""From advantages to parameters: every epoch's minibatches, and the loss of each.

Details of Huang et al. 2024 (arXiv:2403.17031, "N+") and of their study of Ziegler et al.'s code (2023, "N") that stand
here: the clipped loss of the policy and of the values (N), minibatches of whole shuffled responses, in another order
every epoch (N), Adam's epsilon of 1e-5 (N, by the optimizer's config); and by choice a bonus on the entropy, first
iterations that train the values alone, and the pre-training mix of InstructGPT (arXiv:2203.02155).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.core import masking
from rlhf_jax.core.importance import sampler_difference
from rlhf_jax.core.kl import ESTIMATORS
from rlhf_jax.core.logprobs import cross_entropy
from rlhf_jax.core.metrics import BeforeUpdates, Mean, Metric, masked_mean, over_updates
from rlhf_jax.core.policy_losses import AGGREGATIONS, POLICY_LOSSES, ratio_metrics, value_loss
from rlhf_jax.methods import policy_optimizer
from rlhf_jax.methods.policy_method import Experience, Method, Networks, PolicyGradientConfig
from rlhf_jax.models.head import token_stats, token_stats_with_entropy
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import gradients, update
from rlhf_jax.types import TokenBatch


def optimise(
    networks: Networks,
    config: PolicyGradientConfig,
    method: Method,
    state: TrainState,
    frozen: dict[str, PyTree],
    batch: Experience,
    demonstrations: TokenBatch | None,
    keys: tuple[PRNGKeyArray, PRNGKeyArray],
    axes: tuple[str, ...],
    *,
    kl_coef: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Every epoch's minibatches, each epoch in another order; metrics are their means.

    Only that of the sampler is the first minibatch's: after its update the policy is no longer the one that sampled.

    Args: keys are those of the order of minibatches and of stochastic rounding; kl_coef is a number, or the state of a
    controller.
    """
    optimizer = policy_optimizer.make_optimizer(config, method)
    whole_batch, mix = masking.gather_rows((batch, demonstrations), axes)
    order_key, rounding_key = keys
    updates = config.epochs * config.minibatches
    warming = state.step < method.value_warmup

    def shuffled(rows: int, first_key: int) -> jax.Array:
        order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(order_key, first_key + epoch), rows))
        return order(jnp.arange(config.epochs)).reshape(updates, -1)

    minibatches = (
        shuffled(whole_batch.advantages.shape[0], 0),
        None if mix is None else shuffled(mix.tokens.shape[0], config.epochs),
    )

    def loss_fn(params: PyTree, rows: Experience) -> tuple[jax.Array, dict[str, Metric]]:
        return minibatch_loss(
            networks.full_params(params, frozen), networks, config, method, rows, axes, kl_coef=kl_coef
        )

    def weight(rows: Experience) -> jax.Array:
        return AGGREGATIONS[method.aggregation][1](rows.loss_mask, axes)

    def update_minibatch(carry: tuple[PyTree, Any], given: tuple) -> tuple[tuple[PyTree, Any], tuple]:
        (params, opt_state), (indices, number) = carry, given
        minibatch = _own(whole_batch, indices[0], axes)
        loss, metrics, grads = gradients(config.optimizer, loss_fn, params, minibatch, weight, axes)
        numbers = {}
        if mix is not None:
            mixed, ptx_grads = _pretraining(networks, config, params, frozen, _own(mix, indices[1], axes), axes)
            coef = config.ptx.coef if config.ptx else 0.0
            loss, numbers = loss + coef * mixed, {"loss/ptx_avg": mixed}
            grads = jax.tree.map(lambda grad, ptx: grad + coef * ptx, grads, ptx_grads)
        if method.value_warmup:  # the bound on both norms counts the values' alone
            grads = {**grads, "policy": _where(warming, jax.tree.map(jnp.zeros_like, grads["policy"]), grads["policy"])}
        params, opt_state, norms = update(
            optimizer, grads, params, opt_state, axes, key=jax.random.fold_in(rounding_key, number)
        )
        return (params, opt_state), (metrics, {**numbers, "loss": loss, **norms})

    (params, opt_state), (metrics, numbers) = jax.lax.scan(
        update_minibatch, (state.params, state.opt_state), (minibatches, jnp.arange(updates))
    )
    logged = over_updates(metrics) | jax.tree.map(jnp.mean, numbers)
    logged |= policy_optimizer.rates(config, method, state.step)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), logged


def minibatch_loss(
    params: dict[str, PyTree],
    networks: Networks,
    config: PolicyGradientConfig,
    method: Method,
    batch: Experience,
    axes: tuple[str, ...],
    *,
    kl_coef: Any,
) -> tuple[jax.Array, dict[str, Metric]]:
    """The policy's loss, and where the method has them the values', the divergence and the entropy.

    All but the values' are aggregated as the method says, and the values' over tokens.
    """
    mask = batch.loss_mask
    of_logits = token_stats_with_entropy if config.entropy_coef else token_stats
    stats, values = networks.forward(params, batch.rollout, temperature=config.temperature, of_logits=of_logits)
    aggregate = functools.partial(
        AGGREGATIONS[method.aggregation][0], mask=mask, max_tokens=networks.max_new_tokens, axes=axes
    )
    tokens = POLICY_LOSSES[method.policy_loss][0](
        stats.logprobs, batch.logprobs, batch.advantages, mask, **method.bounds
    )
    policy = aggregate(tokens.losses if batch.weights is None else batch.weights * tokens.losses)
    loss = policy
    counted = AGGREGATIONS[method.aggregation][1](mask, axes)
    metrics: dict[str, Metric] = {
        "loss/policy_avg": Mean(policy, counted),
        "policy/entropy_avg": masked_mean(stats.entropy, mask, axes),
        **ratio_metrics(stats.logprobs, batch.logprobs, tokens.clipped, mask, axes),
    }
    if config.old_logprobs == "sampler":
        sampler = sampler_difference(stats.logprobs, batch.logprobs, mask, axes)
        metrics |= {name: BeforeUpdates(metric) for name, metric in sampler.items()}
    if values is not None:
        assert batch.values is not None and batch.returns is not None
        value, value_metrics = value_loss(
            values, batch.values, batch.returns, mask, clip_range=method.value_clip, axes=axes
        )
        loss = loss + method.vf_coef * value
        metrics |= {"loss/value_avg": Mean(value, counted), **value_metrics}
    if batch.ref_logprobs is not None:
        apart = (jnp.where(mask, x, 0) for x in (stats.logprobs, batch.ref_logprobs, batch.logprobs))
        divergence = aggregate(ESTIMATORS[method.kl_estimator](*apart))
        loss = loss + kl_coef * divergence
        metrics["loss/kl_avg"] = Mean(divergence, counted)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * aggregate(stats.entropy)
    return loss, metrics


def _pretraining(
    networks: Networks,
    config: PolicyGradientConfig,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
    batch: TokenBatch,
    axes: tuple[str, ...],
) -> tuple[jax.Array, PyTree]:
    """The loss of demonstrations, and its gradient, a micro-batch at a time where there are several."""

    def loss_fn(params: PyTree, rows: TokenBatch) -> tuple[jax.Array, dict[str, Metric]]:
        stats = networks.policy.sequence_stats(networks.full_params(params, frozen)["policy"], rows)
        return cross_entropy(stats.logprobs, rows.loss_mask[:, 1:], axes), {}

    def trained_tokens(rows: TokenBatch) -> jax.Array:
        return masking.count(rows.loss_mask[:, 1:], axes)

    rows, most = _all_rows(batch, axes), config.optimizer.micro_batch
    fits = most is None or rows <= most
    optimizer = dataclasses.replace(config.optimizer, micro_batch=None) if fits else config.optimizer
    loss, _, grads = gradients(optimizer, loss_fn, params, batch, trained_tokens, axes)
    return loss, grads


def _all_rows(batch: TokenBatch, axes: tuple[str, ...]) -> int:
    return batch.tokens.shape[0] * (jax.lax.axis_size(axes) if axes else 1)


def _own(batch: PyTree, indices: jax.Array, axes: tuple[str, ...]) -> PyTree:
    own = masking.own_rows(indices, axes)
    return jax.tree.map(lambda leaf: leaf[own], batch)


def _where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
