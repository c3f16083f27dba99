r"""Weights for samples of a program that is not quite the policy: the sampler rounds otherwise than the learner.

The ratio is $\rho_t = \pi_{learner}(a_t) / \pi_{sampler}(a_t)$ of a token, or $\prod_t \rho_t$ of a whole response. A
ratio above `cap` or below `floor` is truncated (set to the bound) or masked (set to 0). Token weights leave out what
came before the token, a bias. A response's weight has no bias but that of its bounds, and a variance exponential in its
length.

These are TRL's four values of `vllm_importance_sampling_mode`, with `cap` and `floor` its `vllm_importance_sampling_
clip_max` and `_clip_min`. Truncation of tokens: Yao et al. 2025 ("Your efficient RL framework secretly brings you
off-policy RL training"); of responses and masking: Liu et al. 2025 ("When speed kills stability").
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import metrics
from rlhf_jax.core.metrics import Metric
from rlhf_jax.core.ratios import ratio


def token_truncate(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: float,
    floor: float,
) -> Float[Array, "B T"]:
    r"""$\mathrm{clip}(\rho_t, floor, cap)$ of each token. Args: log-probabilities in nats, by learner and sampler."""
    return _truncated(_token_ratios(logprobs, sampler_logprobs, response_mask), cap, floor)


def token_mask(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: float,
    floor: float,
) -> Float[Array, "B T"]:
    r"""$\rho_t$ of each token where it is from floor to cap, else 0. Args as `token_truncate`."""
    return _masked(_token_ratios(logprobs, sampler_logprobs, response_mask), cap, floor)


def sequence_truncate(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: float,
    floor: float,
) -> Float[Array, "B T"]:
    r"""$\mathrm{clip}(\prod_t \rho_t, floor, cap)$ of the response, on each of its tokens. Args as `token_truncate`."""
    return _truncated(_sequence_ratios(logprobs, sampler_logprobs, response_mask), cap, floor)


def sequence_mask(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: float,
    floor: float,
) -> Float[Array, "B T"]:
    r"""$\prod_t \rho_t$ of the response, on each token, where it is from floor to cap, else 0.

    Args as `token_truncate`.
    """
    return _masked(_sequence_ratios(logprobs, sampler_logprobs, response_mask), cap, floor)


WEIGHTS: dict[str, Callable[..., Array]] = {
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
}
"""Name -> weights: (logprobs, sampler_logprobs, response_mask, cap, floor) -> one weight a token."""


def weight_metrics(
    weights: Float[Array, "B T"], response_mask: Bool[Array, "B T"], axes: tuple[str, ...]
) -> dict[str, Metric]:
    """`sampling/importance_sampling_ratio/{min,mean,max}`, TRL's name for the weights, over all tokens.

    A minimum of 0 says that something was masked.
    """
    return {
        "sampling/importance_sampling_ratio/min": metrics.smallest(jnp.where(response_mask, weights, jnp.inf), axes),
        "sampling/importance_sampling_ratio/mean": metrics.masked_mean(weights, response_mask, axes),
        "sampling/importance_sampling_ratio/max": metrics.largest(jnp.where(response_mask, weights, 0), axes),
    }


def sampler_difference(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    axes: tuple[str, ...],
) -> dict[str, Metric]:
    """`sampling/sampling_logp_difference/{mean,max}`: distance of the sampler from the learner, in nats per token.

    The absolute difference of one policy's log-probabilities by two programs, as in TRL's GRPOTrainer.
    """
    difference = jnp.abs(jnp.where(response_mask, logprobs - sampler_logprobs, 0))
    return {
        "sampling/sampling_logp_difference/mean": metrics.masked_mean(difference, response_mask, axes),
        "sampling/sampling_logp_difference/max": metrics.largest(difference, axes),
    }


def _token_ratios(logprobs: Array, sampler_logprobs: Array, mask: Array) -> Array:
    return ratio(jnp.where(mask, logprobs - sampler_logprobs, 0))


def _sequence_ratios(logprobs: Array, sampler_logprobs: Array, mask: Array) -> Array:
    log_ratio = jnp.sum(jnp.where(mask, logprobs - sampler_logprobs, 0), axis=1, keepdims=True)
    return jnp.broadcast_to(ratio(log_ratio), logprobs.shape)


def _truncated(ratios: Array, cap: float, floor: float) -> Array:
    return jnp.clip(ratios, floor, cap)


def _masked(ratios: Array, cap: float, floor: float) -> Array:
    return jnp.where((ratios >= floor) & (ratios <= cap), ratios, 0)
