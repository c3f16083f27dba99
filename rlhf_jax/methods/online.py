"""Training of an online method: load its inputs, place its reward on device or host, and train a policy per seed."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from rlhf_jax.data import pipeline
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.data.prompts import DemonstrationSource, PromptSource
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.samples import add_tokens, sample_rows
from rlhf_jax.loading.tables import READING
from rlhf_jax.loading.trainable import depth_advice, load_initial_policy, stack
from rlhf_jax.methods import two_steps
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_method import OnlineMethod
from rlhf_jax.methods.policy_parts import Networks, OnlineBatch, Params, Samples, ValueNetwork
from rlhf_jax.rewards.scorers import HostScorer, joins_program, make_host_scorer
from rlhf_jax.rewards.sources import Reward
from rlhf_jax.runtime.loop import Task, train
from rlhf_jax.runtime.optimizers import warmup_warning
from rlhf_jax.runtime.programs import PER_RUN, SEED_AXIS, RuntimeConfig, Step
from rlhf_jax.runtime.two_programs import TwoSteps
from rlhf_jax.sampling import buckets
from rlhf_jax.types import Json, Row


class Inputs(NamedTuple):
    """Inputs of an online stage."""

    reference: Policy  # without parameters, if the method does not read them
    rows: list[Row]
    prompts: pipeline.Prompts


class DeviceReward(NamedTuple):
    """Reward model that reads the policy's tokens, as part of the compiled iteration."""

    model: RewardModel


class HostReward(NamedTuple):
    """Function that scores a rollout on the host, between the two programs of an iteration."""

    score: HostScorer


OnlineReward = DeviceReward | HostReward


def read_inputs(config: OnlineConfig, context: Context) -> Inputs:
    """Load the policy and the prompts."""
    reference = load_initial_policy(config.policy, config.tuning, context)
    context.bar.now(READING)
    rows = pipeline.load_rows(context.data, "train")
    prompts = pipeline.prompts(rows, reference.tokenizer, context.data)
    report_prompts(context, reference.tokenizer, {"train": rows})
    return Inputs(reference, rows, prompts)


def place_reward(reward: RewardModel | Reward, inputs: Inputs, context: Context) -> OnlineReward:
    """Place a reward on the device if it is a model that reads the policy's tokens, otherwise on the host."""
    if joins_program(reward, inputs.reference):
        return DeviceReward(reward)
    batch_size = context.runtime.inference_batch
    return HostReward(make_host_scorer(reward, inputs.reference, inputs.rows, context.data, batch_size))


def train_online(
    config: OnlineConfig,
    method: OnlineMethod,
    context: Context,
    inputs: Inputs,
    reward: OnlineReward,
    *,
    prompts_each: int,
    value: ValueNetwork,
    init_params: Callable[[PRNGKeyArray], Params],
    frozen: Params,
    key_figures: tuple[str, ...],
) -> dict[str, Json]:
    """Train `context.seeds` policies at once, each with its own prompts, samples and initial key.

    Args: prompts_each is the number of prompts per iteration, or per round of dynamic sampling; init_params makes a
    run's trained parameters, given the key for random initialisation; frozen holds frozen parameters besides those of
    the reference and the reward.
    Returns: the summary's fields about prompts.
    """
    runs = context.runs
    reference, placement = inputs.reference, context.placement(len(runs))
    networks = Networks(
        policy=reference.network,
        value=value,
        stop_ids=reference.tokenizer.stop_ids,
        max_new_tokens=context.data.max_response_tokens,
    )
    iteration = Iteration(networks, config, placement.axes, (SEED_AXIS,) if len(runs) > 1 else (), method)
    if reference.params is not None:
        frozen = {**frozen, "reference": reference.params}
    if isinstance(reward, DeviceReward):
        frozen["reward"] = reward.model.params
    if context.per_run:
        frozen[PER_RUN] = context.per_run

    prompt_keys = tuple(context.key("prompts", k) for k in runs)
    rounds = method.dynamic_sampling.rounds if method.dynamic_sampling else 0
    prompts = PromptSource(inputs.prompts, prompt_keys, prompts_each, rounds=rounds)
    demonstrations = None
    if method.ptx is not None:
        data = pipeline.demonstrations(inputs.rows, reference.tokenizer, context.data)
        keys = tuple(context.key("demonstrations", k) for k in runs)
        demonstrations = DemonstrationSource(data, keys, method.ptx.batch_size)

    def batch_at(step: int) -> OnlineBatch[np.ndarray]:
        return OnlineBatch(prompts(step), demonstrations(step) if demonstrations else None)

    def describe(step: int, samples: Samples) -> list[Row]:
        if step % config.samples_every and step != 1:
            return []
        shown = jax.tree.map(lambda leaf: leaf[: config.samples_written], samples)
        kl = shown.kl.tolist() if method.measures_kl else [None] * len(shown.kl)
        rows = sample_rows(reference.tokenizer, shown.rollout, shown.scores.tolist(), kl)
        add_tokens(rows[: config.tokens_recorded], reference.tokenizer, shown.rollout, shown.tokens)
        return rows

    task = Task(
        step=make_step(iteration, reward, context.runtime, context.data),
        start=lambda: stack([iteration.init_state(init_params(context.key("init", k))) for k in runs]),
        frozen=frozen,
        batch_at=batch_at,
        run_key=stack([context.key("run", k) for k in runs]),
        total_steps=config.iterations,
        key_figures=key_figures,
        evaluation=None,
        describe=describe,
    )
    if warning := warmup_warning(config.optimizer, config.updates):
        context.bar.warn(warning)
    context.bar.advise(depth_advice(reference.network))
    services = context.runtime.trackers
    done = train(task, config.loop, placement, context.seed, context.directories, context.bar, services)
    return {
        **({"steps": done} if done < config.iterations else {}),
        "prompts": len(inputs.prompts.tokens),
        "prompt_key": [np.asarray(jax.random.key_data(key)).tolist() for key in prompt_keys[: context.seeds]],
    }


def make_step(iteration: Iteration, reward: OnlineReward, runtime: RuntimeConfig, data: DataConfig) -> Step | TwoSteps:
    """Make the iteration: one program, or two, the second of which drops padding or learns from the host's scores."""
    trims = iteration.config.trim_padding
    fit = two_steps.fit_of(iteration, runtime.row_devices) if trims else two_steps.MAXIMUM
    if isinstance(reward, HostReward):
        return two_steps.scored_on_host(iteration, reward.score, fit)
    longest = data.max_prompt_tokens + data.max_response_tokens
    if trims and longest > buckets.LEAST:
        return two_steps.scored_by_network(iteration, reward.model.network, fit)
    return iteration.step(reward.model.network)
