"""From scored responses to advantages, before the first update of an iteration.

Details of Huang et al. 2024 (arXiv:2403.17031, "N+") and of their study of Ziegler et al.'s code (2023, "N") that stand
here: a fixed score for responses without EOS (the EOS trick, N+: -1), the score on the last response token (N+), the
penalty on the divergence in the rewards (N), reward whitening and advantage whitening (N, by the method's `estimate`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from rlhf_jax.core import masking
from rlhf_jax.core.advantages import overlong_penalty, score_clipped, token_rewards
from rlhf_jax.core.importance import WEIGHTS, sampler_difference, weight_metrics
from rlhf_jax.core.kl import ESTIMATORS, k1
from rlhf_jax.core.logprobs import sequence_logprobs
from rlhf_jax.core.metrics import values as values_of
from rlhf_jax.core.policy_losses import explained_variance
from rlhf_jax.methods.policy_method import Experience, Method, Networks, PolicyGradientConfig, Sampled, Samples
from rlhf_jax.sampling.generate import is_stop
from rlhf_jax.types import Rollout


def has_ended(networks: Networks, rollout: Rollout) -> Bool[Array, "B"]:
    """True for responses with a stop token: the others were cut off."""
    return jnp.any(is_stop(rollout.response, networks.stop_ids) & rollout.response_mask, axis=1)


def shaped_scores(
    networks: Networks, config: PolicyGradientConfig, method: Method, rollout: Rollout, scores: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Scale and clip scores, and lower those of responses that are too long or were cut off."""
    ended = has_ended(networks, rollout)
    if config.score_scale != 1:
        scores = scores * config.score_scale
    scores = score_clipped(scores, clip=config.score_clip)
    if method.overlong_buffer:
        most = networks.max_new_tokens
        lengths = masking.lengths(rollout.response_mask)
        scores = scores + overlong_penalty(lengths, max_tokens=most, buffer=method.overlong_buffer * most)
    if config.missing_eos_score is not None:
        return jnp.where(ended, scores, config.missing_eos_score)
    return scores - config.missing_eos_penalty * ~ended


class OldPolicy(NamedTuple):
    """Log-probabilities, entropies, values and weights of the responses, before the first update."""

    logprobs: Array  # [B, T]
    entropy: Array  # [B, T], nats per token
    values: Array | None  # [B, T]
    weights: Array | None  # [B, T], of the importance of tokens
    metrics: dict[str, Array]


def by_learner(
    networks: Networks,
    config: PolicyGradientConfig,
    params: dict[str, PyTree],
    sampled: Sampled,
    axes: tuple[str, ...],
) -> OldPolicy:
    """Recompute old log-probabilities with the learner, so that the first ratio is 1 ("decoupled" in verl).

    With `importance_cap` the tokens' losses are weighted for the difference of the sampler: see `core/importance.py`.
    """
    mask = sampled.rollout.response_mask
    stats, values = networks.forward(params, sampled.rollout, temperature=config.temperature)
    metrics, weights = sampler_difference(stats.logprobs, sampled.logprobs, mask, axes), None
    if config.importance_cap is not None:
        floor = 0.0 if config.importance_floor is None else config.importance_floor
        weigh = WEIGHTS[config.importance_mode or "token_truncate"]
        weights = weigh(stats.logprobs, sampled.logprobs, mask, cap=config.importance_cap, floor=floor)
        metrics |= weight_metrics(weights, mask, axes)
    return OldPolicy(stats.logprobs, stats.entropy, values, weights, values_of(metrics))


def by_sampler(
    networks: Networks,
    config: PolicyGradientConfig,
    params: dict[str, PyTree],
    sampled: Sampled,
    axes: tuple[str, ...],
) -> OldPolicy:
    r"""Reuse the sampler's log-probabilities ("bypass" in verl): no forward pass, and the ratio corrects for both.

    It is $\pi_{learner} / \pi_{sampler}$ from the first update on, and bounded by the loss. Entropy is estimated from
    the sampled tokens, $-\log \pi(a_t)$; how far the sampler is off is logged by the first minibatch.
    """
    del config, axes
    return OldPolicy(sampled.logprobs, -sampled.logprobs, networks.values(params, sampled.rollout), None, {})


OLD_LOGPROBS: dict[str, Callable[..., OldPolicy]] = {"learner": by_learner, "sampler": by_sampler}
"""`old_logprobs` -> (networks, config, params, sampled, axes) -> the policy that sampled."""


def gather_experience(
    networks: Networks,
    config: PolicyGradientConfig,
    method: Method,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
    sampled: Sampled,
    scores: Float[Array, "B"],
    axes: tuple[str, ...],
    *,
    kl_coef: Any,
    useful: Bool[Array, "B"] | None = None,
) -> tuple[Experience, Samples, dict[str, jax.Array]]:
    """Compute advantages of scored responses, and the metrics of the objective.

    The divergence that is logged is the one that is penalised: the sum over a response of the method's estimator.

    Args: kl_coef is a number, or the state of a controller; useful says which responses are trained on, None all.
    """
    rollout, mask = sampled.rollout, sampled.rollout.response_mask
    old = OLD_LOGPROBS[config.old_logprobs](networks, config, params, sampled, axes)
    reference = networks.policy.response_stats(frozen["reference"], rollout, temperature=config.temperature)

    ended = has_ended(networks, rollout)
    shaped = shaped_scores(networks, config, method, rollout, scores)
    kl = ESTIMATORS[method.kl_estimator](old.logprobs, reference.logprobs, old.logprobs)
    rewards = token_rewards(shaped, kl, mask, kl_coef=kl_coef if method.kl_in == "reward" else 0.0)
    trained = mask & ended[:, None] if config.reject_truncated else mask
    trained = trained if useful is None else trained & useful[:, None]
    advantages, returns = method.estimate(rewards, old.values, mask, trained, axes)

    in_loss = method.kl_in == "loss" and (method.kl_coef > 0)
    batch = Experience(
        rollout=rollout,
        logprobs=old.logprobs,
        advantages=advantages,
        loss_mask=trained,
        values=old.values,
        returns=returns,
        ref_logprobs=reference.logprobs if in_loss else None,
        weights=old.weights,
    )

    sequence_kl = sequence_logprobs(kl, mask)
    non_score = -kl_coef * sequence_kl
    lengths = masking.lengths(mask)
    length = lengths.astype(jnp.float32)
    metrics = {
        "objective/scores": masking.mean(shaped, axes),
        "objective/kl": masking.mean(sequence_kl, axes),
        "objective/entropy": masking.mean(sequence_logprobs(old.entropy, mask), axes),
        "objective/non_score_reward": masking.mean(non_score, axes),
        "objective/rlhf_reward": masking.mean(shaped + non_score, axes),
        "objective/kl_coef": jnp.float32(kl_coef),
        "completions/mean_length": masking.mean(length, axes),
        "completions/min_length": jax.lax.pmin(jnp.min(length), axes) if axes else jnp.min(length),
        "completions/max_length": jax.lax.pmax(jnp.max(length), axes) if axes else jnp.max(length),
        "val/num_eos_tokens": masking.count(ended, axes),
        "num_tokens": masking.total(lengths, axes),
        **old.metrics,
    }
    if old.values is not None and returns is not None:
        metrics["val/explained_variance"] = explained_variance(old.values, returns, mask, axes)
    apart_from_reference = sequence_logprobs(k1(old.logprobs, reference.logprobs), mask)
    return batch, Samples(rollout, scores, apart_from_reference), metrics
