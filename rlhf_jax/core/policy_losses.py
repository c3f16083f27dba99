"""Policy losses, the value loss, and the aggregation of token losses: functions of log-probabilities, without models.

A policy loss returns two [B, T] arrays: the loss of each token, and where a bound on the ratio was reached. An
aggregation reduces the losses to a scalar. `POLICY_LOSSES` and `AGGREGATIONS` list all of them. Ratios are computed by
`ratios.ratio`: exact up to e^30, and finite above.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import masking, metrics, ratios
from rlhf_jax.core.metrics import Mean, Metric


class TokenLosses(NamedTuple):
    """A policy loss before it is aggregated."""

    losses: Array  # float[B, T]; 0 at padding
    clipped: Array  # bool[B, T]: True where a bound on the ratio changed the loss


def ppo_clip(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    clip_ratio: float,
    clip_ratio_high: float,
    dual_clip: float,
) -> TokenLosses:
    r"""PPO's clipped surrogate $-\min(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon_{high}) A_t)$ of each token.

    $r_t = \pi(a_t) / \pi_{old}(a_t)$; eq. 7 of Schulman et al. 2017 (arXiv:1707.06347) if both epsilons are equal;
    a larger upper one is the clip-higher of DAPO (Yu et al. 2025, arXiv:2503.14476). For a negative advantage, the loss
    grows without bound with the ratio. Dual clip replaces $r_t$ by $\min(r_t, c)$ there: eq. 5 of Ye et al. 2020
    (arXiv:1912.09729), `clip_ratio_c` in verl.

    Args: log-probabilities of the sampled tokens, in nats, under the current and the old policy; clip_ratio is epsilon;
    dual_clip is c, above 1 + clip_ratio_high, or infinity for no bound.

    Examples:
        Ratios of 0.5, 1 and 1.5, with a positive advantage: only a ratio above the bound is clipped.

        >>> logprobs = jnp.log(jnp.array([[0.5, 1.0, 1.5]]))
        >>> given = {"clip_ratio": 0.2, "clip_ratio_high": 0.2, "dual_clip": jnp.inf}
        >>> ppo_clip(logprobs, jnp.zeros((1, 3)), jnp.ones((1, 3)), jnp.ones((1, 3), bool), **given).losses
        Array([[-0.5, -1. , -1.2]], dtype=float32)
    """
    ratio = ratios.ratio(_log_ratio(logprobs, old_logprobs, response_mask))
    return _clipped(ratio, advantages, response_mask, clip_ratio, clip_ratio_high, dual_clip)


def sequence_clip(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    clip_ratio: float,
    clip_ratio_high: float,
    dual_clip: float,
) -> TokenLosses:
    r"""Clipped surrogate of whole responses: the ratio of every token is $r = \pi(y|x) / \pi_{old}(y|x)$.

    A response is one action (Ahmadian et al. 2024, arXiv:2402.14740). Its ratio, the product over its tokens, is
    clipped as in TRL's RLOOTrainer. Use it with the aggregation `sequence`.
    """
    log_ratio = jnp.sum(_log_ratio(logprobs, old_logprobs, response_mask), axis=1, keepdims=True)
    ratio = jnp.broadcast_to(ratios.ratio(log_ratio), logprobs.shape)
    return _clipped(ratio, advantages, response_mask, clip_ratio, clip_ratio_high, dual_clip)


def gspo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    clip_ratio: float,
    clip_ratio_high: float,
    dual_clip: float,
) -> TokenLosses:
    r"""GSPO: the clipped surrogate with $s = (\pi(y|x) / \pi_{old}(y|x))^{1/|y|}$ as the ratio of every token.

    The ratio is the geometric mean over the tokens: Zheng et al. 2025 (arXiv:2507.18071). Use it with the aggregation
    `sequence`. Its gradient has the length bias of `sequence_mean`.
    """
    lengths = jnp.maximum(masking.lengths(response_mask), 1).astype(logprobs.dtype)[:, None]
    log_ratio = jnp.sum(_log_ratio(logprobs, old_logprobs, response_mask), axis=1, keepdims=True) / lengths
    ratio = jnp.broadcast_to(ratios.ratio(log_ratio), logprobs.shape)
    return _clipped(ratio, advantages, response_mask, clip_ratio, clip_ratio_high, dual_clip)


def cispo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    clip_ratio_high: float,
) -> TokenLosses:
    r"""CISPO: $-\mathrm{sg}[\min(r_t, 1 + \epsilon_{high})] A_t \log \pi(a_t)$, in which every token keeps a gradient.

    The importance weight is clipped instead of the update, and has no gradient: eqs. 4 and 5 of MiniMax-M1 (Chen et al.
    2025, arXiv:2506.13585). As in their runs, it has no lower bound. As in TRL, `clipped` marks the clipped weights of
    positive advantages only.
    """
    ratio = ratios.ratio(_log_ratio(logprobs, old_logprobs, response_mask))
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, 1 + clip_ratio_high))
    logprobs, advantages = (jnp.where(response_mask, x, 0) for x in (logprobs, advantages))
    return TokenLosses(-weight * advantages * logprobs, (ratio > 1 + clip_ratio_high) & (advantages > 0))


def reinforce(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
) -> TokenLosses:
    r"""REINFORCE: $-A_t \log \pi(a_t)$ (Williams 1992), without a ratio or a bound.

    Only the first update of an iteration is on-policy. Later updates are off-policy without a correction.
    """
    del old_logprobs
    logprobs, advantages = (jnp.where(response_mask, x, 0) for x in (logprobs, advantages))
    return TokenLosses(-advantages * logprobs, jnp.zeros(logprobs.shape, bool))


def sapo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
) -> TokenLosses:
    r"""SAPO: $-\frac{4}{\tau} \sigma(\tau (r_t - 1)) A_t$, a soft gate on the ratio instead of a clip.

    Gao et al. 2025 (Soft Adaptive Policy Optimization, arXiv:2511.20347), as in TRL's GRPOTrainer and verl. The
    gradient is that of $-r_t A_t$ times $4 p (1 - p)$ with $p = \sigma(\tau (r_t - 1))$: 1 at a ratio of 1, and
    decreasing on both sides, faster at a higher temperature. `clipped` is always False. Use it with the aggregation
    `sequence`.

    Args: sapo_temperature_pos is tau for positive advantages, sapo_temperature_neg for all others.
    """
    ratio = ratios.ratio(_log_ratio(logprobs, old_logprobs, response_mask))
    advantages = jnp.where(response_mask, advantages, 0)
    temperature = jnp.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    gate = 4 / temperature * jax.nn.sigmoid(temperature * (ratio - 1))
    return TokenLosses(-gate * advantages, jnp.zeros(ratio.shape, bool))


class PolicyLossSpec(NamedTuple):
    """A policy loss, and its keyword options, which are fields of a stage's config."""

    function: Callable[..., TokenLosses]
    options: tuple[str, ...]
    has_ratio: bool = True  # reads old_logprobs


CLIP = ("clip_ratio", "clip_ratio_high", "dual_clip")

POLICY_LOSSES: dict[str, PolicyLossSpec] = {
    "ppo": PolicyLossSpec(ppo_clip, CLIP),
    "sequence": PolicyLossSpec(sequence_clip, CLIP),
    "gspo": PolicyLossSpec(gspo, CLIP),
    "cispo": PolicyLossSpec(cispo, ("clip_ratio_high",)),
    "sapo": PolicyLossSpec(sapo, ("sapo_temperature_pos", "sapo_temperature_neg")),
    "reinforce": PolicyLossSpec(reinforce, (), has_ratio=False),
}
OPTIONS = tuple(dict.fromkeys(option for spec in POLICY_LOSSES.values() for option in spec.options))
"""Options of all losses."""


def _log_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    return jnp.where(mask, logprobs - old_logprobs, 0)


def _clipped(ratio: Array, advantages: Array, mask: Array, low: float, high: float, dual: float) -> TokenLosses:
    # Mask first: 0 times a NaN in the padding would be a NaN in the gradient.
    advantages = jnp.where(mask, advantages, 0)
    unclipped = -advantages * jnp.minimum(ratio, dual)
    clipped = -advantages * jnp.clip(ratio, 1 - low, 1 + high)
    reached = (clipped > unclipped) | ((ratio > dual) & (advantages < 0))
    return TokenLosses(jnp.maximum(unclipped, clipped), reached)


def token_mean(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], *, max_tokens: int, axes: tuple[str, ...]
) -> Float[Array, ""]:
    r"""$\sum_{i,t} x_{it} / \sum_i |y_i|$: all tokens of the batch count equally, as in DAPO (arXiv:2503.14476).

    The gradient of a policy loss is that of `sequence_sum` divided by the mean length. It has a bias inversely
    proportional to the number of responses, because the number of tokens in the batch depends on the samples.
    """
    del max_tokens
    return masking.masked_mean(x, mask, axes)


def sequence_mean(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], *, max_tokens: int, axes: tuple[str, ...]
) -> Float[Array, ""]:
    r"""$\frac1B \sum_i \frac1{|y_i|} \sum_t x_{it}$: all responses count equally, as in GRPO (arXiv:2402.03300).

    A response with an empty mask contributes 0. The gradient of a policy loss is that of $\mathbb{E}[A / |y|]$: short
    responses count more, the length bias of Liu et al. 2025 (arXiv:2503.20783). With `sequence_clip`, whose ratio is
    that of the whole response, the length cancels.
    """
    del max_tokens
    lengths = jnp.maximum(masking.lengths(mask), 1).astype(x.dtype)
    return masking.mean(jnp.sum(jnp.where(mask, x, 0), axis=1) / lengths, axes)


def sequence_sum(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], *, max_tokens: int, axes: tuple[str, ...]
) -> Float[Array, ""]:
    r"""$\frac1B \sum_i \sum_t x_{it}$: with log-probabilities, the mean over whole responses, as in REINFORCE.

    It has no length bias.
    """
    del max_tokens
    return masking.mean(jnp.sum(jnp.where(mask, x, 0), axis=1), axes)


def constant(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], *, max_tokens: int, axes: tuple[str, ...]
) -> Float[Array, ""]:
    r"""$\frac1{B T_{max}} \sum_{i,t} x_{it}$: no length in the denominator, as in Dr. GRPO (Liu et al. 2025).

    arXiv:2503.20783. It is `sequence_sum` divided by a constant, and has no length bias.

    Args: max_tokens is T_max, the most tokens that a response can have.
    """
    return masking.mean(jnp.sum(jnp.where(mask, x, 0), axis=1), axes) / max_tokens


class Aggregation(NamedTuple):
    """Reduction of token losses to a scalar, and the number of items averaged, which weights a micro-batch."""

    reduce: Callable[..., Array]
    weight: Callable[[Bool[Array, "B T"], tuple[str, ...]], Array]


AGGREGATIONS: dict[str, Aggregation] = {
    "token": Aggregation(token_mean, masking.count),
    "sequence": Aggregation(sequence_mean, masking.rows),
    "sequence_sum": Aggregation(sequence_sum, masking.rows),
    "constant": Aggregation(constant, masking.rows),
}


def ratio_metrics(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    clipped: Bool[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    axes: tuple[str, ...],
) -> dict[str, Metric]:
    """`policy/clipfrac_avg` (share of tokens with `clipped`), `policy/approxkl_avg`, `val/ratio` and `val/ratio_var`.

    `policy/approxkl_avg` is the estimate k2 of KL(old || new), in nats per token. `val/ratio` and `val/ratio_var` are
    the mean and variance of token ratios, even if the loss uses ratios of whole responses; each ratio is at most e to
    the power of `ratios.LARGEST`. All leave out padding.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, response_mask)
    ratio = jnp.exp(jnp.minimum(log_ratio, ratios.LARGEST))
    return {
        "policy/clipfrac_avg": metrics.masked_mean(clipped.astype(ratio.dtype), response_mask, axes),
        "policy/approxkl_avg": metrics.masked_mean(0.5 * jnp.square(log_ratio), response_mask, axes),
        "val/ratio": metrics.masked_mean(ratio, response_mask, axes),
        "val/ratio_var": Mean(masking.masked_variance(ratio, response_mask, axes), masking.count(response_mask, axes)),
    }


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    clip_range: float,
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Clipped squared error of the values, averaged over the response tokens of the whole batch.

    $L = \frac12 \mathbb{E}[\max((V - \hat R)^2, (\mathrm{clip}(V, V_{old} \pm \epsilon) - \hat R)^2)]$, as in OpenAI
    baselines' PPO2, and in Ziegler et al.'s code (lm-human-preferences).

    Returns: the loss and `val/clipfrac_avg`, the share of tokens where the clipped branch was taken.
    """
    # Mask first: 0 times a NaN in the padding would be a NaN in the gradient.
    values, old_values, returns = (jnp.where(response_mask, x, 0) for x in (values, old_values, returns))
    clipped_values = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    error, clipped_error = jnp.square(values - returns), jnp.square(clipped_values - returns)
    loss = 0.5 * masking.masked_mean(jnp.maximum(error, clipped_error), response_mask, axes)
    clipfrac = metrics.masked_mean((clipped_error > error).astype(values.dtype), response_mask, axes)
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
