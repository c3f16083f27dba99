"""ppo: tunes a policy to please a reward model, kept near its start by a penalty on the divergence.

The algorithm of Ziegler et al. 2019 (arXiv:1909.08593) and Stiennon et al. 2020 (arXiv:2009.01325), with the details of
Huang et al. 2024 (arXiv:2403.17031): no dropout, the score on the last response token, less a penalty without EOS,
whitened advantages, a value function that starts from the reward model, clipped values, Adam's epsilon 1e-5.

One iteration is one pure function of (state, frozen networks, prompts, key): see `make_step`.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.config import ModelSource
from rlhf_jax.core import masking
from rlhf_jax.core.advantages import gae, token_rewards
from rlhf_jax.core.kl import k1
from rlhf_jax.core.logprobs import sequence_logprobs
from rlhf_jax.core.policy_losses import explained_variance, policy_loss, value_loss
from rlhf_jax.data import pipeline
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import LoopConfig, Task, train
from rlhf_jax.runtime.optimizers import OptimizerConfig, gradients, learning_rate, make_optimizer, update
from rlhf_jax.runtime.programs import SEED_AXIS, HostSteps, Step
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate, is_stop
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.models import AS_IT_IS, Tuning, as_reward_model, save_policy_spec
from rlhf_jax.stages.prompts import PromptSource
from rlhf_jax.stages.samples import sample_rows
from rlhf_jax.stages.scoring import make_scorer, reads_same_tokens
from rlhf_jax.stages.training import adapted_network, adapted_scalar, begin, whole
from rlhf_jax.types import PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The policy that is start and reference, the reward model, and the algorithm's numbers."""

    kind: Literal["ppo"]
    policy: ModelSource
    reward_model: ModelSource
    iterations: int
    batch_size: int  # prompts, and responses, an iteration
    minibatches: int
    epochs: int
    temperature: float
    kl_coef: float
    missing_eos_penalty: float  # taken off the score of a response that was cut off
    gamma: float
    gae_lambda: float
    clip_ratio: float
    value_clip: float
    vf_coef: float
    optimizer: OptimizerConfig
    samples_every: int  # iterations between those whose samples are written
    samples_written: int
    loop: LoopConfig
    tuning: Tuning = AS_IT_IS

    def __post_init__(self) -> None:
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size = {self.batch_size} does not divide into {self.minibatches} minibatches")
        if self.tuning.lora is not None and self.tuning.lora.dropout:
            raise ValueError("tuning.lora.dropout must be 0: with dropout the first ratio would not be 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature} must be above 0")

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole run."""
        return self.iterations * self.epochs * self.minibatches


class PPOBatch(NamedTuple):
    """A scored rollout: what every epoch trains on."""

    rollout: Rollout
    logprobs: jax.Array  # [B, T], of the policy that sampled, by the learner's own forward pass
    values: jax.Array  # [B, T]
    advantages: jax.Array  # [B, T]
    returns: jax.Array  # [B, T]


class Samples(NamedTuple):
    """What an iteration shows of its responses."""

    rollout: Rollout
    scores: jax.Array  # [B]
    kl: jax.Array  # [B], nats


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks' functions. Parameters: state has `policy` and `value`, frozen has `reference` and `reward`.

    Where the policy and the value are adapters, their bases are frozen's `reference` and `value_base`.
    """

    policy: PolicyNetwork
    value: ScalarNetwork
    reward: ScalarNetwork | None  # None where responses are scored on the host
    stop_ids: tuple[int, ...]
    max_new_tokens: int

    def whole(self, params: dict[str, PyTree], frozen: dict[str, PyTree]) -> dict[str, PyTree]:
        """The parameters of policy and value, of what is trained and what is not."""
        return {
            "policy": whole(self.policy, params["policy"], frozen, "reference"),
            "value": whole(self.value, params["value"], frozen, "value_base"),
        }


def run(config: PPOConfig, context: Context) -> dict[str, Any]:
    """Trains `context.seeds` policies at once, each with its own prompts, samples and initial key."""
    reference, reward_model = context.policy(config.policy, config.tuning), context.reward_model(config.reward_model)
    seeds, lora = range(context.seed, context.seed + context.seeds), config.tuning.lora
    reference = reference._replace(network=adapted_network(reference.network, lora))
    save_policy_spec(context.directory, reference, seeds, base=config.policy if lora else None)
    rows = pipeline.load_rows(context.data, "train")
    pool = pipeline.prompts(rows, reference.tokenizer, context.data)

    placement = context.placement(context.seeds)
    several = context.seeds > 1
    prompt_keys, run_keys = zip(*(jax.random.split(context.key(k)) for k in range(context.seeds)), strict=True)
    on_device = reads_same_tokens(reward_model.tokenizer, reference.tokenizer)
    value = reward_model if on_device else as_reward_model(reference, context.key())
    networks = Networks(
        policy=reference.network,
        value=adapted_scalar(value.network, lora),
        reward=reward_model.network if on_device else None,
        stop_ids=reference.tokenizer.stop_ids,
        max_new_tokens=context.data.max_response_tokens,
    )
    axes = (placement.axes, (SEED_AXIS,) if several else ())
    frozen = {"reference": reference.params}
    if on_device:
        step: Step | HostSteps = make_step(networks, config, *axes)
        frozen["reward"] = reward_model.params
    else:
        scorer = make_scorer(reward_model, reference, rows, context.data, context.runtime.inference_batch)
        sample, learn = make_halves(networks, config, *axes)
        step = HostSteps(sample, scorer, learn)
    policy = begin(networks.policy, reference.params, context.key())
    value_start = begin(networks.value, networks.value.init_value(value.params), context.key())
    frozen["value_base"] = value_start.base
    state = init_state({"policy": policy.trained, "value": value_start.trained}, config)

    def describe(step: int, samples: Samples) -> list[dict[str, Any]]:
        if step % config.samples_every and step != 1:
            return []
        shown = jax.tree.map(lambda leaf: leaf[: config.samples_written], samples)
        return sample_rows(reference.tokenizer, shown.rollout, shown.scores.tolist(), shown.kl.tolist())

    task = Task(
        step=step,
        state=jax.tree.map(lambda leaf: jnp.stack([leaf] * context.seeds), state) if several else state,
        frozen=frozen,
        batch_at=PromptSource(pool, prompt_keys, config.batch_size),
        run_key=jnp.stack(run_keys) if several else run_keys[0],
        total_steps=config.iterations,
        key_figures=("objective/scores", "objective/kl", "val/num_eos_tokens"),
        evaluation=None,
        describe=describe,
    )
    train(task, config.loop, placement, context.seed, context.directory, context.bar)
    return {
        "prompts": len(pool.tokens),
        "prompt_key": [np.asarray(jax.random.key_data(key)).tolist() for key in prompt_keys],
        "episodes": config.iterations * config.batch_size,
    }


def init_state(params: dict[str, PyTree], config: PPOConfig) -> TrainState:
    """The state before the first iteration."""
    return TrainState(jnp.int32(0), params, make_optimizer(config.optimizer, config.updates).init(params))


def make_step(networks: Networks, config: PPOConfig, axes: tuple[str, ...], loop_axes: tuple[str, ...]) -> Step:
    """One PPO iteration on a PromptBatch: sample, score, penalise, estimate advantages, and all epochs of updates.

    Args: axes are the mapped axes that rows are split over; loop_axes those of the seeds around the iteration.
    """
    reward = networks.reward
    assert reward is not None
    sample, learn = make_halves(networks, config, axes, loop_axes)

    def step(
        state: TrainState, frozen: dict[str, PyTree], prompts: PromptBatch, run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Samples]:
        state, _, rollout = sample(state, frozen, prompts, run_key)
        return learn(state, frozen, (rollout, reward.scores(frozen["reward"], rollout)), run_key)

    return step


def make_halves(
    networks: Networks, config: PPOConfig, axes: tuple[str, ...], loop_axes: tuple[str, ...]
) -> tuple[Step, Step]:
    """An iteration in two steps, between which responses are scored: PromptBatch -> Rollout, and (Rollout, scores)."""

    def sample(
        state: TrainState, frozen: dict[str, PyTree], prompts: PromptBatch, run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Rollout]:
        sampling = Sampling(networks.max_new_tokens, config.temperature, networks.stop_ids)
        key = _keys(run_key, state)[0]
        params = networks.whole(state.params, frozen)["policy"]
        return state, {}, generate(networks.policy, params, prompts, key, sampling, loop_axes=loop_axes).rollout

    def learn(
        state: TrainState, frozen: dict[str, PyTree], scored: tuple[Rollout, jax.Array], run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Samples]:
        params = networks.whole(state.params, frozen)
        batch, samples, metrics = score_rollout(networks, config, params, frozen, *scored, axes)
        state, update_metrics = optimise(networks, config, state, frozen, batch, _keys(run_key, state)[1], axes)
        return state, metrics | update_metrics, samples

    return sample, learn


def _keys(run_key: PRNGKeyArray, state: TrainState) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """An iteration's keys: for sampling, and for the order of minibatches."""
    sample_key, order_key = jax.random.split(jax.random.fold_in(run_key, state.step))
    return sample_key, order_key


def score_rollout(
    networks: Networks,
    config: PPOConfig,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
    rollout: Rollout,
    scores: jax.Array,
    axes: tuple[str, ...],
) -> tuple[PPOBatch, Samples, dict[str, jax.Array]]:
    """From scored responses to advantages, with the metrics of the objective."""
    mask = rollout.response_mask
    stats = networks.policy.response_stats(params["policy"], rollout, temperature=config.temperature)
    reference = networks.policy.response_stats(frozen["reference"], rollout, temperature=config.temperature)
    values = networks.value.values(params["value"], rollout)

    ended = jnp.any(is_stop(rollout.response, networks.stop_ids) & mask, axis=1)
    penalised = scores - config.missing_eos_penalty * ~ended
    kl = k1(stats.logprobs, reference.logprobs)
    rewards = token_rewards(penalised, kl, mask, kl_coef=config.kl_coef)
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    batch = PPOBatch(rollout, stats.logprobs, values, masking.whiten(advantages, mask, axes), returns)

    sequence_kl = sequence_logprobs(kl, mask)
    non_score = -config.kl_coef * sequence_kl
    lengths = masking.lengths(mask)
    length = lengths.astype(jnp.float32)
    metrics = {
        "objective/scores": masking.mean(penalised, axes),
        "objective/kl": masking.mean(sequence_kl, axes),
        "objective/entropy": masking.mean(sequence_logprobs(stats.entropy, mask), axes),
        "objective/non_score_reward": masking.mean(non_score, axes),
        "objective/rlhf_reward": masking.mean(penalised + non_score, axes),
        "objective/kl_coef": jnp.float32(config.kl_coef),
        "reward": masking.mean(scores, axes),
        "reward_std": jnp.sqrt(masking.masked_variance(scores, jnp.ones_like(ended), axes)),
        "completions/mean_length": masking.mean(length, axes),
        "completions/min_length": jax.lax.pmin(jnp.min(length), axes) if axes else jnp.min(length),
        "completions/max_length": jax.lax.pmax(jnp.max(length), axes) if axes else jnp.max(length),
        "val/num_eos_tokens": masking.count(ended, axes),
        "val/explained_variance": explained_variance(values, returns, mask, axes),
        "num_tokens": masking.total(lengths, axes),
    }
    return batch, Samples(rollout, scores, sequence_kl), metrics


def optimise(
    networks: Networks,
    config: PPOConfig,
    state: TrainState,
    frozen: dict[str, PyTree],
    batch: PPOBatch,
    order_key: PRNGKeyArray,
    axes: tuple[str, ...],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Every epoch's minibatches, each epoch in another order; metrics are their means."""
    optimizer = make_optimizer(config.optimizer, config.updates)
    schedule = learning_rate(config.optimizer, config.updates)
    whole_batch = masking.gather_rows(batch, axes)
    rows = whole_batch.returns.shape[0]
    order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(order_key, epoch), rows))
    minibatches = order(jnp.arange(config.epochs)).reshape(config.epochs * config.minibatches, -1)

    def loss_fn(params: PyTree, rows: PPOBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return ppo_loss(networks.whole(params, frozen), networks, config, rows, axes)

    def response_tokens(rows: PPOBatch) -> jax.Array:
        return masking.count(rows.rollout.response_mask, axes)

    def update_minibatch(carry: tuple[PyTree, Any], indices: jax.Array) -> tuple[tuple[PyTree, Any], dict]:
        params, opt_state = carry
        own = masking.own_rows(indices, axes)
        minibatch = jax.tree.map(lambda leaf: leaf[own], whole_batch)
        loss, metrics, grads = gradients(config.optimizer, loss_fn, params, minibatch, response_tokens, axes)
        params, opt_state, grad_norm = update(optimizer, grads, params, opt_state, axes)
        return (params, opt_state), metrics | {"loss": loss, "grad_norm": grad_norm}

    (params, opt_state), metrics = jax.lax.scan(update_minibatch, (state.params, state.opt_state), minibatches)
    metrics = jax.tree.map(jnp.mean, metrics)
    metrics["learning_rate"] = schedule(state.step * config.epochs * config.minibatches)
    return TrainState(state.step + 1, params, opt_state), metrics


def ppo_loss(
    params: dict[str, PyTree], networks: Networks, config: PPOConfig, batch: PPOBatch, axes: tuple[str, ...]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy loss plus `vf_coef` times the clipped value loss."""
    mask = batch.rollout.response_mask
    stats = networks.policy.response_stats(params["policy"], batch.rollout, temperature=config.temperature)
    values = networks.value.values(params["value"], batch.rollout)
    policy, policy_metrics = policy_loss(
        stats.logprobs, batch.logprobs, batch.advantages, mask, clip_ratio=config.clip_ratio, axes=axes
    )
    value, value_metrics = value_loss(
        values, batch.values, batch.returns, mask, clip_range=config.value_clip, axes=axes
    )
    return policy + config.vf_coef * value, {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "policy/entropy_avg": masking.masked_mean(stats.entropy, mask, axes),
        **policy_metrics,
        **value_metrics,
    }
