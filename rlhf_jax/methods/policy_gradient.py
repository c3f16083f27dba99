"""One iteration of PPO, of the group methods and of online DPO, from prompts to new parameters.

    1. sample responses to a batch of prompts                                        Iteration.sample
    2. score them, with a network in this program or with a function on the host     Iteration.step, two_steps.py
    3. old and reference log-probabilities, KL divergence, shaped scores             Iteration.evaluate, old_policy
    4. token rewards and advantages                                                  PolicyGradient.prepare
    5. epochs of minibatches, one update each                                        Iteration.learn, optimise
    6. loss of a minibatch: policy, values, KL, entropy                              PolicyGradient.loss

`stages/ppo.py` and `stages/group_rl.py` pass in the policy loss and the advantages as functions. Online DPO replaces
steps 4 and 6 by those of `methods/online_pairs.py`. An iteration is a pure function of (state, frozen networks, batch,
key); `runtime/programs.py` compiles it for devices and seeds.

Implementation details from Huang et al. 2024 (arXiv:2403.17031, "N+") and from their study of Ziegler et al.'s code
(2023, "N"): no dropout (N+), logits divided by the temperature before log-probabilities (N), the score on the last
response token (N+), the KL penalty in the rewards (N), clipped policy and value losses (N), minibatches of whole
responses, reshuffled every epoch (N), Adam's epsilon of 1e-5 (N, set in the optimizer's config).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from rlhf_jax.core import masking
from rlhf_jax.core.importance import sampler_difference, weight_metrics
from rlhf_jax.core.keys import derive
from rlhf_jax.core.metrics import BeforeUpdates, Mean, masked_mean, over_updates
from rlhf_jax.core.metrics import values as numbers_of
from rlhf_jax.core.policy_losses import Aggregation, TokenLosses, explained_variance, ratio_metrics, value_loss
from rlhf_jax.core.sequences import joined
from rlhf_jax.loading.trainable import dropout_keys
from rlhf_jax.methods import minibatches, policy_optimizer
from rlhf_jax.methods.minibatches import Indices
from rlhf_jax.methods.per_run import IN_ITERATION, of_run
from rlhf_jax.methods.policy_method import KLEstimator, OnlineMethod, Rows
from rlhf_jax.methods.policy_metrics import objective_metrics, score_metrics, shaped_rewards
from rlhf_jax.methods.policy_parts import (
    Advantages,
    Coefficient,
    Evaluated,
    Experience,
    Metrics,
    Numbers,
    OldPolicy,
    OnlineBatch,
    Params,
    Responses,
    Sampled,
    Samples,
    Setting,
    ValueTargets,
)
from rlhf_jax.methods.token_record import samples_of
from rlhf_jax.models.head import token_stats, token_stats_with_entropy
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import accumulated, stop_frozen, update
from rlhf_jax.runtime.programs import Step
from rlhf_jax.runtime.rounding import float32
from rlhf_jax.sampling.buckets import last_tokens
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.continuous import default_refill, generate_queue
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Packing, Sequences

AdvantageFunction = Callable[[Array, Array, Array, Array, tuple[str, ...]], Advantages]
"""Function of token rewards, values (0 without a value function), response mask, loss mask and axes."""
Learned = tuple[TrainState, Numbers, Samples]
Updated = tuple[Metrics, Numbers]


@dataclasses.dataclass(frozen=True)
class Iteration(Setting, Generic[Rows]):
    """An iteration of one method in one setting."""

    method: OnlineMethod[Rows]

    def init_state(self, params: Params) -> TrainState:
        """Make the state before the first iteration."""
        optimizer = policy_optimizer.make_optimizer(self.config, self.method)
        controller = {"kl_coef": jnp.float32(self.method.kl_coef)} if self.method.kl_controller else ()
        return TrainState(jnp.int32(0), params, optimizer.init(params), controller)

    def key(self, run_key: PRNGKeyArray, step: Int[Array, ""] | int, purpose: str) -> PRNGKeyArray:
        """Derive an iteration's key for one purpose: sample, order, dropout or rounding."""
        return derive(jax.random.fold_in(run_key, step), purpose)

    def sample(
        self, state: TrainState, frozen: Params, batch: OnlineBatch, run_key: PRNGKeyArray, prompt_width: int
    ) -> Sampled:
        """Sample responses to the prompts from the policy. No prompt has more than `prompt_width` tokens."""
        samples, slots = self.method.num_generations, self.config.slots
        policy, params = self.networks.policy, self.networks.full_params(state.params, frozen)["policy"]
        prompts, key = last_tokens(batch.prompts, prompt_width), self.key(run_key, state.step, "sample")
        sampling = Sampling(self.networks.max_new_tokens, self.config.temperature, self.networks.stop_ids)
        if slots is None:
            options = {"key": key, "sampling": sampling, "samples": samples, "loop_axes": self.loop_axes}
            sample = functools.partial(generate, policy, params, **options)
            generation = self.by_slices(sample, prompts, responses=samples, each=samples)
        else:
            options = {"slots": slots, "refill": default_refill(slots, samples), "samples": samples}
            generation, _ = generate_queue(policy, params, prompts, key, sampling, **options)
        prompt, mask = (jnp.repeat(leaf, samples, axis=0) for leaf in batch.prompts[:2])
        return Sampled(
            generation.rollout._replace(prompt=prompt, prompt_mask=mask), generation.logprobs, batch.demonstrations
        )

    def step(self, reward: ScalarNetwork) -> Step:
        """Make the iteration as one program, with a reward network that reads the policy's tokens."""

        def step(state: TrainState, frozen: Params, batch: OnlineBatch, run_key: PRNGKeyArray) -> Learned:
            draw = functools.partial(self.draw, reward, state, frozen, run_key, batch.prompts.tokens.shape[-1])
            rounds = self.method.dynamic_sampling
            if rounds is None:
                responses = self.scored(*draw(batch))
            else:
                responses = rounds.responses(rounds.fill(draw, batch, self.axes, self.loop_axes), self.axes)
            return self.learn(state, frozen, responses, joined(responses.sampled.rollout), run_key)

        return step

    def draw(
        self,
        reward: ScalarNetwork,
        state: TrainState,
        frozen: Params,
        run_key: PRNGKeyArray,
        prompt_width: int,
        batch: OnlineBatch,
    ) -> tuple[Sampled, Float[Array, "B"]]:
        """Sample responses and score them."""
        sampled = self.sample(state, frozen, batch, run_key, prompt_width)
        return sampled, self.scores(reward, frozen["reward"], joined(sampled.rollout))

    def scored(self, sampled: Sampled, scores: Float[Array, "B"]) -> Responses:
        """Combine responses with the reward's scores; all of them are trained on."""
        return Responses(sampled, scores, None, score_metrics(scores, self.axes))

    def learn(
        self,
        state: TrainState,
        frozen: Params,
        responses: Responses,
        sequences: Sequences,
        run_key: PRNGKeyArray,
        packings: Packing | None = None,
    ) -> Learned:
        """Compute the next state from scored responses: steps 3 to 6. The networks read `sequences`.

        Args: packings of the minibatches, [updates, G, ...].
        """
        iteration, controller = of_run(self, frozen, IN_ITERATION), self.method.kl_controller
        kl_coef = state.controller["kl_coef"] if controller else iteration.method.kl_coef
        params = iteration.networks.full_params(state.params, frozen)
        evaluated = iteration.evaluate(params, frozen, responses, sequences)
        objective = objective_metrics(evaluated, kl_coef, iteration.axes)
        rows, prepared = iteration.method.learner.prepare(iteration, evaluated, frozen, kl_coef)
        state, updated = iteration.optimise(state, frozen, rows, responses.sampled, run_key, kl_coef, packings)
        if controller:
            adapted = controller.next(kl_coef, objective["objective/kl"], iteration.config.batch_size)
            state = state._replace(controller={"kl_coef": adapted})
        logged = objective | numbers_of(evaluated.old.metrics) | prepared | responses.metrics | updated
        return state, logged, samples_of(responses, evaluated, rows, kl_coef, iteration.config.tokens_recorded)

    def evaluate(self, params: Params, frozen: Params, responses: Responses, sequences: Sequences) -> Evaluated:
        """Compute log-probabilities and values before the first update, and shape the scores.

        The logged KL divergence is the sum of the method's own estimator over a response.
        """
        old = self.old_policy(params, sequences, responses.sampled.logprobs)
        reference = kl = None
        if self.method.measures_kl:
            stats = functools.partial(self.networks.policy.response_stats, temperature=self.config.temperature)
            reference = self.by_slices(lambda rows: stats(frozen["reference"], rows).logprobs, sequences)
            kl = self.method.kl_estimator(old.logprobs, reference, old.logprobs)
        ended, lengths = self.networks.has_ended(sequences), masking.lengths(sequences.response_mask)
        scores = self.method.shaping(responses.scores, lengths, ended, max_tokens=self.networks.max_new_tokens)
        return Evaluated(sequences, scores, ended, responses.useful, old, reference, kl)

    def old_policy(self, params: Params, sequences: Sequences, sampler_logprobs: Float[Array, "B T"]) -> OldPolicy:
        r"""Recompute old log-probabilities with the learner, so that the first ratio is 1 ("decoupled" in verl).

        With `use_sampler_logprobs`, reuse the sampler's ("bypass" in verl): the ratio $\pi_{learner} / \pi_{sampler}$
        may differ from 1 from the first update on, and the loss clips it. Entropy is then estimated by $-\log \pi$ of
        the sampled tokens.
        """
        mask = sequences.response_mask
        sampler_logprobs = sampler_logprobs[:, : mask.shape[1]]
        if self.method.use_sampler_logprobs:
            values = self.by_slices(functools.partial(self.networks.values, params), sequences)
            return OldPolicy(sampler_logprobs, -sampler_logprobs, values, None, {})
        forward = functools.partial(self.networks.forward, params, temperature=self.config.temperature)
        stats, values = self.by_slices(forward, sequences)
        metrics, weights = sampler_difference(stats.logprobs, sampler_logprobs, mask, self.axes), None
        if self.method.importance:
            weights = self.method.importance(stats.logprobs, sampler_logprobs, mask)
            metrics |= weight_metrics(weights, mask, self.axes)
        return OldPolicy(stats.logprobs, stats.entropy, values, weights, metrics)

    def optimise(
        self,
        state: TrainState,
        frozen: Params,
        rows: Rows,
        sampled: Sampled,
        run_key: PRNGKeyArray,
        kl_coef: Coefficient,
        packings: Packing | None,
    ) -> tuple[TrainState, Numbers]:
        """Train on minibatches, reshuffled every epoch; metrics are means over the updates."""
        config, method, axes, learner = self.config, self.method, self.axes, self.method.learner
        order, dropout, rounding = (self.key(run_key, state.step, name) for name in ("order", "dropout", "rounding"))
        optimizer = policy_optimizer.make_optimizer(config, method)
        rows, demonstrations = minibatches.shared((rows, sampled.demonstrations), config.minibatches, axes)
        updates = config.epochs * config.minibatches
        shuffled = functools.partial(minibatches.shuffled, order, epochs=config.epochs, updates=updates)

        def update_minibatch(carry: tuple[Params, PyTree], given: Indices) -> tuple[tuple[Params, PyTree], Updated]:
            params, opt_state = carry
            minibatch = minibatches.taken(rows, given.rows, axes)
            if learner.packed is not None and given.packing is not None:
                minibatch = learner.packed(minibatch, given.packing)
            keys = dropout_keys(self.networks.policy, dropout, given.number, len(jax.tree.leaves(minibatch)[0]), axes)

            def loss_fn(params: Params, part: tuple[Rows, Key[Array, "B"] | None]) -> tuple[Array, Metrics]:
                params = self.networks.full_params(stop_frozen(config.optimizer, params), frozen)
                return learner.loss(self, params, part[0], part[1], whole=minibatch, kl_coef=kl_coef)

            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            if rows_at_once := config.optimizer.micro_batch:
                grad_fn = accumulated(grad_fn, rows_at_once, lambda part: learner.weight(part[0], axes), axes)
            (loss, metrics), grads = grad_fn(float32(params), (minibatch, keys))
            numbers = {}
            if method.ptx:
                mixed = minibatches.taken(demonstrations, given.demonstrations, axes)
                ptx_loss, ptx_grads = method.ptx.gradients(self.networks, config.optimizer, params, frozen, mixed, axes)
                loss, numbers = loss + method.ptx.coef * ptx_loss, {"loss/ptx_avg": ptx_loss}
                grads = jax.tree.map(lambda grad, ptx: grad + method.ptx.coef * ptx, grads, ptx_grads)
            grads = policy_optimizer.freeze_policy(grads, method, state.step)
            key = jax.random.fold_in(rounding, given.number)
            params, opt_state, norms = update(optimizer, grads, params, opt_state, axes, key=key)
            return (params, opt_state), (metrics, {**numbers, "loss": loss, **norms})

        demonstration_rows = None if demonstrations is None else shuffled(demonstrations, first=config.epochs)
        given = Indices(shuffled(rows), demonstration_rows, jnp.arange(updates), packings)
        carry = state.params, state.opt_state
        if updates == 1:  # without a loop, the compiler shares the forward pass with the old policy's
            carry, found = update_minibatch(carry, jax.tree.map(lambda leaf: leaf[0], given))
            metrics, numbers = jax.tree.map(lambda leaf: leaf[None], found)
        else:
            carry, (metrics, numbers) = jax.lax.scan(update_minibatch, carry, given)
        rates = policy_optimizer.learning_rates(config, method, state.step)
        state = state._replace(step=state.step + 1, params=carry[0], opt_state=carry[1])
        return state, over_updates(metrics) | jax.tree.map(jnp.mean, numbers) | rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """The learner of PPO and of the group methods."""

    advantages: AdvantageFunction
    policy_loss: Callable[[Array, Array, Array, Array], TokenLosses]  # a loss of core/policy_losses.py, options bound
    aggregation: Aggregation
    loss_penalty: KLEstimator | None  # estimator of the KL penalty in the loss; None: the penalty is in the rewards
    use_sampler_logprobs: bool = False  # as in OnlineMethod
    entropy_coef: float = 0.0
    vf_coef: float = 0.0
    value_clip: float = 0.0
    reject_truncated: bool = False  # leave responses without EOS out of the losses

    def prepare(
        self, setting: Setting, evaluated: Evaluated, frozen: Params, kl_coef: Coefficient
    ) -> tuple[Experience, Numbers]:
        """Compute token rewards from scores and KL divergence, and from these the advantages."""
        del frozen
        old, mask = evaluated.old, evaluated.sequences.response_mask
        rewards = shaped_rewards(evaluated, 0.0 if self.loss_penalty else kl_coef)
        trained = mask & evaluated.ended[:, None] if self.reject_truncated else mask
        trained = trained if evaluated.useful is None else trained & evaluated.useful[:, None]
        values = jnp.zeros_like(rewards) if old.values is None else old.values
        advantages, returns = self.advantages(rewards, values, mask, trained, setting.axes)
        targets, numbers = None, {}
        if old.values is not None and returns is not None:
            targets = ValueTargets(old.values, returns)
            numbers["val/explained_variance"] = explained_variance(old.values, returns, mask, setting.axes)
        ref_logprobs = evaluated.ref_logprobs if self.loss_penalty else None
        sequences = evaluated.sequences._replace(packing=None)  # minibatches have packings of their own
        rows = Experience(sequences, old.logprobs, advantages, trained, targets, ref_logprobs, old.weights)
        return rows, numbers

    def loss(
        self,
        setting: Setting,
        params: Params,
        rows: Experience,
        dropout: Key[Array, "B"] | None,
        *,
        whole: Experience,
        kl_coef: Coefficient,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Sum the policy loss and the method's other terms: value loss, KL penalty, entropy bonus.

        The value loss is a mean over tokens; the other terms use the method's aggregation.
        """
        del dropout, whole  # with dropout, the first ratio would not be 1
        mask, axes = rows.loss_mask, setting.axes
        stats_fn = token_stats_with_entropy if self.entropy_coef else token_stats
        stats, values = setting.networks.forward(
            params, rows.sequences, temperature=setting.config.temperature, stats_fn=stats_fn
        )

        def aggregate(x: Float[Array, "B T"]) -> Float[Array, ""]:
            return self.aggregation.reduce(x, mask, max_tokens=setting.networks.max_new_tokens, axes=axes)

        tokens = self.policy_loss(stats.logprobs, rows.logprobs, rows.advantages, mask)
        loss = policy = aggregate(tokens.losses if rows.weights is None else rows.weights * tokens.losses)
        count = self.weight(rows, axes)
        metrics: Metrics = {
            "loss/policy_avg": Mean(policy, count),
            "policy/entropy_avg": masked_mean(stats.entropy, mask, axes),
            **ratio_metrics(stats.logprobs, rows.logprobs, tokens.clipped, mask, axes),
        }
        if self.use_sampler_logprobs:
            sampler = sampler_difference(stats.logprobs, rows.logprobs, mask, axes)
            metrics |= {name: BeforeUpdates(metric) for name, metric in sampler.items()}
        if values is not None and rows.values is not None:
            value, value_metrics = value_loss(values, *rows.values, mask, clip_range=self.value_clip, axes=axes)
            loss = loss + self.vf_coef * value
            metrics |= {"loss/value_avg": Mean(value, count), **value_metrics}
        if self.loss_penalty and rows.ref_logprobs is not None:
            three = (jnp.where(mask, x, 0) for x in (stats.logprobs, rows.ref_logprobs, rows.logprobs))
            divergence = aggregate(self.loss_penalty(*three))
            loss = loss + kl_coef * divergence
            metrics["loss/kl_avg"] = Mean(divergence, count)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * aggregate(stats.entropy)
        return loss, metrics

    def packed(self, rows: Experience, packing: Packing) -> Experience:
        """Add its packing to a minibatch."""
        return rows._replace(sequences=rows.sequences._replace(packing=packing))

    def weight(self, rows: Experience, axes: tuple[str, ...]) -> Int[Array, ""]:
        """Count the tokens or responses that the policy loss averages over."""
        return self.aggregation.weight(rows.loss_mask, axes)
