"""One iteration of every policy-gradient method: sample, score, estimate advantages, and all epochs of updates.

A pure function of (state, frozen networks, prompts, key): see `make_step`. The halves of it are in `experience.py`,
from scored responses to advantages, and `policy_update.py`, from advantages to parameters.

Details of Huang et al. 2024 (arXiv:2403.17031, "N+") and of their study of Ziegler et al.'s code (2023, "N") that stand
here: no dropout (N+), log-probabilities of logits over the temperature (N), old log-probabilities by the learner's own
forward pass unless the config says otherwise, whole runs from one key a seed, of which no part is used twice.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.core import masking
from rlhf_jax.core.keys import derive
from rlhf_jax.core.kl import adaptive_kl_coef
from rlhf_jax.data import pipeline
from rlhf_jax.data.prompts import MixedSource, PromptSource, at_round
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.trainable import begin_policy, init_trainable, trainable
from rlhf_jax.methods import policy_optimizer
from rlhf_jax.methods.dynamic_sampling import collect, empty, fill, filled, is_full
from rlhf_jax.methods.experience import gather_experience
from rlhf_jax.methods.online import prompt_keys, train_online
from rlhf_jax.methods.policy_method import Method, Networks, PolicyGradientConfig, Sampled, Samples
from rlhf_jax.methods.policy_update import optimise
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.rewards.scorers import HostScorer, joins_program, make_host_scorer
from rlhf_jax.rewards.sources import find_reward
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.programs import SEED_AXIS, HostSteps, Rounds, Step
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import PromptBatch, TokenBatch


def make_step(
    networks: Networks, config: PolicyGradientConfig, method: Method, axes: tuple[str, ...], loop_axes: tuple[str, ...]
) -> Step:
    """One iteration on a PromptBatch (with demonstrations beside it where there is a pretraining mix).

    With dynamic sampling the batch has the prompts of all rounds, [B, rounds, P].

    Args: axes are the mapped axes that rows are split over; loop_axes those of the seeds around the iteration.
    """
    reward = networks.reward
    assert reward is not None
    sample, learn = make_halves(networks, config, method, axes, loop_axes)

    def scored(
        state: TrainState, frozen: dict[str, PyTree], batch: Any, run_key: PRNGKeyArray
    ) -> tuple[Sampled, jax.Array]:
        _, _, sampled = sample(state, frozen, batch, run_key)
        return sampled, reward.scores(frozen["reward"], sampled.rollout)

    def step(
        state: TrainState, frozen: dict[str, PyTree], batch: Any, run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Samples]:
        return learn(state, frozen, scored(state, frozen, batch, run_key), run_key)

    def dynamic_step(
        state: TrainState, frozen: dict[str, PyTree], batch: Any, run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Samples]:
        prompts, demonstrations = _parts(batch)

        def draw(prompts: PromptBatch) -> tuple[Sampled, jax.Array]:
            return scored(state, frozen, prompts, run_key)

        filling = fill(config, method, draw, prompts, axes, loop_axes)
        return learn(state, frozen, (filling, demonstrations), run_key)

    return dynamic_step if method.dynamic_sampling_rounds else step


def make_halves(
    networks: Networks, config: PolicyGradientConfig, method: Method, axes: tuple[str, ...], loop_axes: tuple[str, ...]
) -> tuple[Step, Step]:
    """An iteration in two steps, between which responses are scored: PromptBatch -> Sampled, and (Sampled, scores).

    With dynamic sampling the first is a round of it, and the second takes (PartialBatch, demonstrations).
    """

    def sample(
        state: TrainState, frozen: dict[str, PyTree], batch: Any, run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Sampled]:
        prompts, demonstrations = _parts(batch)
        sampling = Sampling(networks.max_new_tokens, config.temperature, networks.stop_ids)
        params = networks.full_params(state.params, frozen)["policy"]
        generation = generate(
            networks.policy,
            params,
            prompts,
            _keys(run_key, state)[0],
            sampling,
            samples=method.num_generations,
            loop_axes=loop_axes,
        )
        return state, {}, Sampled(generation.rollout, generation.logprobs, demonstrations)

    def learn(
        state: TrainState, frozen: dict[str, PyTree], scored: tuple[Any, Any], run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Samples]:
        if method.dynamic_sampling_rounds:
            sampled, scores, useful, metrics = filled(method, *scored, axes)
        else:
            (sampled, scores), useful = scored, None
            metrics = {
                "reward": masking.mean(scores, axes),
                "reward_std": jnp.sqrt(masking.masked_variance(scores, jnp.ones(scores.shape, bool), axes)),
            }
        kl_coef = state.controller["kl_coef"] if config.kl_controller else method.kl_coef
        params, keys = networks.full_params(state.params, frozen), _keys(run_key, state)[1:]
        batch, samples, found = gather_experience(
            networks, config, method, params, frozen, sampled, scores, axes, kl_coef=kl_coef, useful=useful
        )
        state, updated = optimise(
            networks, config, method, state, frozen, batch, sampled.demonstrations, keys, axes, kl_coef=kl_coef
        )
        if config.kl_controller is not None:
            adapted = adaptive_kl_coef(
                kl_coef,
                found["objective/kl"],
                target=config.kl_controller.target,
                horizon=config.kl_controller.horizon,
                episodes=config.batch_size,
            )
            state = state._replace(controller={"kl_coef": adapted})
        return state, found | metrics | updated, samples

    return sample, learn


def host_rounds(config: PolicyGradientConfig, method: Method) -> Rounds | None:
    """Dynamic sampling between two halves, where there is some."""
    if not method.dynamic_sampling_rounds:
        return None

    def split(batch: Any) -> Iterator[Any]:
        prompts, demonstrations = _parts(batch)
        for number in range(method.dynamic_sampling_rounds):
            one = at_round(prompts, number)
            yield one if demonstrations is None else (one, demonstrations)

    def collected(before: Any, new: tuple[Sampled, jax.Array]) -> tuple[Any, jax.Array]:
        filling = empty(new[0], method.dynamic_sampling_rounds) if before is None else before[0]
        filling = collect(config, method, filling, *new, ())
        return (filling, new[0].demonstrations), is_full(filling, ())

    return Rounds(split, collected)


def _parts(batch: Any) -> tuple[PromptBatch, TokenBatch | None]:
    """An iteration's prompts, and its demonstrations where there are some."""
    return (batch, None) if isinstance(batch, PromptBatch) else batch


def _keys(run_key: PRNGKeyArray, state: TrainState) -> tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray]:
    """An iteration's keys: for sampling, for the order of minibatches, and for stochastic rounding."""
    key = jax.random.fold_in(run_key, state.step)
    return derive(key, "sample"), derive(key, "order"), derive(key, "rounding")


def init_state(params: dict[str, PyTree], config: PolicyGradientConfig, method: Method) -> TrainState:
    """The state before the first iteration; an adaptive coefficient is part of it, and so one a seed."""
    controller = {"kl_coef": jnp.float32(method.kl_coef)} if config.kl_controller else ()
    return TrainState(jnp.int32(0), params, policy_optimizer.make_optimizer(config, method).init(params), controller)


class Scoring(NamedTuple):
    """Source of scores: a network inside the compiled iteration, or the host between its two halves."""

    on_device: RewardModel | None
    on_host: HostScorer | None


def scoring(config: PolicyGradientConfig, context: Context, policy: Policy, rows: Sequence[dict[str, Any]]) -> Scoring:
    """On the device where the reward is a model that reads the policy's tokens."""
    reward_model = find_reward(context, config.reward_model)
    if joins_program(reward_model, policy):
        return Scoring(reward_model, None)
    return Scoring(None, make_host_scorer(reward_model, policy, rows, context.data, context.runtime.inference_batch))


class ValueStart(NamedTuple):
    """A value function before the first iteration, without an adapter."""

    network: Any  # as in Networks
    params: PyTree


StartValue = Callable[[Policy, RewardModel | None, PRNGKeyArray], ValueStart]


def no_value(policy: Policy, reward_model: RewardModel | None, key: PRNGKeyArray) -> ValueStart:
    """Methods without a critic."""
    del policy, reward_model, key
    return ValueStart(None, None)


def run(config: PolicyGradientConfig, method: Method, start_value: StartValue, context: Context) -> dict[str, Any]:
    """Trains `context.seeds` policies at once, each with its own prompts, samples and initial key."""
    reference = begin_policy(config.policy, config.tuning, context)
    rows = pipeline.load_rows(context.data, "train")
    pool = pipeline.prompts(rows, reference.tokenizer, context.data)
    report_prompts(context, reference.tokenizer, {"train": rows})
    scores = scoring(config, context, reference, rows)

    placement = context.placement(context.seeds)
    reward_model = scores.on_device and scores.on_device.members()[0]
    value = start_value(reference, reward_model, derive(context.key("init"), "value"))
    separate = trainable(value.network, config.tuning) if isinstance(value.network, ScalarNetwork) else None
    networks = Networks(
        policy=reference.network,
        value=separate or value.network,
        reward=scores.on_device.network if scores.on_device else None,
        stop_ids=reference.tokenizer.stop_ids,
        max_new_tokens=context.data.max_response_tokens,
    )
    axes = (placement.axes, (SEED_AXIS,) if context.seeds > 1 else ())
    frozen = {"reference": reference.params}
    if scores.on_device:
        step: Step | HostSteps = make_step(networks, config, method, *axes)
        frozen["reward"] = scores.on_device.params
    else:
        on_host = scores.on_host
        assert on_host is not None
        sample, learn = make_halves(networks, config, method, *axes)
        rounds = host_rounds(config, method)
        step = HostSteps(sample, lambda sampled: on_host(sampled.rollout), learn, rounds)
    if separate is not None:
        frozen["value_base"] = value.params if config.tuning.lora else None

    def start(key: PRNGKeyArray) -> TrainState:
        adapter_key, value_key, value_adapter_key = (derive(key, tag) for tag in ("adapter", "value", "value adapter"))
        params, own = {"policy": init_trainable(networks.policy, reference.params, adapter_key).trained}, value.params
        if context.seeds > 1:
            own = start_value(reference, reward_model, value_key).params
        if separate is not None:
            params["value"] = init_trainable(separate, own, value_adapter_key).trained
        elif value.network == "shared":
            params["value"] = own
        return init_state(params, config, method)

    groups = config.batch_size // method.num_generations
    prompts = PromptSource(pool, prompt_keys(context), groups, rounds=method.dynamic_sampling_rounds)
    if config.ptx is not None:
        demonstrations = pipeline.demonstrations(rows, reference.tokenizer, context.data)
        keys = tuple(context.key("demonstrations", k) for k in range(context.seeds))
        prompts = MixedSource(prompts, demonstrations, keys, config.ptx.batch_size)
    drawn = train_online(
        config,
        context,
        placement,
        reference,
        step=step,
        start=start,
        frozen=frozen,
        prompts=prompts,
        key_figures=("objective/scores", "objective/kl", "val/num_eos_tokens"),
    )
    return {"prompts": len(pool.tokens), **drawn, "episodes": config.iterations * config.batch_size}
