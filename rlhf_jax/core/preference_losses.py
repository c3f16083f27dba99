r"""Losses that learn a policy from pairs of responses, against a reference. Log-probabilities in, one loss a pair out.

Throughout, $\rho_w = \log\frac{\pi(y_w)}{\pi_{ref}(y_w)}$ is the log-ratio of the chosen response under policy and
reference, and $\rho_l$ that of the rejected one, in nats, summed over the response's tokens, EOS included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.core import masking
from rlhf_jax.types import AnyArray


class Pairs(NamedTuple):
    """What policy and reference say of B pairs, in nats, summed over response tokens, EOS included."""

    chosen: AnyArray  # float32[B], the policy's
    rejected: AnyArray  # float32[B]
    ref_chosen: AnyArray | None  # float32[B]; None where no loss reads the reference
    ref_rejected: AnyArray | None  # float32[B]
    chosen_tokens: AnyArray  # int32[B]: how many tokens a response has
    rejected_tokens: AnyArray  # int32[B]
    weights: AnyArray | None = None  # float32[B]: what each pair's loss is multiplied by, where it is


def sigmoid_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
    r"""Direct preference optimisation: $-\log \sigma(\beta \rho_w - \beta \rho_l)$.

    Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).
    """
    return -jax.nn.log_sigmoid(beta * chosen - beta * rejected)


def reward_metrics(
    chosen_rewards: Float[Array, "B"], rejected_rewards: Float[Array, "B"], axes: tuple[str, ...]
) -> dict[str, Array]:
    """Means of the implicit rewards, as `rewards/{chosen,rejected,margins,accuracies}`. A tie counts as half right."""
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": masking.mean(chosen_rewards, axes),
        "rewards/rejected": masking.mean(rejected_rewards, axes),
        "rewards/margins": masking.mean(margins, axes),
        "rewards/accuracies": masking.mean(0.5 * (1 + jnp.sign(margins)), axes),
    }
