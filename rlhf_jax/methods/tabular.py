r"""Policies over finitely many responses to one prompt: exact optima, and training with the losses of this package.

Every expectation is a sum over the responses, so that the result of a method can be compared with the optimum in closed
form. A policy is a vector of N log-probabilities, $\log \pi = \log\mathrm{softmax}(\log \pi_{ref} + X w)$ with
features X and weights w, which start at 0. With `jnp.eye(N)` as features, each response has a logit of its own. With
shared features, an update of one response moves all similar ones.

notebooks/ uses this module; the stages of `stages/` train networks with the same losses.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rlhf_jax.core import kl, masking
from rlhf_jax.core.advantages import gae, token_rewards
from rlhf_jax.core.policy_losses import ppo_clip, value_loss
from rlhf_jax.methods.dpo import PairLogps, preference_loss
from rlhf_jax.methods.preference_table import PreferenceLossConfig

Number = float | Float[Array, ""]


def optimum(ref_logprobs: Float[Array, "N"], rewards: Float[Array, "N"], *, beta: Number) -> Float[Array, "N"]:
    r"""Compute the policy that maximises $\mathbb{E}_\pi[r] - \beta\, KL(\pi \| \pi_{ref})$.

    $\log \pi^*(y) = \log \pi_{ref}(y) + r(y) / \beta - \log Z$, eq. 4 of Rafailov et al. 2023 (arXiv:2305.18290).
    """
    return jax.nn.log_softmax(ref_logprobs + rewards / beta)


def divergence(logprobs: Float[Array, "*times N"], ref_logprobs: Float[Array, "N"]) -> Float[Array, "*times"]:
    r"""$KL(\pi \| \pi_{ref})$ in nats, for one policy or for several in the leading axes."""
    reference = jnp.broadcast_to(ref_logprobs, logprobs.shape)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - reference), axis=-1)


def mean(logprobs: Float[Array, "*times N"], values: Float[Array, "N"]) -> Float[Array, "*times"]:
    r"""$\mathbb{E}_\pi[f] = \sum_y \pi(y) f(y)$, for one policy or for several in the leading axes."""
    return jnp.sum(jnp.exp(logprobs) * jnp.broadcast_to(values, logprobs.shape), axis=-1)


def win_probabilities(rewards: Float[Array, "N"]) -> Float[Array, "N N"]:
    r"""$p(y_i \succ y_j) = \sigma(r_i - r_j)$: the Bradley-Terry model of preferences (Bradley & Terry 1952)."""
    return jax.nn.sigmoid(rewards[:, None] - rewards[None, :])


class Pairs(NamedTuple):
    """Preference pairs among the responses, and the share of the data that each of them has."""

    chosen: Int[Array, "P"]
    rejected: Int[Array, "P"]
    share: Float[Array, "P"]


def all_pairs(wins: Float[Array, "N N"]) -> Pairs:
    """List all ordered pairs of different responses, weighted by the probability that the first one is preferred.

    This is the whole population of labels of uniformly drawn pairs, without sampling noise.
    """
    count = len(wins)
    chosen, rejected = jnp.nonzero(~jnp.eye(count, dtype=bool), size=count * (count - 1))
    share = wins[chosen, rejected]
    return Pairs(chosen, rejected, share / jnp.sum(share))


@functools.partial(jax.jit, static_argnames=("loss", "steps"))
def train_on_pairs(
    pairs: Pairs,
    ref_logprobs: Float[Array, "N"],
    features: Float[Array, "N D"],
    lengths: Int[Array, "N"],
    *,
    loss: PreferenceLossConfig,
    beta: Number,
    learning_rate: Number,
    steps: int,
) -> Float[Array, "times N"]:
    """Minimise a preference loss over all pairs at once by Adam; return the log-probabilities before and after steps.

    Args: lengths are the numbers of tokens of the responses, which some losses divide by.
    """
    optimizer = optax.adam(learning_rate)
    tokens = lengths[pairs.chosen], lengths[pairs.rejected]
    per_pair = jnp.sum(pairs.share * tokens[0].astype(jnp.float32))

    def logprobs(weights: Float[Array, "D"]) -> Float[Array, "N"]:
        return jax.nn.log_softmax(ref_logprobs + features @ weights)

    def pair_logps(each: Float[Array, "N"], weights: Float[Array, "P"] | None = None) -> PairLogps:
        chosen, rejected = each[pairs.chosen], each[pairs.rejected]
        return PairLogps(chosen, rejected, chosen, rejected, weights)

    def mean_loss(weights: Float[Array, "D"]) -> Float[Array, ""]:
        policy = pair_logps(logprobs(weights), pairs.share * len(pairs.share))
        return preference_loss(
            loss, policy, pair_logps(ref_logprobs), tokens, beta=beta, axes=(), tokens_per_pair=per_pair
        )[0]

    def step(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], Array]:
        weights, state = carry
        updates, state = optimizer.update(jax.grad(mean_loss)(weights), state)
        weights = jnp.asarray(optax.apply_updates(weights, updates))
        return (weights, state), logprobs(weights)

    start = jnp.zeros(features.shape[1])
    _, curve = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return jnp.concatenate([logprobs(start)[None], curve])


class Slopes(NamedTuple):
    """Loss of each pair, and its derivatives in the log-probabilities of the two responses."""

    loss: Float[Array, "P"]
    chosen: Float[Array, "P"]
    rejected: Float[Array, "P"]


@functools.partial(jax.jit, static_argnames=("loss", "tokens"))
def slopes(
    loss: PreferenceLossConfig,
    chosen_logratios: Float[Array, "P"],
    rejected_logratios: Float[Array, "P"],
    *,
    ref_logprob: Number,
    tokens: int,
    beta: Number,
) -> Slopes:
    """Compute a preference loss and its derivatives for pairs with given log-ratios, each pair alone.

    Args: all responses have `ref_logprob` nats under the reference, and `tokens` tokens.
    """
    reference = jnp.full(1, ref_logprob)
    length = jnp.full(1, tokens, jnp.int32)

    def of_pair(ratios: tuple[Float[Array, ""], Float[Array, ""]]) -> Float[Array, ""]:
        chosen, rejected = (ref_logprob + ratio[None] for ratio in ratios)
        return preference_loss(
            loss,
            PairLogps(chosen, rejected, chosen, rejected),
            PairLogps(reference, reference, reference, reference),
            (length, length),
            beta=beta,
            axes=(),
            tokens_per_pair=jnp.float32(tokens),
        )[0]

    value, (chosen, rejected) = jax.vmap(jax.value_and_grad(of_pair))((chosen_logratios, rejected_logratios))
    return Slopes(value, chosen, rejected)


class LogitsAndValue(NamedTuple):
    """Trained numbers of `train_ppo`: a logit for each response, and the value of the prompt."""

    logits: Float[Array, "N"]
    value: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("clip_ratio", "batch_size", "epochs", "iterations"))
def train_ppo(
    key: PRNGKeyArray,
    rewards: Float[Array, "N"],
    ref_logprobs: Float[Array, "N"],
    *,
    kl_coef: Number,
    clip_ratio: float,
    learning_rate: Number,
    batch_size: int,
    epochs: int,
    iterations: int,
) -> Float[Array, "times N"]:
    r"""Train by PPO from samples, as stage ppo does; return the log-probabilities before and after all iterations.

    A response is one token, so that its reward is $r(y) - \beta \log \frac{\pi(y)}{\pi_{ref}(y)}$, and the value
    function is one number. Each iteration samples a batch, and makes one update per epoch on all of it. Advantages are
    not whitened: at the optimum all rewards less penalty are equal, and whitening would scale up what noise is left.
    """
    optimizer = optax.adam(learning_rate)
    mask: Bool[Array, "B 1"] = jnp.ones((batch_size, 1), bool)

    def loss_of(learner: LogitsAndValue, sampled: Array, old: Array, advantages: Array, returns: Array) -> Array:
        logprobs = jax.nn.log_softmax(learner.logits)[sampled][:, None]
        clip = {"clip_ratio": clip_ratio, "clip_ratio_high": clip_ratio, "dual_clip": math.inf}
        policy = masking.masked_mean(ppo_clip(logprobs, old, advantages, mask, **clip).losses, mask, ())
        values = jnp.broadcast_to(learner.value, mask.shape)
        value, _ = value_loss(values, values, returns, mask, clip_range=math.inf, axes=())
        return policy + value

    def iteration(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, Float[Array, "N"]]:
        learner = carry[0]
        logprobs = jax.nn.log_softmax(learner.logits)
        sampled = jax.random.categorical(key, logprobs, shape=(batch_size,))
        old, reference = logprobs[sampled][:, None], ref_logprobs[sampled][:, None]
        earned = token_rewards(rewards[sampled], kl.k1(old, reference), mask, kl_coef=kl_coef)
        values = jnp.broadcast_to(learner.value, mask.shape)
        advantages, returns = gae(earned, values, mask, gamma=1.0, gae_lambda=1.0)
        gradient = functools.partial(
            jax.grad(loss_of), sampled=sampled, old=old, advantages=advantages, returns=returns
        )

        def update(carry: tuple, _: None) -> tuple[tuple, None]:
            learner, state = carry
            updates, state = optimizer.update(gradient(learner), state)
            return (optax.apply_updates(learner, updates), state), None

        carry, _ = jax.lax.scan(update, carry, length=epochs)
        return carry, jax.nn.log_softmax(carry[0].logits)

    learner = LogitsAndValue(ref_logprobs, jnp.float32(0))
    _, curve = jax.lax.scan(iteration, (learner, optimizer.init(learner)), jax.random.split(key, iterations))
    return jnp.concatenate([ref_logprobs[None], curve])
