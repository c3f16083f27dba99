"""Losses that learn a scalar reward from preferences."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.core import masking


def bradley_terry_loss(
    chosen_scores: Float[Array, "B"], rejected_scores: Float[Array, "B"], *, axes: tuple[str, ...]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""Negative log-likelihood of the preferences under Bradley and Terry's model, averaged over the whole batch.

    $L = -\mathbb{E}[\log \sigma(r(x, y_w) - r(x, y_l))]$, eq. 1 of Ouyang et al. 2022 (arXiv:2203.02155) for pairs.

    Returns: the loss, and `accuracy` (a tie counts half), `margin`, and `{min,mean,max}_reward` over both responses.
    """
    margins = chosen_scores - rejected_scores
    scores = jnp.concatenate([chosen_scores, rejected_scores])
    fixed = jax.lax.stop_gradient(scores)  # pmin and pmax have no gradient, not even one that nobody asks for
    lowest, highest = jnp.min(fixed), jnp.max(fixed)
    return masking.mean(-jax.nn.log_sigmoid(margins), axes), {
        "accuracy": masking.mean(0.5 * (1 + jnp.sign(margins)), axes),
        "margin": masking.mean(margins, axes),
        "min_reward": jax.lax.pmin(lowest, axes) if axes else lowest,
        "mean_reward": masking.mean(scores, axes),
        "max_reward": jax.lax.pmax(highest, axes) if axes else highest,
    }
