"""Programs of the stages that sample: iterations of ppo, group_rl and online_dpo, and generation in batches.

States, frozen networks and batches are those that the stages' `run` functions make, with prompts and responses of the
maximum lengths.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.trainable import stack, trainable
from rlhf_jax.methods.online import DeviceReward, HostReward, make_step
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_method import OnlineMethod
from rlhf_jax.methods.policy_parts import Networks, Params, ValueNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.planning import shapes
from rlhf_jax.planning.stage_outlines import (
    ProgramOutline,
    RunOutline,
    StageOutline,
    jitted,
    keys_of,
    placed_frozen,
    placed_state,
    trained_params,
)
from rlhf_jax.rewards.sources import RewardConfig, RewardSource
from rlhf_jax.runtime.programs import SEED_AXIS, leading_axes
from rlhf_jax.runtime.two_programs import TwoSteps, Widths
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.stages import group_rl, online_dpo, ppo
from rlhf_jax.stages.evaluate import EvaluateConfig
from rlhf_jax.stages.gold import GoldConfig
from rlhf_jax.types import PromptBatch

STOP_IDS = (0,)
"""Stop tokens of every policy: their number has next to no cost."""


def policy_gradient_outline(run: RunOutline, name: str, config: ppo.PPOConfig | group_rl.GroupRLConfig) -> StageOutline:
    """Outline of ppo or group_rl: its iteration."""
    policy = run.outlines.initial(config.policy, config.tuning)
    reward = _place_reward(run, config.reward_model, policy)
    network: ValueNetwork = None
    value_params = None
    if isinstance(config, ppo.PPOConfig):
        model = reward.model if isinstance(reward, DeviceReward) else None
        network, value_params = _value(config, policy, model)
        method = ppo.build_method(config)
    else:
        method = group_rl.build_method(config)
    if isinstance(network, ScalarNetwork):
        network = trainable(network, config.tuning)
    frozen = {"value_base": value_params if config.tuning.lora else None} if isinstance(network, ScalarNetwork) else {}

    def init(policy_params: PyTree, value_params: PyTree) -> Params:
        params = {"policy": trained_params(policy.network, policy_params)}
        if isinstance(network, ScalarNetwork):
            params["value"] = trained_params(network, value_params)
        elif network == "shared":
            params["value"] = value_params
        return params

    params = jax.eval_shape(init, policy.params, value_params)
    prompts = config.batch_size // method.num_generations
    return _online(run, config, method, policy, reward, network, params, frozen, prompts)


def _value(config: ppo.PPOConfig, policy: Policy, reward: RewardModel | None) -> tuple[ValueNetwork, PyTree]:
    networks: list[ValueNetwork] = []

    def start(policy_params: PyTree, reward_params: PyTree) -> PyTree:
        members = None if reward is None else reward._replace(params=reward_params).members()[0]
        found = ppo.start_value(config, policy._replace(params=policy_params), members, jax.random.key(0))
        networks.append(found.network)
        return found.params

    params = jax.eval_shape(start, policy.params, None if reward is None else reward.params)
    return networks[0], params


def online_dpo_outline(run: RunOutline, name: str, config: online_dpo.OnlineDPOConfig) -> StageOutline:
    """Outline of online_dpo: its iteration."""
    policy, reward = run.outlines.initial(config.policy, config.tuning), HostReward(_unscored)
    if config.reward_model is not None:
        reward = _place_reward(run, config.reward_model, policy)
    params = {"policy": jax.eval_shape(functools.partial(trained_params, policy.network), policy.params)}
    method = online_dpo.build_method(config)
    return _online(run, config, method, policy, reward, None, params, {}, config.batch_size)


def _online(
    run: RunOutline,
    config: OnlineConfig,
    method: OnlineMethod,
    policy: Policy,
    reward: DeviceReward | HostReward,
    value: ValueNetwork,
    params: Params,
    frozen: Params,
    prompts: int,
) -> StageOutline:
    networks = Networks(policy.network, value, STOP_IDS, run.data.max_response_tokens)
    iteration = Iteration(networks, config, run.placement.axes, (SEED_AXIS,) if run.seeds > 1 else (), method)
    iteration.forward_slices(prompts * method.num_generations, run.runtime.row_devices)
    if method.measures_kl or config.tuning.lora:
        frozen = {**frozen, "reference": policy.params}
    if isinstance(reward, DeviceReward):
        frozen["reward"] = reward.model.params
    state = placed_state(run, jax.eval_shape(lambda: stack([iteration.init_state(_zeros(params))] * run.seeds)))
    frozen, key, loops = placed_frozen(run, frozen), keys_of(run), run.data.max_response_tokens - 1
    rounds = method.dynamic_sampling.rounds if method.dynamic_sampling else 0
    each = (prompts, rounds) if rounds else (prompts,)
    batch = shapes.online(run.data, *each, demonstrations=method.ptx.batch_size if method.ptx else None)
    stacked = shapes.one_step(batch, run.seeds)
    step = make_step(iteration, reward, run.runtime, run.data)
    row = f"response of {run.width} tokens"
    dtype, rows = policy.network.config.compute_dtype, prompts * method.num_generations
    if not isinstance(step, TwoSteps):
        args = (state, frozen, stacked, key)
        program = ProgramOutline("iteration", jitted(run.placement.compile(step, state)), args, loops)
        return StageOutline((program,), state, frozen, dtype, rows, row)
    sample = ProgramOutline(
        "sample",
        jitted(run.placement.compile(step.sample(run.data.max_prompt_tokens), state)),
        (state, frozen, stacked, key),
        loops,
    )
    found = _found(run, step, jax.eval_shape(sample.function, *sample.args)[2])
    widths = Widths(run.width, run.data.max_response_tokens)
    learn = jitted(run.placement.compile(step.learn(widths), state))
    programs = (sample, ProgramOutline("learn", learn, (state, frozen, (found, None), key), loops))
    return StageOutline(programs, state, frozen, dtype, rows, row)


def _found(run: RunOutline, step: TwoSteps, samples: PyTree) -> PyTree:
    """Shapes of the second program's batch: the samples, or those that the host has scored."""
    if step.host is None:
        return samples
    lead = leading_axes(run.seeds)
    rows = jax.tree.leaves(samples)[0].shape[: lead + 1]
    scored = (samples, shapes.array(jnp.float32, *rows))
    if step.host.rounds is None:
        return scored
    collect = functools.partial(step.host.rounds.collect, None)
    for _ in range(lead):
        collect = jax.vmap(collect)
    return jax.eval_shape(collect, scored)[0]


def _place_reward(run: RunOutline, source: RewardSource, policy: Policy) -> DeviceReward | HostReward:
    """Place a reward as `methods.online.place_reward` does."""
    if isinstance(source, RewardConfig):
        if source.functions or source.model is None or source.weights not in (None, (1.0,)):
            return HostReward(_unscored)
        source = source.model
    if isinstance(run.stages.get(source), GoldConfig):
        return HostReward(_unscored)
    model = run.outlines.reward_model(source)
    return DeviceReward(model) if model.tokenizer == policy.tokenizer else HostReward(_unscored)


def _unscored(rollout: object) -> Any:
    raise AssertionError("programs are compiled, and do not run")


# ---- stages that sample ----------------------------------------------------------------------------------------------


def sampling_outline(run: RunOutline, name: str, config: Any) -> StageOutline:
    """Outline of a stage that samples in batches of `inference_batch` rows."""
    del name
    policy = run.outlines.policy(config.reference if isinstance(config, EvaluateConfig) else config.policy)
    network, rows = policy.network, run.runtime.inference_batch
    sampling = Sampling(run.data.max_response_tokens, config.temperature, STOP_IDS)
    params, key = placed_frozen(run, policy.params), jax.eval_shape(lambda: jax.random.key(0))
    prompts = shapes.prompts(run.data, rows)

    def sample(params: PyTree, prompts: PromptBatch, key: jax.Array) -> PyTree:
        with jax.sharding.use_abstract_mesh(run.placement.mesh.abstract_mesh):
            return generate(network, params, prompts, key, sampling).rollout

    function = jax.jit(sample, in_shardings=(jax.tree.map(lambda x: x.sharding, params), run.placement.rows(0), None))
    program = ProgramOutline("generate", function, (params, prompts, key), run.data.max_response_tokens - 1)
    return StageOutline((program,), {}, params, network.config.compute_dtype, rows, f"response of {run.width} tokens")


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
