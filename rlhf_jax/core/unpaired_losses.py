"""Losses that learn a policy from single responses, each labelled as desirable or not, against a reference."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import masking, metrics
from rlhf_jax.core.metrics import Difference, Metric


def kto_baseline(
    logprobs: Float[Array, "B"], ref_logprobs: Float[Array, "B"], axes: tuple[str, ...]
) -> Float[Array, ""]:
    r"""KTO's reference point: $\hat z_0 = \max(0, \mathbb{E}[\log \pi(y'|x) - \log \pi_{ref}(y'|x)])$, in nats.

    Ethayarajh et al. 2024 (arXiv:2402.01306). The responses $y'$ are those of other prompts of the batch, so that this
    is a biased estimate of the KL divergence to the reference. No gradient passes through it.

    Args: log-probabilities of whole responses in nats, each given another row's prompt.

    Examples:
        >>> print(kto_baseline(jnp.array([-3.0, -5.0]), jnp.array([-4.0, -5.0]), ()))
        0.5
        >>> print(kto_baseline(jnp.array([-5.0]), jnp.array([-4.0]), ()))  # an estimate below 0 counts as 0
        0.0
    """
    return jax.lax.stop_gradient(jnp.maximum(masking.mean(logprobs - ref_logprobs, axes), 0))


def kto_loss(
    logprobs: Float[Array, "B"],
    ref_logprobs: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    *,
    baseline: Float[Array, ""],
    beta: float | Float[Array, ""],
    desirable_weight: float,
    undesirable_weight: float,
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Kahneman-Tversky optimisation, averaged over the responses of the whole batch.

    $\lambda_D (1 - \sigma(\beta (\rho - z_0)))$ for a desirable response and $\lambda_U (1 - \sigma(\beta (z_0 -
    \rho)))$ for an undesirable one, with $\rho = \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}$: eq. 7 of Ethayarajh et al. 2024
    (arXiv:2402.01306).

    Args: log-probabilities of whole responses in nats, summed over tokens; baseline is $z_0$ from `kto_baseline`, and
    no gradient passes through it.
    Returns: the loss, and the metrics: `kl` (the baseline) and those of `label_metrics`.
    """
    baseline = jax.lax.stop_gradient(baseline)
    logratios = logprobs - ref_logprobs
    utility = jnp.where(desirable, logratios - baseline, baseline - logratios)
    weights = jnp.where(desirable, desirable_weight, undesirable_weight)
    loss = masking.mean(weights * jax.nn.sigmoid(-beta * utility), axes)
    kl = metrics.mean(jnp.broadcast_to(baseline, logprobs.shape), axes)
    return loss, {"kl": kl} | label_metrics(logprobs, ref_logprobs, desirable, beta=beta, axes=axes)


def apo_zero_unpaired_loss(
    logprobs: Float[Array, "B"],
    ref_logprobs: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    *,
    beta: float | Float[Array, ""],
    desirable_weight: float,
    undesirable_weight: float,
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Anchored preference optimisation without pairs, averaged over the responses of the whole batch.

    $\lambda_D (1 - \sigma(\beta \rho))$ for a desirable response, $\lambda_U \sigma(\beta \rho)$ for an undesirable
    one: the two terms of APO-zero (eq. 7 of D'Oosterlinck et al. 2024, arXiv:2408.06266), separated as in TRL. It is
    `kto_loss` with a baseline of 0, and needs no responses to other prompts.
    """
    logratios = logprobs - ref_logprobs
    weights = jnp.where(desirable, desirable_weight, undesirable_weight)
    loss = masking.mean(weights * jax.nn.sigmoid(beta * jnp.where(desirable, -logratios, logratios)), axes)
    return loss, label_metrics(logprobs, ref_logprobs, desirable, beta=beta, axes=axes)


def label_metrics(
    logprobs: Float[Array, "B"],
    ref_logprobs: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    *,
    beta: float | Float[Array, ""],
    axes: tuple[str, ...],
) -> dict[str, Metric]:
    """Means over desirable responses (`chosen`) and undesirable ones (`rejected`): `rewards/*` and `logps/*`.

    The implicit rewards are beta log(pi / pi_ref), and `rewards/margins` is the difference of their two means. A mean
    over no responses is 0.
    """
    rewards = beta * (logprobs - ref_logprobs)
    chosen, rejected = (metrics.masked_mean(rewards, mask, axes) for mask in (desirable, ~desirable))
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": Difference(chosen, rejected),
        "logps/chosen": metrics.masked_mean(logprobs, desirable, axes),
        "logps/rejected": metrics.masked_mean(logprobs, ~desirable, axes),
    }
