r"""Estimators of $KL(\pi \| \pi_{ref})$ from samples of $\pi$: Schulman 2020, "Approximating KL divergence".

Each takes the log-probabilities of sampled tokens under both models and gives one estimate a token, in nats. An
estimator with the right mean need not have the right gradient. In the reward it multiplies $\nabla \log \pi$; in the
loss it is differentiated itself. The gradients named below are means over samples of $\pi$; Liu et al. 2025
(arXiv:2510.01555) derive them.

A response has several tokens. In the reward an estimate counts for its token and all before it, so that `k1` has the
gradient of the divergence of whole responses. In the loss it counts for its own token alone: the gradients named below
are then state by state, those of $\sum_s d(s) KL(\pi(\cdot|s) \| \pi_{ref}(\cdot|s))$ with the distribution d of the
states s (prompt and tokens so far) held fixed. What a token does to the divergence of later ones is left out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.core.ratios import ratio, ratio_minus_one


def k1(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$\log \pi - \log \pi_{ref}$: unbiased, of either sign.

    In the reward its gradient is exactly that of the divergence of whole responses. In the loss its mean is 0.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$\frac12 (\log \pi - \log \pi_{ref})^2$: biased, low variance, never negative.

    In the loss its gradient is the divergence's, state by state, although its value is not. In the reward the gradient
    is $\nabla (E[k_2] - KL)$, of second order in the log-ratio where the divergence's is of first: it hardly holds a
    policy that is near its reference.
    """
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$r - 1 - \log r$ with $r = \pi_{ref} / \pi$: unbiased, low variance, never negative.

    In the loss its gradient is that of the forward divergence $KL(\pi_{ref} \| \pi)$, state by state. In the reward it
    is $\nabla KL(\pi \| \pi_{ref}) - \nabla KL(\pi_{ref} \| \pi)$, again of second order. Large ratios are those of
    `ratios.ratio`.
    """
    log_ratio = ref_logprobs - logprobs
    return ratio_minus_one(log_ratio) - log_ratio


def k3_straight_through(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""The value of `k3` with the gradient of `k2`: both are the divergence's in the loss, state by state.

    verl's `k3+` (`kl_penalty` of its core_algos).
    """
    return _with_gradient_of(k3(logprobs, ref_logprobs), k2(logprobs, ref_logprobs))


def k3_weighted(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    r"""$w \cdot$ `k3` with $w = \pi / \pi_{old}$; both factors have a gradient.

    Over samples of $\pi_{old}$ its value and, in the loss, its gradient are the divergence's at every update, also when
    the policy has left the one that sampled; state by state, with the states of $\pi_{old}$.

    DeepSeek-V3.2 (arXiv:2512.02556); `use_bias_correction_kl` in TRL's GRPOTrainer, which takes the ratio of the
    whole response where its policy loss does: here it is always the token's.

    The gradient is $w (\log \pi - \log \pi_{ref})$, and is computed as such: as a sum of the two factors' it would be
    a difference of two large numbers where the reference is much the likelier.

    Args: old_logprobs are those of the policy that sampled.
    """
    weight, log_ratio = ratio(logprobs - old_logprobs), jax.lax.stop_gradient(logprobs - ref_logprobs)
    return _with_gradient_of(weight * k3(logprobs, ref_logprobs), weight * log_ratio)


def _with_gradient_of(value: Array, other: Array) -> Array:
    return jax.lax.stop_gradient(value) + (other - jax.lax.stop_gradient(other))


def _on_policy(estimator: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    def estimate(logprobs: Array, ref_logprobs: Array, old_logprobs: Array) -> Array:
        del old_logprobs
        return estimator(logprobs, ref_logprobs)

    return estimate


ESTIMATORS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "k1": _on_policy(k1),
    "k2": _on_policy(k2),
    "k3": _on_policy(k3),
    "k3+": _on_policy(k3_straight_through),
    "k3_weighted": k3_weighted,
}
"""Name -> estimator of (logprobs, ref_logprobs, old_logprobs); only `k3_weighted` reads the last."""


def adaptive_kl_coef(
    kl_coef: float | Float[Array, ""], kl: Float[Array, ""], *, target: float, horizon: float, episodes: int
) -> Float[Array, ""]:
    r"""The coefficient of the next iteration: $\beta (1 + e \cdot n / h)$ with $e = clip(KL / target - 1, -0.2, 0.2)$.

    The log-space proportional controller of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2), with the gain of their
    code: it reacts over a horizon of h episodes.

    Args: kl in nats a response, the mean of an iteration of n episodes; target in nats a response.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * (episodes / horizon))
