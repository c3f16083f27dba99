r"""Estimators of $KL(\pi \| \pi_{ref})$ from samples of $\pi$: Schulman 2020, "Approximating KL divergence".

Each estimator takes the log-probabilities of sampled tokens under both models and returns one estimate per token, in
nats. An estimator with the right mean can have the wrong gradient. Used in the reward, it multiplies
$\nabla \log \pi$; used in the loss, it is differentiated itself. The gradients stated below are expectations over
samples of $\pi$, derived by Liu et al. 2025 (arXiv:2510.01555).

Responses have several tokens. In the reward, an estimate affects its own token and all earlier ones, so that `k1` has
the gradient of the divergence of whole responses. In the loss, it affects only its own token. The gradients stated
below are then per state: those of $\sum_s d(s) KL(\pi(\cdot|s) \| \pi_{ref}(\cdot|s))$ with the distribution d of
states s (prompt and tokens so far) held fixed, which ignores the effect of a token on the divergence of later ones.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.core.ratios import ratio, ratio_minus_one


def k1(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$\log \pi - \log \pi_{ref}$: unbiased, can be negative.

    In the reward its gradient is that of the divergence of whole responses. In the loss its expected gradient is 0.

    Examples:
        >>> logprobs, ref_logprobs = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.5, -0.5]])
        >>> for estimator in (k1, k2, k3):
        ...     print(jnp.round(estimator(logprobs, ref_logprobs), 4))
        [[ 0.5 -0.5]]
        [[0.125 0.125]]
        [[0.1065 0.1487]]
    """
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$\frac12 (\log \pi - \log \pi_{ref})^2$: biased, low variance, never negative.

    In the loss its gradient is that of the per-state divergence, although its value is biased. In the reward the
    gradient is $\nabla (E[k_2] - KL)$, which is second-order in the log-ratio while that of the divergence is
    first-order: it barely constrains a policy near its reference.
    """
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""$r - 1 - \log r$ with $r = \pi_{ref} / \pi$: unbiased, low variance, never negative.

    In the loss its gradient is that of the forward divergence $KL(\pi_{ref} \| \pi)$ per state. In the reward it is
    $\nabla KL(\pi \| \pi_{ref}) - \nabla KL(\pi_{ref} \| \pi)$, again second-order. Large ratios are linearised as in
    `ratios.ratio`.
    """
    log_ratio = ref_logprobs - logprobs
    return ratio_minus_one(log_ratio) - log_ratio


def k3_straight_through(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    r"""Value of `k3` with the gradient of `k2`: in the loss, both match the per-state divergence.

    `k3+` in verl (`kl_penalty` in its core_algos).
    """
    return _with_gradient_of(k3(logprobs, ref_logprobs), k2(logprobs, ref_logprobs))


def k3_weighted(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    r"""$w \cdot$ `k3` with the importance weight $w = \pi / \pi_{old}$; both factors are differentiated.

    Over samples of $\pi_{old}$, the value and (in the loss) the gradient are those of the per-state divergence, with
    the state distribution of $\pi_{old}$, even after the policy has moved away from $\pi_{old}$.

    DeepSeek-V3.2 (arXiv:2512.02556); `use_bias_correction_kl` in TRL's GRPOTrainer, which uses the ratio of the whole
    response if its policy loss does. Here the ratio is always per token.

    The gradient $w (\log \pi - \log \pi_{ref})$ is computed directly: as a sum over the two factors it would be a
    difference of two large numbers where the reference is much more likely.

    Args: old_logprobs are those of the sampling policy.
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
"""Estimators of (logprobs, ref_logprobs, old_logprobs) by name; only `k3_weighted` uses old_logprobs."""


def adaptive_kl_coef(
    kl_coef: float | Float[Array, ""], kl: Float[Array, ""], *, target: float, horizon: float, episodes: int
) -> Float[Array, ""]:
    r"""KL coefficient of the next iteration: $\beta (1 + e \cdot n / h)$ with $e = clip(KL / target - 1, -0.2, 0.2)$.

    Log-space proportional controller of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2), with the gain of their
    code, which uses a horizon of h episodes.

    Args: kl is the mean over the n episodes of an iteration; kl and target are in nats per response.

    Examples:
        The divergence is twice its target; the error is clipped to 0.2, and 0.2 x 512 / 10,000 is about 1 %:

        >>> print(jnp.round(adaptive_kl_coef(0.1, jnp.float32(12.0), target=6.0, horizon=10_000, episodes=512), 5))
        0.10102
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * (episodes / horizon))
