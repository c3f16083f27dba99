"""Settings of an online method, as `policy_gradient.py` reads them.

`stages/ppo.py`, `stages/group_rl.py` and `stages/online_dpo.py` make them from their configs.
"""

import dataclasses
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from rlhf_jax.methods.dynamic_sampling import DynamicSampling
from rlhf_jax.methods.kl_controller import AdaptiveKL
from rlhf_jax.methods.policy_parts import Coefficient, Evaluated, Metrics, Numbers, Params, Setting, Shaping
from rlhf_jax.methods.pretraining_mix import PretrainingMix
from rlhf_jax.runtime.optimizers import OptimizerConfig
from rlhf_jax.types import Packing

Rows = TypeVar("Rows")
"""Batch that the epochs train on: `Experience`, or online DPO's pairs."""
KLEstimator = Callable[[Array, Array, Array], Array]
"""Function of the log-probabilities under the policy, the reference and the old policy, as in `core/kl.py`."""


@runtime_checkable
class Learner(Protocol[Rows]):
    """Steps 4 and 6 of an iteration: the batch that the epochs train on, and the loss of a minibatch."""

    @property
    def packed(self) -> Callable[[Rows, Packing], Rows] | None:
        """Function that adds its packing to a minibatch; None: nothing is packed."""
        ...

    def prepare(
        self, setting: Setting, evaluated: Evaluated, frozen: Params, kl_coef: Coefficient
    ) -> tuple[Rows, Numbers]:
        """Make the batch that the epochs train on."""
        ...

    def loss(
        self,
        setting: Setting,
        params: Params,
        rows: Rows,
        dropout: Key[Array, "B"] | None,
        *,
        whole: Rows,
        kl_coef: Coefficient,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the mean loss of `rows`: the minibatch `whole`, or a micro-batch of it if gradients accumulate."""
        ...

    def weight(self, rows: Rows, axes: tuple[str, ...]) -> Int[Array, ""]:
        """Count the items that the loss averages over: tokens, responses or pairs."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineMethod(Generic[Rows]):
    """Settings of an iteration beyond `OnlineConfig`; the defaults disable optional features."""

    learner: Learner[Rows]
    kl_coef: float
    kl_estimator: KLEstimator
    shaping: Shaping
    num_generations: int = 1  # responses to a prompt
    use_sampler_logprobs: bool = False  # use the sampler's old log-probabilities, without a forward pass of the learner
    importance: Callable[[Array, Array, Array], Array] | None = None  # weights of tokens (core/importance.py)
    dynamic_sampling: DynamicSampling | None = None
    kl_controller: AdaptiveKL | None = None
    measures_kl: bool = True
    ptx: PretrainingMix | None = None
    value_warmup: int = 0  # first iterations, which train only the value function
    value_optimizer: OptimizerConfig | None = None  # None: policy and value function share one
