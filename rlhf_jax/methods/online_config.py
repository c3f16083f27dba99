"""Config that all online methods share: PPO, the group methods and online DPO."""

import dataclasses

from rlhf_jax.config import Count, CountOrZero, ModelSource, NonNegative, Positive, check_ranges
from rlhf_jax.loading.models import NO_CHANGES, Tuning, refuse_float16
from rlhf_jax.runtime.loop import LoopConfig
from rlhf_jax.runtime.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Fields of every online method: the policy, which is start and reference, and the length of training."""

    policy: ModelSource  # policy to start from, and the reference
    iterations: Count  # rounds of sampling and learning
    batch_size: Count  # responses in an iteration, or pairs of them in online_dpo
    minibatches: Count  # updates in a pass over an iteration's responses
    epochs: Count  # passes over an iteration's responses
    temperature: Positive  # temperature of the samples
    optimizer: OptimizerConfig
    samples_every: Count  # iterations between those whose samples are written
    samples_written: CountOrZero  # samples written from such an iteration
    loop: LoopConfig
    missing_eos_penalty: NonNegative = 0.0  # penalty on the score of a response that was cut off
    tuning: Tuning = NO_CHANGES

    def __post_init__(self) -> None:
        refuse_float16(self.tuning, adapter=self.tuning.lora is not None)
        check_ranges(self)
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size = {self.batch_size} does not divide into {self.minibatches} minibatches")

    @property
    def updates(self) -> int:
        """Number of optimiser updates in the whole run."""
        return self.iterations * self.epochs * self.minibatches
