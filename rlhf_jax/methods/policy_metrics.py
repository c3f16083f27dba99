"""Metrics of an online iteration's responses and of its objective."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.core import masking
from rlhf_jax.core.advantages import token_rewards
from rlhf_jax.core.kl import k1
from rlhf_jax.core.logprobs import sequence_logprobs
from rlhf_jax.core.sequences import mask_read
from rlhf_jax.methods.policy_parts import Coefficient, Evaluated, Numbers


def score_metrics(scores: Float[Array, "B"], axes: tuple[str, ...]) -> Numbers:
    """Mean and standard deviation of the reward's scores, before shaping."""
    everything = jnp.ones(scores.shape, bool)
    return {
        "reward": masking.mean(scores, axes),
        "reward_std": jnp.sqrt(masking.masked_variance(scores, everything, axes)),
    }


def objective_metrics(evaluated: Evaluated, kl_coef: Coefficient, axes: tuple[str, ...]) -> Numbers:
    """The objective and its terms, as means over responses, and the responses' lengths."""
    mask, scores = evaluated.sequences.response_mask, evaluated.scores
    sequence_kl, non_score = jnp.full(scores.shape, jnp.nan), jnp.zeros(scores.shape)
    if evaluated.kl is not None:
        sequence_kl = sequence_logprobs(evaluated.kl, mask)
        non_score = -kl_coef * sequence_kl
    lengths = masking.lengths(mask)
    length = lengths.astype(jnp.float32)
    return {
        "objective/scores": masking.mean(scores, axes),
        "objective/kl": masking.mean(sequence_kl, axes),
        "objective/entropy": masking.mean(sequence_logprobs(evaluated.old.entropy, mask), axes),
        "objective/non_score_reward": masking.mean(non_score, axes),
        "objective/rlhf_reward": masking.mean(scores + non_score, axes),
        "objective/kl_coef": jnp.float32(kl_coef),
        "completions/mean_length": masking.mean(length, axes),
        "completions/min_length": jax.lax.pmin(jnp.min(length), axes) if axes else jnp.min(length),
        "completions/max_length": jax.lax.pmax(jnp.max(length), axes) if axes else jnp.max(length),
        "val/num_eos_tokens": masking.count(evaluated.ended, axes),
        "num_tokens": masking.total(lengths, axes),
        "token_share": masking.share(mask_read(evaluated.sequences), axes),
    }


def shaped_rewards(evaluated: Evaluated, kl_coef: Coefficient) -> Float[Array, "B T"]:
    """Token rewards: the score on the last token, less the KL penalty on each."""
    mask = evaluated.sequences.response_mask
    if evaluated.kl is None:  # and kl_coef is 0
        return masking.at_last_token(evaluated.scores, mask)
    return token_rewards(evaluated.scores, evaluated.kl, mask, kl_coef=kl_coef)


def reference_divergence(evaluated: Evaluated) -> Float[Array, "B"]:
    """Estimate each response's KL divergence from the reference with k1, in nats; NaN if it is not measured."""
    if evaluated.ref_logprobs is None:
        return jnp.full(evaluated.scores.shape, jnp.nan)
    return sequence_logprobs(k1(evaluated.old.logprobs, evaluated.ref_logprobs), evaluated.sequences.response_mask)
