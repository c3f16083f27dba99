"""The choice among the preference losses: what a config names, what they read of the models, and their mixture."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from rlhf_jax.core import masking
from rlhf_jax.core import preference_losses as losses
from rlhf_jax.core.preference_losses import Pairs
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.types import PreferenceBatch

LossName = Literal["sigmoid"]
Beta = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    """One preference loss, or the sum of several with weights."""

    losses: tuple[LossName, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None  # one a loss; None: each counts once

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError(f"losses is empty: name one or more of {', '.join(LOSSES)}")
        if len(set(self.losses)) < len(self.losses):
            raise ValueError(f"losses = {self.losses} names a loss twice: give it a weight in loss_weights instead")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights = {self.loss_weights} must have one weight for each of {self.losses}")

    @property
    def needs_reference(self) -> bool:
        """Whether a chosen loss reads the reference's log-probabilities."""
        return True

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight a loss."""
        return self.loss_weights or (1.0,) * len(self.losses)


class PairStats(NamedTuple):
    """What one model says of the pairs of a batch."""

    chosen: Array  # float32[B], nats
    rejected: Array  # float32[B]
    weights: Array | None = None  # float32[B]


def pair_stats(
    config: PreferenceLossConfig,
    network: PolicyNetwork,
    params: PyTree,
    batch: PreferenceBatch,
    dropout_keys: Key[Array, "B"] | None = None,
) -> PairStats:
    """What the chosen losses read of a model's log-probabilities of a batch, in one forward pass."""
    del config
    return PairStats(*network.pair_logprobs(params, batch, dropout_keys=dropout_keys))


def join(own: PairStats, reference: PairStats | None, batch: PreferenceBatch) -> Pairs:
    """The policy's statistics beside the reference's, which are None where the losses need none."""
    return Pairs(
        own.chosen,
        own.rejected,
        None if reference is None else reference.chosen,
        None if reference is None else reference.rejected,
        masking.lengths(batch.chosen_mask),
        masking.lengths(batch.rejected_mask),
        own.weights,
    )


def preference_loss(
    config: PreferenceLossConfig, pairs: Pairs, *, beta: Beta, axes: tuple[str, ...]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted sum of the chosen losses, each averaged over the pairs of the whole batch.

    Returns: the loss, and the implicit rewards beta log(pi / pi_ref) as `rewards/{chosen,rejected,margins,accuracies}`,
    the mean log-probabilities as `logps/{chosen,rejected}`; of a mixture, each loss as `loss/NAME`.
    """
    chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
    parts = {name: masking.mean(LOSSES[name](chosen, rejected, beta=beta), axes) for name in config.losses}
    weighted = (weight * part for weight, part in zip(config.weights, parts.values(), strict=True))
    loss = sum(weighted, start=jnp.float32(0))
    metrics = losses.reward_metrics(beta * chosen, beta * rejected, axes) | {
        "logps/chosen": masking.mean(pairs.chosen, axes),
        "logps/rejected": masking.mean(pairs.rejected, axes),
    }
    if len(parts) > 1:
        metrics |= {f"loss/{name}": part for name, part in parts.items()}
    return loss, metrics


LOSSES: dict[str, Callable[..., Array]] = {"sigmoid": losses.sigmoid_loss}
