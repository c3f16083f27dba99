"""Score shaping, token rewards and advantage estimators: from one score per response to one advantage per token.

`gae` uses a value function. The estimators in `CRITIC_FREE` compare responses with each other instead. A group is
`num_generations` consecutive rows: the responses to one prompt.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.core import masking


def clip_scores(scores: Float[Array, "B"], *, clip: float | None) -> Float[Array, "B"]:
    """Clip scores to [-clip, clip], which bounds the effect of a single response; None leaves them unchanged.

    Score clipping of Zheng et al. 2023 (Secrets of RLHF, arXiv:2307.04964), who normalise scores first.
    """
    return scores if clip is None else jnp.clip(scores, -clip, clip)


def overlong_penalty(lengths: Int[Array, "B"], *, max_tokens: int, buffer: float) -> Float[Array, "B"]:
    r"""Soft overlong punishment: 0 up to $L_{max} - L_{cache}$ tokens, then falling linearly to -1 at $L_{max}$.

    $((L_{max} - L_{cache}) - |y|) / L_{cache}$ in between: eq. 13 of Yu et al. 2025 (DAPO, arXiv:2503.14476). Eq. 13
    gives -1 to longer responses too, but sampling stops at L_max.

    Args: max_tokens is L_max, buffer L_cache, both in tokens.
    """
    return jnp.clip((max_tokens - buffer - lengths).astype(jnp.float32) / buffer, -1, 0)


def token_rewards(
    scores: Float[Array, "B"],
    kl: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    r"""Rewards $r_t = -\beta\, KL_t$, plus the score on the last response token.

    Eq. 2 of Ziegler et al. 2019 (arXiv:1909.08593), where KL_t is estimated for each token. Padding gets 0.

    Args: scores of whole responses; kl in nats per token; kl_coef is beta.

    Examples:
        The second response has two tokens:

        >>> mask = jnp.array([[True, True, True], [True, True, False]])
        >>> print(token_rewards(jnp.array([1.0, -1.0]), jnp.full((2, 3), 0.5), mask, kl_coef=0.5))
        [[-0.25 -0.25  0.75]
         [-0.25 -1.25  0.  ]]
    """
    penalty = jnp.where(response_mask, -kl_coef * kl, 0)
    return penalty + masking.at_last_token(scores, response_mask)


def whiten_rewards(
    rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], axes: tuple[str, ...]
) -> Float[Array, "B T"]:
    """Scale token rewards to variance 1 over the whole batch and keep their mean; 0 on padding.

    Reward whitening of Huang et al. 2024 (arXiv:2403.17031). Shifting the mean to 0 would cancel a reward that every
    token receives.
    """
    mean = masking.masked_mean(rewards, response_mask, axes)
    return jnp.where(response_mask, masking.whiten(rewards, response_mask, axes) + mean, 0)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    r"""Generalised advantage estimates and the returns $\hat R_t = \hat A_t + V_t$ that values are fitted to.

    $\delta_t = r_t + \gamma V_{t+1} - V_t$ and $\hat A_t = \delta_t + \gamma\lambda \hat A_{t+1}$, eqs. 11 to 16 of
    Schulman et al. 2016 (arXiv:1506.02438). `values[b, t]` is the value of the state before token t. The state after
    the last response token has value 0, whether the response ended or was cut off at the limit.

    With $\gamma = 1$ the policy gradient is unbiased if $\lambda = 1$, whatever the values are, or if the values are
    exact. Otherwise their errors $e$ bias $\hat A_t$ by $(1-\lambda) \sum_{k \ge 0} \lambda^k e_{t+k+1}$. Whitening the
    advantages adds the bias of `reinforce_plus_plus`.

    Returns: advantages and returns, 0 on padding.

    Examples:
        With lambda 1, advantages are the rewards to come minus the values:

        >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.25, 0.5, 0.75]])
        >>> advantages, returns = gae(rewards, values, jnp.ones((1, 3), bool), gamma=1.0, gae_lambda=1.0)
        >>> print(advantages, returns)
        [[0.75 0.5  0.25]] [[1. 1. 1.]]
        >>> advantages, _ = gae(rewards, values, jnp.ones((1, 3), bool), gamma=1.0, gae_lambda=0.0)
        >>> print(advantages)  # the errors of single steps
        [[0.25 0.25 0.25]]
    """
    rewards = jnp.where(response_mask, rewards, 0)
    values = jnp.where(response_mask, values, 0)
    next_values = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    deltas = rewards + gamma * next_values - values

    def backwards(next_advantage: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + gamma * gae_lambda * next_advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(backwards, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    return advantages.T, advantages.T + values  # padding comes after the response, where all deltas are 0


def rloo(
    rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, num_generations: int, axes: tuple[str, ...]
) -> Float[Array, "B T"]:
    r"""$A_i = R_i - \frac{1}{k-1} \sum_{j \ne i} R_j$: the baseline is the mean of the group's other responses.

    RLOO, Ahmadian et al. 2024 (arXiv:2402.14740). R is the sum of a response's token rewards, and all its tokens have
    the same advantage. Unbiased, because the baseline does not depend on the response itself. Raises ValueError for
    groups of one.

    Examples:
        Two groups of two responses, with one token each:

        >>> rewards, mask = jnp.array([[1.0], [0.0], [3.0], [3.0]]), jnp.ones((4, 1), bool)
        >>> print(rloo(rewards, mask, num_generations=2, axes=())[:, 0])
        [ 1. -1.  0.  0.]
        >>> print(dr_grpo(rewards, mask, num_generations=2, axes=())[:, 0])
        [ 0.5 -0.5  0.   0. ]
    """
    del axes
    return _on_tokens(_others_subtracted(_groups(rewards, response_mask, num_generations)), response_mask)


def rloo_normalized(
    rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, num_generations: int, axes: tuple[str, ...]
) -> Float[Array, "B T"]:
    r"""`rloo`, then $(A_i - \mathrm{mean}(A)) / \mathrm{std}(A)$ over the responses of the batch.

    `normalize_advantages` of TRL's RLOOConfig: the standard deviation is the sample's (n - 1), plus 1e-4. Every
    response counts once, whatever its length. Biased for the same reason as `reinforce_plus_plus`.
    """
    groups = _others_subtracted(_groups(rewards, response_mask, num_generations))
    normalised = (groups - masking.mean(groups, axes)) / (_deviation(groups, axes) + 1e-4)
    return _on_tokens(normalised, response_mask)


def grpo(
    rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, num_generations: int, axes: tuple[str, ...]
) -> Float[Array, "B T"]:
    r"""$A_i = (R_i - \mathrm{mean}(R)) / \mathrm{std}(R)$ over the group.

    GRPO, Shao et al. 2024 (arXiv:2402.03300). As in TRL, the standard deviation is the sample's (n - 1), plus 1e-4.
    Otherwise as `rloo`.

    Biased, because the deviation depends on the response itself. In groups of two, only the sign of the difference
    remains: the gradient is that of the probability of beating another response. With rewards of 0 and 1 it is the
    gradient of the probability p of a correct response, times a factor. The factor is constant for groups of 2 and 3,
    and $1/\sqrt{p(1-p)}$ for large groups, so that very easy and very hard prompts count more.

    Examples:
        A group with a small difference of rewards and one with a large difference have the same advantages:

        >>> rewards, mask = jnp.array([[0.1], [0.0], [100.0], [0.0]]), jnp.ones((4, 1), bool)
        >>> print(jnp.round(grpo(rewards, mask, num_generations=2, axes=())[:, 0], 2))
        [ 0.71 -0.71  0.71 -0.71]
    """
    del axes
    groups = _groups(rewards, response_mask, num_generations)
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / (num_generations - 1)
    return _on_tokens(centred / (jnp.sqrt(variance) + 1e-4), response_mask)


def grpo_batch_std(
    rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, num_generations: int, axes: tuple[str, ...]
) -> Float[Array, "B T"]:
    r"""$A_i = (R_i - \mathrm{mean}_{group}(R)) / \mathrm{std}_{batch}(R)$.

    `scale_rewards="batch"` of TRL's GRPOConfig, after Liu et al. 2025 (Lite PPO, arXiv:2508.08221): small score
    differences within a group are not amplified. The standard deviation is taken over the scores of all responses of
    the batch, not over their differences from group means. Biased for the same reason as `reinforce_plus_plus`.
    Otherwise as `grpo`.
    """
    groups = _groups(rewards, response_mask, num_generations)
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    return _on_tokens(centred / (_deviation(groups, axes) + 1e-4), response_mask)


def dr_grpo(
    rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, num_generations: int, axes: tuple[str, ...]
) -> Float[Array, "B T"]:
    r"""$A_i = R_i - \mathrm{mean}(R)$ over the group.

    Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783): GRPO without the standard deviation, which gives more weight to groups
    that are almost all right or almost all wrong. Otherwise as `rloo`, whose advantages for groups of k are these times
    $k/(k-1)$: unbiased up to that factor.
    """
    del axes
    groups = _groups(rewards, response_mask, num_generations)
    return _on_tokens(groups - jnp.mean(groups, axis=1, keepdims=True), response_mask)


def reinforce_plus_plus(
    rewards: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    num_generations: int,
    axes: tuple[str, ...],
    gamma: float,
) -> Float[Array, "B T"]:
    r"""$A_t = \sum_{i \ge t} \gamma^{i-t} r_i$, whitened over all tokens of the batch, without groups.

    REINFORCE++, Hu et al. 2025 (arXiv:2501.03262), where $r_i$ is minus the KL penalty on each token, plus the score on
    the last. The paper uses gamma = 1; verl's `compute_reinforce_plus_plus_outcome_advantage` takes any gamma. Like the
    group means above, the mean and deviation here include responses that are left out of the loss.

    Biased, because a response's own rewards enter the mean and the deviation; the bias is inversely proportional to the
    number of responses in the batch.
    """
    del num_generations
    _, to_go = gae(rewards, jnp.zeros_like(rewards), response_mask, gamma=gamma, gae_lambda=1.0)
    return masking.whiten(to_go, response_mask, axes)


def reinforce_plus_plus_baseline(
    rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, num_generations: int, axes: tuple[str, ...]
) -> Float[Array, "B T"]:
    r"""$R_i - \mathrm{mean}(R)$ over the group, on every token, whitened over all tokens of the batch.

    REINFORCE++ with baseline, Hu et al. 2025 (arXiv:2501.03262), as in verl's
    `compute_reinforce_plus_plus_baseline_outcome_advantage`. The standard deviation is that of the batch, because that
    of a group depends strongly on each of its few responses. R is the sum of a response's token rewards. Biased for the
    same reason as `reinforce_plus_plus`.
    """
    groups = _groups(rewards, response_mask, num_generations)
    centred = _on_tokens(groups - jnp.mean(groups, axis=1, keepdims=True), response_mask)
    return masking.whiten(centred, response_mask, axes)


class AdvantageSpec(NamedTuple):
    """An advantage estimator: (rewards, response_mask, num_generations, axes) -> advantages."""

    function: Callable[..., Array]
    needs_groups: bool = True  # needs several responses per prompt
    discounted: bool = False  # also takes gamma


CRITIC_FREE: dict[str, AdvantageSpec] = {
    "rloo": AdvantageSpec(rloo),
    "rloo_normalized": AdvantageSpec(rloo_normalized),
    "grpo": AdvantageSpec(grpo),
    "grpo_batch_std": AdvantageSpec(grpo_batch_std),
    "dr_grpo": AdvantageSpec(dr_grpo),
    "reinforce_plus_plus": AdvantageSpec(reinforce_plus_plus, needs_groups=False, discounted=True),
    "reinforce_plus_plus_baseline": AdvantageSpec(reinforce_plus_plus_baseline),
}


def informative_groups(scores: Float[Array, "B"], *, num_generations: int) -> Bool[Array, "G"]:
    """Mark the groups whose scores differ by more than 1e-6: the others have no gradient.

    Dynamic sampling keeps the marked groups: eq. 11 of Yu et al. 2025 (DAPO, arXiv:2503.14476), for any score.

    Args: scores are the reward's own, before scaling, clipping and penalties.
    """
    groups = scores.reshape(-1, num_generations)
    return jnp.max(groups, axis=1) - jnp.min(groups, axis=1) > 1e-6


def _groups(rewards: Array, mask: Array, num_generations: int) -> Array:
    if num_generations < 2 or len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} responses cannot be split into groups of {num_generations}; 2 is the least")
    return jnp.sum(jnp.where(mask, rewards, 0), axis=1).reshape(-1, num_generations)


def _others_subtracted(groups: Array) -> Array:
    count = groups.shape[1]
    return groups - (jnp.sum(groups, axis=1, keepdims=True) - groups) / (count - 1)


def _deviation(groups: Array, axes: tuple[str, ...]) -> Array:
    """Sample standard deviation (n - 1) over the responses of all devices."""
    count = masking.rows(groups.reshape(-1), axes)
    squares = masking.total(jnp.square(groups - masking.mean(groups, axes)), axes)
    return jnp.sqrt(squares / (count - 1).astype(groups.dtype))


def _on_tokens(groups: Array, mask: Array) -> Array:
    return jnp.where(mask, groups.reshape(-1, 1), 0)
