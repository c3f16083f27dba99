r"""Importance weights for the mismatch between sampler and learner: one policy, rounded differently by two programs.

The ratio is $\rho_t = \pi_{learner}(a_t) / \pi_{sampler}(a_t)$ for a token, or $\prod_t \rho_t$ for a whole response.
A ratio above `cap` or below `floor` is truncated (set to the bound) or masked (set to 0). Token weights are biased,
because they ignore the ratios of earlier tokens. Response weights are biased only by their bounds, but their variance
grows exponentially with length.

The four functions are the values of TRL's `vllm_importance_sampling_mode`; `cap` and `floor` are its
`vllm_importance_sampling_clip_max` and `vllm_importance_sampling_clip_min`. Truncated token weights: Yao et al. 2025
("Your efficient RL framework secretly brings you off-policy RL training"). Response weights and masking: Liu et al.
2025 ("When speed kills stability").
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
    r"""$\mathrm{clip}(\rho_t, floor, cap)$ for each token. Args: log-probabilities in nats, learner and sampler."""
    return _truncated(_token_ratios(logprobs, sampler_logprobs, response_mask), cap, floor)


def token_mask(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: float,
    floor: float,
) -> Float[Array, "B T"]:
    r"""$\rho_t$ for each token if it lies between floor and cap, else 0. Args: as of `token_truncate`."""
    return _masked(_token_ratios(logprobs, sampler_logprobs, response_mask), cap, floor)


def sequence_truncate(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: float,
    floor: float,
) -> Float[Array, "B T"]:
    r"""$\mathrm{clip}(\prod_t \rho_t, floor, cap)$ for all tokens of a response. Args: as of `token_truncate`."""
    return _truncated(_sequence_ratios(logprobs, sampler_logprobs, response_mask), cap, floor)


def sequence_mask(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: float,
    floor: float,
) -> Float[Array, "B T"]:
    r"""$\prod_t \rho_t$ for all tokens of a response if it lies between floor and cap, else 0.

    Args: as of `token_truncate`.
    """
    return _masked(_sequence_ratios(logprobs, sampler_logprobs, response_mask), cap, floor)


WEIGHTS: dict[str, Callable[..., Array]] = {
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
}
"""Name -> weights: (logprobs, sampler_logprobs, response_mask, cap, floor) -> one weight per token."""


def weight_metrics(
    weights: Float[Array, "B T"], response_mask: Bool[Array, "B T"], axes: tuple[str, ...]
) -> dict[str, Metric]:
    """`sampling/importance_sampling_ratio/{min,mean,max}`, TRL's name for the weights, over all tokens.

    A minimum of 0 means that at least one token was masked.
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
    """`sampling/sampling_logp_difference/{mean,max}`: absolute difference of log-probabilities, in nats per token.

    The two programs, learner and sampler, compute them for the same policy. As in TRL's GRPOTrainer.
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
