"""PPO's losses. Log-probabilities in, scalars out; nothing here knows a model."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import masking


def policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    clip_ratio: float,
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""PPO's clipped surrogate, averaged over the response tokens of the whole batch.

    $L = -\mathbb{E}[\min(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon) A_t)]$ with
    $r_t = \pi(a_t) / \pi_{old}(a_t)$, eq. 7 of Schulman et al. 2017 (arXiv:1707.06347).

    Args: logprobs in nats of the sampled tokens now and when they were sampled; clip_ratio is epsilon.
    Returns: the loss, and `policy/clipfrac_avg` (share of tokens where the clipped branch was taken),
    `policy/approxkl_avg` (k2 of old against new, nats a token), `val/ratio`, `val/ratio_var`.
    """
    log_ratio = jnp.where(response_mask, logprobs - old_logprobs, 0)
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio)
    loss = masking.masked_mean(jnp.maximum(unclipped, clipped), response_mask, axes)
    return loss, {
        "policy/clipfrac_avg": masking.masked_mean((clipped > unclipped).astype(ratio.dtype), response_mask, axes),
        "policy/approxkl_avg": masking.masked_mean(0.5 * jnp.square(log_ratio), response_mask, axes),
        "val/ratio": masking.masked_mean(ratio, response_mask, axes),
        "val/ratio_var": masking.masked_variance(ratio, response_mask, axes),
    }


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    clip_range: float,
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""Clipped squared error of the values, averaged over the response tokens of the whole batch.

    $L = \frac12 \mathbb{E}[\max((V - \hat R)^2, (\mathrm{clip}(V, V_{old} \pm \epsilon) - \hat R)^2)]$, as in OpenAI
    baselines' PPO2 and detail 25 of Huang et al. 2024 (arXiv:2403.17031).

    Returns: the loss and `val/clipfrac_avg`, the share of tokens where the clipped branch was taken.
    """
    # First: 0 times a NaN in the padding would be a NaN in the gradient.
    values, old_values, returns = (jnp.where(response_mask, x, 0) for x in (values, old_values, returns))
    clipped_values = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    error, clipped_error = jnp.square(values - returns), jnp.square(clipped_values - returns)
    loss = 0.5 * masking.masked_mean(jnp.maximum(error, clipped_error), response_mask, axes)
    clipfrac = masking.masked_mean((clipped_error > error).astype(values.dtype), response_mask, axes)
    return loss, {"val/clipfrac_avg": clipfrac}


def explained_variance(
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    axes: tuple[str, ...],
) -> Float[Array, ""]:
    r"""$1 - \mathrm{Var}[\hat R - V] / \mathrm{Var}[\hat R]$: 1 for a perfect value function, 0 for a constant one."""
    variance = masking.masked_variance(returns, response_mask, axes)
    return 1 - masking.masked_variance(returns - values, response_mask, axes) / (variance + 1e-8)
