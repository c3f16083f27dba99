r"""Your own advantage estimator for `group_rl`: OPO's optimal baseline (Hao et al. 2025, arXiv:2505.23585).

    rlhf-jax run --config=EXPERIMENT.py --workdir=DIR --config.rl.advantage=examples/advantage.py:optimal_baseline

where `rl` is a stage of kind `group_rl`. The estimator receives token rewards: the score on the last token of a
response and, if the KL penalty is in the rewards, minus the penalty on each token.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def optimal_baseline(
    rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, num_generations: int
) -> Float[Array, "B T"]:
    r"""$A_i = R_i - \sum_j |y_j| R_j / \sum_j |y_j|$ over the group, on every token of response i.

    The baseline minimises the variance of the gradient if the squared norm of a response's gradient is proportional to
    its length $|y|$.
    """
    returns = jnp.sum(jnp.where(response_mask, rewards, 0), axis=1).reshape(-1, num_generations)
    lengths = jnp.sum(response_mask, axis=1).reshape(-1, num_generations)
    baseline = jnp.sum(lengths * returns, axis=1, keepdims=True) / jnp.maximum(
        jnp.sum(lengths, axis=1, keepdims=True), 1
    )
    return jnp.where(response_mask, (returns - baseline).reshape(-1, 1), 0)
