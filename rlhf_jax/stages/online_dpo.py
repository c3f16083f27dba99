"""online_dpo: preference optimisation on the policy's own pairs, which are labelled as they are sampled.

Guo et al. 2024 (OAIF, arXiv:2402.04792): two responses are sampled to each prompt, the one with the higher score is
chosen over the other, and a preference loss takes a step. The annotator is a reward model, as in TRL's
OnlineDPOTrainer, or a judge, as in the paper a language model. Any loss of the `dpo` stage can be taken.

One iteration is one pure function of (state, frozen networks, prompts, key): see `make_step`.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from rlhf_jax.config import Positive, StageName
from rlhf_jax.core import masking
from rlhf_jax.core.keys import derive
from rlhf_jax.core.kl import k1
from rlhf_jax.core.logprobs import sequence_logprobs
from rlhf_jax.core.metrics import Metric, over_updates
from rlhf_jax.data import pipeline
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.models import RewardModel
from rlhf_jax.loading.trainable import begin_policy, dropout_keys, full_params, init_trainable
from rlhf_jax.methods.dpo import SIGMOID, ReferencedBatch, pair_logps, pair_loss, tokens_per_pair
from rlhf_jax.methods.online import OnlineConfig, prompt_keys, train_online
from rlhf_jax.methods.preference_table import PreferenceLossConfig, check_micro_batch
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.rewards.http_judge import HTTPJudge, HTTPJudgeConfig
from rlhf_jax.rewards.judging import load_judge, make_http_judge, pair_scorer
from rlhf_jax.rewards.scorers import joins_program, make_host_scorer
from rlhf_jax.rewards.sources import Reward, RewardSource, find_reward
from rlhf_jax.rewards.tfidf import TfidfJudge
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import gradients, learning_rate, make_optimizer, update
from rlhf_jax.runtime.programs import SEED_AXIS, HostSteps, Step
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate, is_stop
from rlhf_jax.types import PreferenceBatch, PromptBatch, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(OnlineConfig):
    """The reward model or else the judge, and the loss. Losses read the policy as it is, whatever the temperature."""

    kind: Literal["online_dpo"]
    reward_model: RewardSource | None  # reward that chooses between two responses; None: the judge
    beta: Positive  # strength of the pull to the reference
    loss: PreferenceLossConfig = SIGMOID
    # Gold stage, or judge over HTTP, that chooses; None: the reward model.
    judge: StageName | HTTPJudgeConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.judge is None) == (self.reward_model is None):
            raise ValueError(
                f"judge = {self.judge!r} and reward_model = {self.reward_model!r}: exactly one of them chooses, "
                "and the other is None"
            )
        check_micro_batch(self.loss, self.optimizer.micro_batch)


class Samples(NamedTuple):
    """Responses of an iteration, two per prompt, for samples.jsonl."""

    rollout: Rollout
    scores: jax.Array  # [2B]
    kl: jax.Array  # [2B], nats


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks' functions. Parameters: state has `policy`, frozen has `reference` and `reward`.

    Where the policy is an adapter, its base is the reference.
    """

    policy: PolicyNetwork
    reward: ScalarNetwork | None  # None where responses are scored on the host
    stop_ids: tuple[int, ...]
    max_new_tokens: int


def run(config: OnlineDPOConfig, context: Context) -> dict[str, Any]:
    """Trains `context.seeds` policies at once, each with its own prompts, samples and initial key."""
    reference = begin_policy(config.policy, config.tuning, context)
    rows = pipeline.load_rows(context.data, "train")
    pool = pipeline.prompts(rows, reference.tokenizer, context.data)
    report_prompts(context, reference.tokenizer, {"train": rows})
    placement = context.placement(context.seeds)
    annotator = find_annotator(config, context)
    model = annotator if isinstance(annotator, RewardModel) and joins_program(annotator, reference) else None
    networks = Networks(
        policy=reference.network,
        reward=None if model is None else model.network,
        stop_ids=reference.tokenizer.stop_ids,
        max_new_tokens=context.data.max_response_tokens,
    )
    axes = (placement.axes, (SEED_AXIS,) if context.seeds > 1 else ())
    frozen = {"reference": reference.params}
    if model is not None:
        step: Step | HostSteps = make_step(networks, config, *axes)
        frozen["reward"] = model.params
    else:
        if isinstance(annotator, (TfidfJudge, HTTPJudge)):
            scorer = pair_scorer(annotator, reference.tokenizer)
        else:
            scorer = make_host_scorer(annotator, reference, rows, context.data, context.runtime.inference_batch)
        sample, learn = make_halves(networks, config, *axes)
        step = HostSteps(sample, scorer, learn)

    def start(key: PRNGKeyArray) -> TrainState:
        return init_state({"policy": init_trainable(networks.policy, reference.params, key).trained}, config)

    drawn = train_online(
        config,
        context,
        placement,
        reference,
        step=step,
        start=start,
        frozen=frozen,
        prompts=PromptSource(pool, prompt_keys(context), config.batch_size),
        key_figures=("objective/scores", "objective/kl", "rewards/accuracies"),
    )
    return {
        "prompts": len(pool.tokens),
        **drawn,
        "pairs": config.iterations * config.batch_size,
        **(annotator.summary() if isinstance(annotator, HTTPJudge) else {}),
    }


def find_annotator(config: OnlineDPOConfig, context: Context) -> RewardModel | Reward | TfidfJudge | HTTPJudge:
    """Load the reward or judge that labels pairs of responses."""
    if config.reward_model is not None:
        return find_reward(context, config.reward_model)
    if isinstance(config.judge, HTTPJudgeConfig):
        return make_http_judge(config.judge)
    assert config.judge is not None
    return load_judge(context, config.judge)


def init_state(params: dict[str, PyTree], config: OnlineDPOConfig) -> TrainState:
    """The state before the first iteration."""
    return TrainState(jnp.int32(0), params, make_optimizer(config.optimizer, config.updates).init(params))


def make_step(networks: Networks, config: OnlineDPOConfig, axes: tuple[str, ...], loop_axes: tuple[str, ...]) -> Step:
    """One iteration on a PromptBatch: sample two responses to each, score, choose, and all epochs of updates.

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
    networks: Networks, config: OnlineDPOConfig, axes: tuple[str, ...], loop_axes: tuple[str, ...]
) -> tuple[Step, Step]:
    """An iteration in two steps, between which responses are scored: PromptBatch -> Rollout, and (Rollout, scores)."""

    def sample(
        state: TrainState, frozen: dict[str, PyTree], prompts: PromptBatch, run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Rollout]:
        sampling = Sampling(networks.max_new_tokens, config.temperature, networks.stop_ids)
        params = full_params(networks.policy, state.params["policy"], frozen, "reference")
        key = _keys(run_key, state)[0]
        generation = generate(networks.policy, params, prompts, key, sampling, samples=2, loop_axes=loop_axes)
        return state, {}, generation.rollout

    def learn(
        state: TrainState, frozen: dict[str, PyTree], scored: tuple[Rollout, jax.Array], run_key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array], Samples]:
        pairs, samples, metrics = choose_pairs(networks, config, state.params, frozen, *scored, axes)
        state, update_metrics = optimise(networks, config, state, frozen, pairs, _keys(run_key, state)[1:], axes)
        return state, metrics | update_metrics, samples

    return sample, learn


def _keys(run_key: PRNGKeyArray, state: TrainState) -> tuple[PRNGKeyArray, ...]:
    """An iteration's keys: for sampling, the order of minibatches, an adapter's dropout, and stochastic rounding."""
    key = jax.random.fold_in(run_key, state.step)
    return tuple(derive(key, tag) for tag in ("sample", "order", "dropout", "rounding"))


def choose(rollout: Rollout, scores: Float[Array, "N"]) -> tuple[PreferenceBatch, Float[Array, "B"]]:
    """Form a pair from every two rows, the higher score chosen (the first in a tie); also return the margins.

    Two samples of one prompt are exchangeable: in a tie, either answer is equally likely to be first, so that ties
    favour neither in expectation (and two equal answers have no gradient). TRL also chooses the first.
    """
    first, second = scores.reshape(-1, 2).T
    rows = 2 * jnp.arange(len(first))
    chosen, rejected = (jnp.where(wins, rows, rows + 1) for wins in (first >= second, first < second))
    pairs = PreferenceBatch(
        rollout.prompt[rows],
        rollout.prompt_mask[rows],
        rollout.response[chosen],
        rollout.response_mask[chosen],
        rollout.response[rejected],
        rollout.response_mask[rejected],
    )
    return pairs, jnp.abs(first - second)


def choose_pairs(
    networks: Networks,
    config: OnlineDPOConfig,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
    rollout: Rollout,
    scores: jax.Array,
    axes: tuple[str, ...],
) -> tuple[ReferencedBatch, Samples, dict[str, jax.Array]]:
    """From scored responses to pairs, and what the reference says of them, with the metrics of the objective."""
    mask = rollout.response_mask
    policy = full_params(networks.policy, params["policy"], frozen, "reference")
    stats = networks.policy.response_stats(policy, rollout, temperature=config.temperature)
    reference = networks.policy.response_stats(frozen["reference"], rollout, temperature=config.temperature)
    sequence_kl = sequence_logprobs(k1(stats.logprobs, reference.logprobs), mask)

    ended = jnp.any(is_stop(rollout.response, networks.stop_ids) & mask, axis=1)
    penalised = scores - config.missing_eos_penalty * ~ended
    pairs, margins = choose(rollout, penalised)
    said = None
    if config.loss.needs_reference:
        said = pair_logps(config.loss, networks.policy, frozen["reference"], pairs)

    non_score, lengths = -config.beta * sequence_kl, masking.lengths(mask)
    length = lengths.astype(jnp.float32)
    metrics = {
        "objective/scores": masking.mean(penalised, axes),
        "objective/scores_margin": masking.mean(margins, axes),
        "objective/ties": masking.mean((margins == 0).astype(jnp.float32), axes),
        "objective/kl": masking.mean(sequence_kl, axes),
        "objective/entropy": masking.mean(sequence_logprobs(stats.entropy, mask), axes),
        "objective/non_score_reward": masking.mean(non_score, axes),
        "objective/rlhf_reward": masking.mean(penalised + non_score, axes),
        "reward": masking.mean(scores, axes),
        "reward_std": jnp.sqrt(masking.masked_variance(scores, jnp.ones_like(ended), axes)),
        "completions/mean_length": masking.mean(length, axes),
        "completions/min_length": jax.lax.pmin(jnp.min(length), axes) if axes else jnp.min(length),
        "completions/max_length": jax.lax.pmax(jnp.max(length), axes) if axes else jnp.max(length),
        "val/num_eos_tokens": masking.count(ended, axes),
        "num_tokens": masking.total(lengths, axes),
    }
    return ReferencedBatch(pairs, said), Samples(rollout, scores, sequence_kl), metrics


def optimise(
    networks: Networks,
    config: OnlineDPOConfig,
    state: TrainState,
    frozen: dict[str, PyTree],
    pairs: ReferencedBatch,
    keys: tuple[PRNGKeyArray, ...],
    axes: tuple[str, ...],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Every epoch's minibatches, each epoch in another order; metrics are their means."""
    network, (order_key, dropout_key, rounding_key) = networks.policy, keys
    optimizer = make_optimizer(config.optimizer, config.updates)
    schedule = learning_rate(config.optimizer, config.updates)
    whole_batch = masking.gather_rows(pairs, axes)
    rows = whole_batch.pairs.chosen.shape[0]
    order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(order_key, epoch), rows))
    updates = jnp.arange(config.epochs * config.minibatches)
    minibatches = order(jnp.arange(config.epochs)).reshape(len(updates), -1)

    def loss_fn(per_pair: jax.Array, params: PyTree, given: tuple) -> tuple[jax.Array, dict[str, Metric]]:
        batch, dropout = given
        policy = full_params(network, params["policy"], frozen, "reference")
        return pair_loss(
            config.loss, network, policy, batch, dropout, beta=config.beta, axes=axes, tokens_per_pair=per_pair
        )

    def update_minibatch(carry: tuple[PyTree, Any], given: tuple[jax.Array, jax.Array]) -> tuple[tuple, tuple]:
        (params, opt_state), (indices, number) = carry, given
        own = masking.own_rows(indices, axes)
        minibatch = jax.tree.map(lambda leaf: leaf[own], whole_batch)
        dropout = dropout_keys(network, dropout_key, number, len(own), axes)
        loss, metrics, grads = gradients(
            config.optimizer,
            functools.partial(loss_fn, tokens_per_pair(minibatch.pairs.chosen_mask, axes)),
            params,
            (minibatch, dropout),
            lambda given: masking.rows(given[0].pairs.chosen, axes),
            axes,
        )
        params, opt_state, norms = update(
            optimizer, grads, params, opt_state, axes, key=jax.random.fold_in(rounding_key, number)
        )
        return (params, opt_state), (metrics, {"loss": loss, **norms})

    start = (state.params, state.opt_state)
    (params, opt_state), (metrics, numbers) = jax.lax.scan(update_minibatch, start, (minibatches, updates))
    logged = over_updates(metrics) | jax.tree.map(jnp.mean, numbers)
    logged["learning_rate"] = schedule(state.step * len(updates))
    return TrainState(state.step + 1, params, opt_state), logged
