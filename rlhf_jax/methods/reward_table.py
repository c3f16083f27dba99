"""Table of the reward-model losses that a config may name, and their options.

To add a loss, write a function in `core.reward_losses` and a row in `LOSSES`; a new option is a field of
`RewardLossConfig`. The parameters of the function say what it reads: inputs of `INPUTS`, and options of the config. A
user's own loss, `file.py:name`, is a function of the scores of pairs that returns one number per pair.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax import user_code
from rlhf_jax.config import FunctionSource, NonNegative, Range, check_ranges
from rlhf_jax.core import masking, reward_losses
from rlhf_jax.core.metrics import Metric
from rlhf_jax.types import RlhfError, Row

Result = tuple[Float[Array, ""], dict[str, Metric]]

INPUTS = {
    "chosen_scores": "score of the chosen response",
    "rejected_scores": "score of the rejected response",
    "margins": "the column margin of a pair",
    "votes": "float32[B, 2]: numbers of raters for the chosen and the rejected response, from the column labels",
    "scores": "float32[B, K]: scores of up to K responses to a prompt",
    "wins": "bool[B, K, K]: wins[b, i, j] if response i is preferred to response j",
    "mask": "bool[B, K]: responses that exist, a prefix",
    "axes": "names of the device axes that rows are split over",
}
"""Inputs of the losses, float32[B] unless noted: one entry per pair, or per prompt with all its responses."""


@dataclasses.dataclass(frozen=True)
class RewardLossSpec:
    """Reward-model loss: a function that returns the loss of a batch, and properties that its signature does not show.

    `at_equal_scores` is the loss if all scores are equal, if it does not depend on the data.
    """

    function: Callable[..., Result]
    label: str  # usual name, such as Bradley-Terry
    at_equal_scores: float | None = None
    ranked: bool = False  # needs each prompt's responses in a strict order, best first
    also_reads: tuple[str, ...] = ()  # inputs and options that the signature does not name

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """Names of the inputs and options that the function takes."""
        named = inspect.signature(self.function).parameters
        return frozenset((*INPUTS, *LOSS_OPTIONS)).intersection((*named, *self.also_reads))

    @property
    def pairwise(self) -> bool:
        """True if a row is a pair, False if it is a prompt with all its responses."""
        return "scores" not in self.reads

    @property
    def column(self) -> str | None:
        """Column that the loss reads besides the responses of a pair."""
        return "margin" if "margins" in self.reads else "labels" if "votes" in self.reads else None


def _bradley_terry(
    chosen_scores: Array, rejected_scores: Array, *, label_smoothing: float, axes: tuple[str, ...]
) -> Result:
    """Bradley-Terry loss, with smoothed labels if asked for."""
    if label_smoothing:
        return reward_losses.smoothed_bradley_terry_loss(
            chosen_scores, rejected_scores, label_smoothing=label_smoothing, axes=axes
        )
    return reward_losses.bradley_terry_loss(chosen_scores, rejected_scores, axes=axes)


LOG_2 = float(np.log(2))
LOSSES: dict[str, RewardLossSpec] = {
    "bradley_terry": RewardLossSpec(_bradley_terry, "Bradley-Terry", LOG_2),
    "margin": RewardLossSpec(reward_losses.margin_loss, "Bradley-Terry with margins"),
    "classification": RewardLossSpec(reward_losses.classification_loss, "classification"),
    "raters": RewardLossSpec(reward_losses.raters_loss, "raters", LOG_2),
    "k_wise": RewardLossSpec(reward_losses.k_wise_loss, "K-wise", LOG_2),
    "plackett_luce": RewardLossSpec(reward_losses.plackett_luce_loss, "Plackett-Luce", ranked=True),
}

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]


def find_loss(name: str) -> RewardLossSpec:
    """Look up a loss by its name in `LOSSES`, or load a user's own. Raises RlhfError unless its signature is valid."""
    if name in LOSSES:
        return LOSSES[name]
    role, arguments = "reward-model loss", ("chosen_scores", "rejected_scores")
    function = user_code.load(name, role)
    options = user_code.options_of(function, name, role, arguments=arguments, options=("margins", *LOSS_OPTIONS))

    def mean_loss(chosen_scores: Array, rejected_scores: Array, *, axes: tuple[str, ...], **others: Array) -> Result:
        each = function(chosen_scores, rejected_scores, **others)
        if jnp.shape(each) != chosen_scores.shape:
            raise RlhfError(f"{role} {name} returned the shape {jnp.shape(each)}: return one number per pair")
        return masking.mean(each, axes), reward_losses.bradley_terry_loss(chosen_scores, rejected_scores, axes=axes)[1]

    return RewardLossSpec(mean_loss, label_of(name), also_reads=options)


def label_of(name: str) -> str:
    """Name of a loss in legends; a user's own is named after its function."""
    return LOSSES[name].label if name in LOSSES else name.rpartition(":")[2]


def level_at_equal_scores(loss: Row) -> float | None:
    """Value of a config's loss if all scores are equal; None if it depends on the data or is unknown.

    Args: loss holds the fields of a `RewardLossConfig`, as in a work directory; a user's own loss is not loaded.
    """
    return LOSSES[loss["name"]].at_equal_scores if loss["name"] in LOSSES else None


@dataclasses.dataclass(frozen=True)
class RewardLossConfig:
    """Loss of a reward model, with label smoothing and centring.

    `classification` trains a verifier of right (chosen) and wrong answers; `margin` reads a column `margin`; `raters` a
    column `labels` (one entry per rater: 1 prefers chosen, 0 rejected, 0.5 neither); `k_wise` ranked rows, or pairs,
    which are grouped by prompt; `plackett_luce` ranked rows.
    """

    # Loss; `margin`, `raters`, `k_wise` and `plackett_luce` need special columns. Your own: 'mine.py:my_loss'.
    name: LossName | FunctionSource = "bradley_terry"
    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0  # assumed share of flipped labels
    # Weight of centring: the squared sum of a pair's scores (eq. 2 of Eisenstein et al. 2023, arXiv:2312.09244).
    center_rewards_coefficient: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)
        for option in LOSS_OPTIONS:
            if getattr(self, option) and option not in self.spec.reads:
                readers = [name for name, spec in LOSSES.items() if option in spec.reads]
                raise ValueError(
                    f"{option} = {getattr(self, option)} has no effect with name = {self.name!r}: set it to 0, or use "
                    f"one of {', '.join(readers)}"
                )

    @property
    def spec(self) -> RewardLossSpec:
        """The chosen loss."""
        return find_loss(self.name)


LOSS_OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(RewardLossConfig)
    if field.name not in ("name", "center_rewards_coefficient")
)
"""Options that losses read by name."""

BRADLEY_TERRY = RewardLossConfig()
