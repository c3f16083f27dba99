"""Settings of a method, by which `policy_gradient.py` runs it.

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

Rows = TypeVar("Rows")
"""Batch that the epochs train on: `Experience`, or online DPO's pairs."""
KLEstimator = Callable[[Array, Array, Array], Array]
"""Function of the log-probabilities of policy, reference and old policy, as in `core/kl.py`."""


@runtime_checkable
class Learner(Protocol[Rows]):
    """Steps 4 and 6: what the epochs train on, and its loss."""

    def prepare(self, at: Setting, evaluated: Evaluated, frozen: Params, kl_coef: Coefficient) -> tuple[Rows, Numbers]:
        """Make the batch that the epochs train on."""
        ...

    def loss(
        self,
        at: Setting,
        params: Params,
        rows: Rows,
        dropout: Key[Array, "B"] | None,
        *,
        whole: Rows,
        kl_coef: Coefficient,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the mean loss of rows of a minibatch: the whole of it, or a part where gradients are accumulated."""
        ...

    def weight(self, rows: Rows, axes: tuple[str, ...]) -> Int[Array, ""]:
        """Count what the loss is a mean over."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineMethod(Generic[Rows]):
    """Settings of an iteration beyond `OnlineConfig`, as a stage's config resolves them. Defaults switch extras off."""

    learner: Learner[Rows]
    kl_coef: float
    kl_estimator: KLEstimator
    shaping: Shaping
    num_generations: int = 1  # responses to a prompt
    old_by_sampler: bool = False  # old log-probabilities are the sampler's: no forward pass of the learner
    importance: Callable[[Array, Array, Array], Array] | None = None  # core/importance.py: weights of tokens
    dynamic_sampling: DynamicSampling | None = None
    kl_controller: AdaptiveKL | None = None
    ptx: PretrainingMix | None = None
    value_warmup: int = 0  # iterations in which the policy stays as it is
    value_optimizer: OptimizerConfig | None = None  # None: policy and values share one
