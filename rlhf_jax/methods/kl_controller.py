"""Adaptive coefficient of the KL penalty."""

import dataclasses

from jaxtyping import Array, Float

from rlhf_jax.config import Positive
from rlhf_jax.core.kl import adaptive_kl_coef
from rlhf_jax.methods.policy_parts import Coefficient


@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """The controller of Ziegler et al. 2019, which adapts the coefficient until the divergence meets the target."""

    target: Positive  # KL to reach, in nats per response
    horizon: Positive  # episodes over which the coefficient adapts

    def next(self, kl_coef: Coefficient, kl: Float[Array, ""], episodes: int) -> Float[Array, ""]:
        """Compute the coefficient of the next iteration from the divergence of this one; see `adaptive_kl_coef`."""
        return adaptive_kl_coef(kl_coef, kl, target=self.target, horizon=self.horizon, episodes=episodes)
