"""From one score a sequence to one advantage a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import masking


def token_rewards(
    scores: Float[Array, "B"], kl: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, kl_coef: float
) -> Float[Array, "B T"]:
    r"""Rewards $r_t = -\beta\, KL_t$, plus the score on the last response token.

    Eq. 2 of Ziegler et al. 2019 (arXiv:1909.08593), with the per-token k1 estimate as KL_t. Padding gets 0.

    Args: scores of whole responses; kl in nats a token; kl_coef is beta.
    """
    penalty = jnp.where(response_mask, -kl_coef * kl, 0)
    return penalty + masking.at_last_token(scores, response_mask)


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

    Returns: advantages and returns, 0 on padding.
    """
    rewards = jnp.where(response_mask, rewards, 0)
    values = jnp.where(response_mask, values, 0)
    next_values = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    deltas = rewards + gamma * next_values - values

    def backwards(next_advantage: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + gamma * gae_lambda * next_advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(backwards, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    advantages = jnp.where(response_mask, advantages.T, 0)
    return advantages, advantages + values
