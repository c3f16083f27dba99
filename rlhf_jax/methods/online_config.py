"""Config fields that all online methods share: PPO, the group methods and online DPO."""

import dataclasses

from rlhf_jax.config import Count, CountOrZero, ModelSource, NonNegative, Positive, check_ranges
from rlhf_jax.loading.models import NO_CHANGES, Tuning, refuse_float16
from rlhf_jax.runtime.loop import LoopConfig
from rlhf_jax.runtime.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Fields of every online method: the initial policy, which is also the reference, and the length of training."""

    policy: ModelSource  # initial policy, and the reference
    iterations: Count  # rounds of sampling and learning
    batch_size: Count  # responses per iteration; for online_dpo, pairs of responses
    minibatches: Count  # minibatches per epoch, with one update each
    epochs: Count  # passes over each iteration's responses
    temperature: Positive  # temperature of the samples
    optimizer: OptimizerConfig
    samples_every: Count  # write samples every so many iterations
    samples_written: CountOrZero  # number of samples to write each time
    loop: LoopConfig
    # Pack rows whose lengths differ, and pad others to the longest prompt and response, with two programs an iteration;
    # False: pad to the maximum lengths.
    trim_padding: bool = True
    # Sample with this many decoding slots, each of which takes the next prompt when its response ends (continuous
    # batching); per device with pmap. None: decode all responses at once, until the longest ends.
    slots: Count | None = None
    # Responses per forward pass without a gradient, over all devices: old and reference log-probabilities, values and
    # scores, and sampling without `slots`; None: all responses of an iteration at once.
    forward_batch: Count | None = None
    # Number of the written samples whose tokens are written with their KL, reward, advantage and value, for the
    # report; None: 4, or samples_written if that is less.
    tokens_written: CountOrZero | None = None
    missing_eos_penalty: NonNegative = 0.0  # subtracted from the score of a truncated response
    tuning: Tuning = NO_CHANGES

    def __post_init__(self) -> None:
        refuse_float16(self.tuning, adapter=self.tuning.lora is not None)
        check_ranges(self)
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size = {self.batch_size} is not a multiple of minibatches = {self.minibatches}")
        if self.iterations % self.loop.steps_per_call:
            raise ValueError(
                f"iterations = {self.iterations} is not a multiple of loop.steps_per_call = "
                f"{self.loop.steps_per_call}: a shorter last call would compile a second program. Change one of them"
            )
        written, shown = self.tokens_written, self.samples_written
        if written is not None and written > shown:
            raise ValueError(
                f"tokens_written = {written} is more than samples_written = {shown}: lower it, or raise that"
            )

    @property
    def tokens_recorded(self) -> int:
        """Number of samples whose tokens are written with their values."""
        return min(4, self.samples_written) if self.tokens_written is None else self.tokens_written

    @property
    def updates(self) -> int:
        """Number of optimiser updates in the whole run."""
        return self.iterations * self.epochs * self.minibatches
