"""Losses that learn a policy from preferences directly. Log-probabilities of whole responses in, scalars out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.core import masking


def dpo_loss(
    chosen_logprobs: Float[Array, "B"],
    rejected_logprobs: Float[Array, "B"],
    ref_chosen_logprobs: Float[Array, "B"],
    ref_rejected_logprobs: Float[Array, "B"],
    *,
    beta: float | Float[Array, ""],
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""Direct preference optimisation, the sigmoid loss, averaged over the pairs of the whole batch.

    $L = -\mathbb{E}[\log \sigma(\beta \log\frac{\pi(y_w)}{\pi_{ref}(y_w)} -
    \beta \log\frac{\pi(y_l)}{\pi_{ref}(y_l)})]$, eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

    Args: log-probabilities in nats of whole responses (summed over tokens) under policy and reference.
    Returns: the loss, and the implicit rewards beta log(pi / pi_ref) as `rewards/{chosen,rejected,margins,accuracies}`,
    the mean log-probabilities as `logps/{chosen,rejected}`. A tie counts as half right.
    """
    chosen_rewards = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected_rewards = beta * (rejected_logprobs - ref_rejected_logprobs)
    margins = chosen_rewards - rejected_rewards
    return masking.mean(-jax.nn.log_sigmoid(margins), axes), {
        "rewards/chosen": masking.mean(chosen_rewards, axes),
        "rewards/rejected": masking.mean(rejected_rewards, axes),
        "rewards/margins": masking.mean(margins, axes),
        "rewards/accuracies": masking.mean(0.5 * (1 + jnp.sign(margins)), axes),
        "logps/chosen": masking.mean(chosen_logprobs, axes),
        "logps/rejected": masking.mean(rejected_logprobs, axes),
    }
