"""From scored responses to advantages: what an iteration knows before its first update.

Details of Huang et al. 2024 (arXiv:2403.17031, "N+") and of their study of Ziegler et al.'s code (2023, "N") that stand
here: a fixed score for responses without EOS (the EOS trick, N+: -1), the score on the last response token (N+), the
penalty on the divergence in the rewards (N), reward whitening and advantage whitening (N, by the method's `estimate`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from rlhf_jax.core import masking
from rlhf_jax.core.advantages import groups_that_differ, overlong_penalty, score_clipped, token_rewards
from rlhf_jax.core.kl import ESTIMATORS, k1
from rlhf_jax.core.logprobs import sequence_logprobs
from rlhf_jax.core.policy_losses import explained_variance
from rlhf_jax.sampling.generate import is_stop
from rlhf_jax.stages.policy_method import Experience, Method, Networks, PolicyGradientConfig, Sampled, Samples
from rlhf_jax.types import Rollout


def has_ended(networks: Networks, rollout: Rollout) -> Bool[Array, "B"]:
    """Which responses have a stop token: the others were cut off."""
    return jnp.any(is_stop(rollout.response, networks.stop_ids) & rollout.response_mask, axis=1)


def shaped_scores(
    networks: Networks, config: PolicyGradientConfig, method: Method, rollout: Rollout, scores: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Scores as the method is given them: scaled, clipped, and less where a response is too long or was cut off."""
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


def choose_groups(
    networks: Networks,
    config: PolicyGradientConfig,
    method: Method,
    sampled: Sampled,
    scores: Float[Array, "B"],
    axes: tuple[str, ...],
) -> tuple[Sampled, Float[Array, "b"], Bool[Array, "b"], dict[str, jax.Array]]:
    """Dynamic sampling (DAPO, arXiv:2503.14476) within one program: of all groups sampled, those that are trained on.

    The groups whose scores differ, in the order sampled, up to as many as an iteration trains on. DAPO samples until
    there are enough; here others fill a batch that lacks some, masked out of the losses.

    Returns: what was sampled and its scores, which responses are trained on, and metrics.
    """
    size, groups = method.num_generations, config.batch_size // method.num_generations
    shaped = shaped_scores(networks, config, method, sampled.rollout, scores)
    rollout, logprobs, scores, shaped = masking.gather_rows((sampled.rollout, sampled.logprobs, scores, shaped), axes)
    differ = groups_that_differ(shaped, num_generations=size)
    chosen = jnp.argsort(~differ, stable=True)[:groups]
    own = masking.own_rows(chosen, axes)
    rows = (own[:, None] * size + jnp.arange(size)[None, :]).reshape(-1)
    rollout, logprobs, scores = jax.tree.map(lambda leaf: leaf[rows], (rollout, logprobs, scores))
    metrics = {
        "dynamic_sampling/groups_that_differ": jnp.mean(differ.astype(jnp.float32)),
        "dynamic_sampling/groups_trained": jnp.sum(differ[chosen].astype(jnp.float32)),
    }
    return Sampled(rollout, logprobs, sampled.demonstrations), scores, jnp.repeat(differ[own], size), metrics


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
    """From scored responses to advantages, with the metrics of the objective.

    The divergence that is logged is the one that is penalised: the sum over a response of the method's estimator.

    Args: kl_coef is a number, or the state of a controller; useful says which responses are trained on, None all.
    """
    rollout, mask = sampled.rollout, sampled.rollout.response_mask
    stats, values = networks.forward(params, rollout, temperature=config.temperature)
    reference = networks.policy.response_stats(frozen["reference"], rollout, temperature=config.temperature)

    ended = has_ended(networks, rollout)
    shaped = shaped_scores(networks, config, method, rollout, scores)
    kl = ESTIMATORS[method.kl_estimator](stats.logprobs, reference.logprobs)
    rewards = token_rewards(shaped, kl, mask, kl_coef=kl_coef if method.kl_in == "reward" else 0.0)
    trained = mask & ended[:, None] if config.reject_truncated else mask
    trained = trained if useful is None else trained & useful[:, None]
    advantages, returns = method.estimate(rewards, values, mask, trained, axes)

    apart = jnp.where(mask, stats.logprobs - sampled.logprobs, 0)
    weights = None if config.importance_cap is None else jnp.minimum(jnp.exp(apart), config.importance_cap)
    in_loss = method.kl_in == "loss" and (method.kl_coef > 0)
    batch = Experience(
        rollout=rollout,
        logprobs=stats.logprobs,
        advantages=advantages,
        loss_mask=trained,
        values=values,
        returns=returns,
        ref_logprobs=reference.logprobs if in_loss else None,
        weights=weights,
    )

    sequence_kl = sequence_logprobs(kl, mask)
    non_score = -kl_coef * sequence_kl
    lengths = masking.lengths(mask)
    length = lengths.astype(jnp.float32)
    farthest = jnp.max(jnp.abs(apart))
    metrics = {
        "objective/scores": masking.mean(shaped, axes),
        "objective/kl": masking.mean(sequence_kl, axes),
        "objective/entropy": masking.mean(sequence_logprobs(stats.entropy, mask), axes),
        "objective/non_score_reward": masking.mean(non_score, axes),
        "objective/rlhf_reward": masking.mean(shaped + non_score, axes),
        "objective/kl_coef": jnp.float32(kl_coef),
        "completions/mean_length": masking.mean(length, axes),
        "completions/min_length": jax.lax.pmin(jnp.min(length), axes) if axes else jnp.min(length),
        "completions/max_length": jax.lax.pmax(jnp.max(length), axes) if axes else jnp.max(length),
        "sampling/sampling_logp_difference/mean": masking.masked_mean(jnp.abs(apart), mask, axes),
        "sampling/sampling_logp_difference/max": jax.lax.pmax(farthest, axes) if axes else farthest,
        "val/num_eos_tokens": masking.count(ended, axes),
        "num_tokens": masking.total(lengths, axes),
    }
    if values is not None and returns is not None:
        metrics["val/explained_variance"] = explained_variance(values, returns, mask, axes)
    apart_from_reference = sequence_logprobs(k1(stats.logprobs, reference.logprobs), mask)
    return batch, Samples(rollout, scores, apart_from_reference), metrics
