r"""Your own policy loss for `group_rl`: tapered off-policy REINFORCE (Le Roux et al. 2025, arXiv:2503.14286).

    rlhf-jax run --config=EXPERIMENT.py --workdir=DIR --config.rl.policy_loss=examples/policy_loss.py:tapered

where `rl` is a stage of kind `group_rl`. A keyword parameter named like a loss option of the config (`clip_ratio`,
`clip_ratio_high`, ...) receives the option's value. A changed file counts as a changed config.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core.policy_losses import TokenLosses


def tapered(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
) -> TokenLosses:
    r"""$-A \log \pi(a_t)$ for good responses, and $-\mathrm{sg}[\min(\rho, 1)] A \log \pi(a_t)$ for bad ones.

    $\rho = \pi(y|x) / \pi_{old}(y|x)$ is the ratio of the whole response. Good responses (positive advantage) have full
    weight however unlikely they have become; the weight of bad ones falls with their probability. Nothing is clipped.
    """
    logprobs, old_logprobs, advantages = (jnp.where(response_mask, x, 0) for x in (logprobs, old_logprobs, advantages))
    ratio = jnp.exp(jnp.minimum(jnp.sum(logprobs - old_logprobs, axis=1, keepdims=True), 0))
    weight = jax.lax.stop_gradient(jnp.where(advantages > 0, 1, ratio))
    return TokenLosses(-weight * advantages * logprobs, jnp.zeros(logprobs.shape, bool))
