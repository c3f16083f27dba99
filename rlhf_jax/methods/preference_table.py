"""Table of the preference losses that a config may name, and their options.

To add a loss, write a function in `core` and a row in `LOSSES`; a new option is a field of `PreferenceLossConfig`. The
parameters of the function say what it reads: inputs of `INPUTS`, and options of the config. The same holds for a user's
own loss, `file.py:name`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Array

from rlhf_jax import user_code
from rlhf_jax.config import Finite, FunctionSource, NonNegative, Positive, Range, check_ranges
from rlhf_jax.core import divergences, reference_free_losses
from rlhf_jax.core import preference_losses as losses
from rlhf_jax.types import Row

INPUTS = {
    "chosen_logps": "log-probability of the chosen response under the policy",
    "rejected_logps": "log-probability of the rejected response under the policy",
    "ref_chosen_logps": "log-probability of the chosen response under the reference",
    "ref_rejected_logps": "log-probability of the rejected response under the reference",
    "chosen_logratios": "chosen_logps - ref_chosen_logps",
    "rejected_logratios": "rejected_logps - ref_rejected_logps",
    "full_chosen_logps": "chosen_logps with every token counted once, also with LD-DPO",
    "full_rejected_logps": "rejected_logps with every token counted once, also with LD-DPO",
    "chosen_tokens": "length of the chosen response, int32",
    "rejected_tokens": "length of the rejected response, int32",
    "tokens_per_pair": "mean length of the chosen responses of the batch, a scalar",
    "beta": "the stage's beta, a scalar",
    "axes": "names of the device axes that rows are split over; a loss that reads them uses statistics of the batch",
}
"""Inputs of losses: by default float32[B], in nats, summed over the tokens of a response, including EOS."""


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """Preference loss: a function that returns one loss per pair, and properties that its signature does not show.

    `at_reference` is the loss if the policy equals the reference, if it does not depend on the pair.
    """

    function: Callable[..., Array]
    label: str  # usual name, such as SimPO
    at_reference: float | None = None
    any_divergence: bool = False  # depends only on the difference of log-ratios, so that constants cancel
    reorders: bool = False  # compares responses of different pairs, so that single pairs have no loss
    per_token: bool = False  # implicit rewards are log-probabilities per token
    nonzero: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # option -> usual value

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """Names of the inputs and options that the function takes."""
        return frozenset((*INPUTS, *LOSS_OPTIONS)).intersection(inspect.signature(self.function).parameters)

    @property
    def needs_reference(self) -> bool:
        """True if the loss reads the reference's log-probabilities."""
        return any(name.startswith("ref_") or name.endswith("_logratios") for name in self.reads)

    @property
    def whole_batch(self) -> bool:
        """True if the loss uses statistics of the whole batch, so that it cannot be accumulated over micro-batches."""
        return "axes" in self.reads

    def takes(self, option: str) -> bool:
        """True if the loss reads this option of the config."""
        if option == "divergence":
            return self.any_divergence
        if option == "use_weighting":
            return not self.reorders
        if option == "ld_alpha":
            return any(name.endswith(("_logps", "_logratios")) and not name.startswith("full_") for name in self.reads)
        return option in self.reads


LOG_2 = float(np.log(2))
LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(losses.sigmoid_loss, "DPO", LOG_2, any_divergence=True),
    "cdpo": LossSpec(losses.cdpo_loss, "cDPO", LOG_2, any_divergence=True),
    "robust": LossSpec(losses.robust_loss, "robust DPO", LOG_2, any_divergence=True),
    "hinge": LossSpec(losses.hinge_loss, "hinge", 1.0, any_divergence=True),
    "ipo": LossSpec(losses.ipo_loss, "IPO", any_divergence=True),
    "sigmoid_norm": LossSpec(losses.sigmoid_norm_loss, "length-normalised DPO", LOG_2, any_divergence=True),
    "exo_pair": LossSpec(losses.exo_pair_loss, "EXO", any_divergence=True, nonzero={"label_smoothing": "0.001"}),
    "nca_pair": LossSpec(losses.nca_pair_loss, "NCA", 2 * LOG_2),
    "bco_pair": LossSpec(losses.bco_pair_loss, "BCO", 2 * LOG_2),
    "sppo_hard": LossSpec(losses.sppo_hard_loss, "SPPO"),
    "aot": LossSpec(losses.aot_loss, "AOT", LOG_2, reorders=True),
    "aot_unpaired": LossSpec(losses.aot_unpaired_loss, "AOT, unpaired", LOG_2, reorders=True),
    "apo_zero": LossSpec(losses.apo_zero_loss, "APO-zero", 1.0),
    "apo_down": LossSpec(losses.apo_down_loss, "APO-down", 1.0),
    "discopop": LossSpec(losses.discopop_loss, "DiscoPOP", 0.5 + 0.5 * LOG_2, any_divergence=True),
    "dpop": LossSpec(losses.dpop_loss, "DPOP", LOG_2),
    "alpha_dpo": LossSpec(losses.alpha_dpo_loss, "alpha-DPO"),
    "sft": LossSpec(reference_free_losses.sft_loss, "SFT", any_divergence=True),  # reads no log-ratio
    "cpo": LossSpec(reference_free_losses.cpo_loss, "CPO"),
    "simpo": LossSpec(reference_free_losses.simpo_loss, "SimPO", per_token=True),
    "alphapo": LossSpec(
        reference_free_losses.alphapo_loss, "AlphaPO", per_token=True, nonzero={"alphapo_alpha": "0.25"}
    ),
    "orpo": LossSpec(reference_free_losses.orpo_loss, "ORPO", per_token=True),
}

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def find_loss(name: str) -> LossSpec:
    """Look up a loss by its name in `LOSSES`, or load a user's own. Raises RlhfError unless its signature is valid."""
    if name in LOSSES:
        return LOSSES[name]
    function = user_code.load(name, "preference loss")
    user_code.options_of(function, name, "preference loss", arguments=(), options=(*INPUTS, *LOSS_OPTIONS))
    spec = LossSpec(function, label_of(name))
    return dataclasses.replace(spec, reorders=spec.whole_batch)  # it may: only the built-in ones are known not to


def label_of(name: str) -> str:
    """Name of a loss in tables and legends; a user's own is named after its function."""
    return LOSSES[name].label if name in LOSSES else name.rpartition(":")[2]


def level_at_reference(loss: Row) -> float | None:
    """Value of a config's loss where the policy equals the reference; None if it depends on data or is unknown.

    Args: loss holds the fields of a `PreferenceLossConfig`, as in a work directory; a user's own loss is not loaded.
    """
    levels = [LOSSES[name].at_reference if name in LOSSES else None for name in loss["losses"]]
    weights = loss["loss_weights"] or [1.0] * len(levels)
    terms = [weight * level for weight, level in zip(weights, levels, strict=True) if level is not None]
    return None if loss["use_weighting"] or len(terms) < len(levels) else sum(terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    """A preference loss, or a weighted sum of several. An option that none of them reads must keep its default."""

    losses: tuple[LossName | FunctionSource, ...] = ("sigmoid",)  # losses to sum
    loss_weights: tuple[Finite, ...] | None = None  # weights in the sum; None: 1 each
    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0  # assumed share of flipped labels
    divergence: Divergence = "reverse_kl"  # divergence from the reference
    # Alpha of the alpha-divergence, between 0 (reverse KL) and 1 (forward KL).
    divergence_alpha: Annotated[float, Range(above=0, below=1)] = 0.5
    discopop_tau: Positive = 0.05  # tau of DiscoPOP's modulation (eq. 5 of Lu et al. 2024, arXiv:2406.08414)
    simpo_gamma: NonNegative = 0.5  # target margin of SimPO, AlphaPO and alpha-DPO, in nats
    cpo_alpha: NonNegative = 1.0  # weight of CPO's likelihood
    dpop_lambda: NonNegative = 50.0  # weight of DPOP's penalty on a chosen response below its reference likelihood
    alpha_dpo_alpha: NonNegative = 0.2  # coefficient of the per-pair part of alpha-DPO's margin
    alphapo_alpha: Finite = 0.25  # shape of AlphaPO's reward; in the limit 0, SimPO's
    # LD-DPO's weight of tokens beyond the shorter response; None: 1.
    ld_alpha: Annotated[float, Range(at_least=0, below=1)] | None = None
    use_weighting: bool = False  # WPO: weight pairs by their likelihood under the policy

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError(f"losses is empty: name one or more of {', '.join(LOSSES)}")
        if len(set(self.losses)) < len(self.losses):
            raise ValueError(f"losses = {self.losses} names a loss twice: give it a weight in loss_weights instead")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights = {self.loss_weights} must have one weight for each of {self.losses}")
        check_ranges(self)
        for name, spec in zip(self.losses, self.specs, strict=True):
            for option, usual in spec.nonzero.items():
                if getattr(self, option) == 0:
                    raise ValueError(
                        f"{name} divides by {option} or takes its logarithm: set it, for example to {usual}"
                    )
        for field in dataclasses.fields(self):
            if field.name in (*LOSS_OPTIONS, *INPUT_OPTIONS) and getattr(self, field.name) != field.default:
                self._check_read(field.name)
        if self.divergence_alpha != 0.5 and self.divergence != "alpha_divergence":
            raise ValueError(
                f"divergence_alpha = {self.divergence_alpha} has no effect with divergence = {self.divergence!r}: "
                "leave it out, or choose 'alpha_divergence'"
            )

    def _check_read(self, option: str) -> None:
        others = [name for name, spec in zip(self.losses, self.specs, strict=True) if not spec.takes(option)]
        if others and (option in READ_BY_ALL or len(others) == len(self.losses)):
            readers = sorted(name for name in LOSSES if LOSSES[name].takes(option))
            raise ValueError(
                f"{option} = {getattr(self, option)!r} has no effect with {', '.join(others)}{WHY.get(option, '')}: "
                f"leave it out, or choose among {', '.join(readers)}"
            )

    @property
    def specs(self) -> tuple[LossSpec, ...]:
        """Specs of the configured losses."""
        return tuple(map(find_loss, self.losses))

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per loss."""
        return self.loss_weights or (1.0,) * len(self.losses)

    @property
    def needs_reference(self) -> bool:
        """True if a configured loss reads the reference's log-probabilities."""
        return any(spec.needs_reference for spec in self.specs)


INPUT_OPTIONS = ("divergence", "ld_alpha", "use_weighting")
"""Options that change the inputs of losses, or weight pairs."""

LOSS_OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(PreferenceLossConfig)
    if field.name not in ("losses", "loss_weights", "divergence_alpha", *INPUT_OPTIONS)
)
"""Options that losses read by name."""

READ_BY_ALL = ("divergence", "use_weighting")
WHY: dict[str, str] = {
    "divergence": ", because its constant cancels only in the difference of two log-ratios",
    "ld_alpha": ", because likelihoods and means over tokens count all tokens",
    "use_weighting": ", because it compares different pairs",
}
DIVERGENCES: dict[str, Callable[[Array, PreferenceLossConfig], Array]] = {
    "reverse_kl": lambda logratios, config: logratios,
    "forward_kl": lambda logratios, config: divergences.forward_kl(logratios),
    "js_divergence": lambda logratios, config: divergences.js_divergence(logratios),
    "alpha_divergence": lambda logratios, config: divergences.alpha_divergence(
        logratios, alpha=config.divergence_alpha
    ),
}


def check_micro_batch(config: PreferenceLossConfig, micro_batch: int | None) -> None:
    """Raise ValueError if gradients are accumulated for a loss that uses statistics of the whole batch."""
    whole = [name for name, spec in zip(config.losses, config.specs, strict=True) if spec.whole_batch]
    if micro_batch is not None and whole:
        raise ValueError(
            f"optimizer.micro_batch = {micro_batch} does not work with {' and '.join(whole)}, which uses statistics of "
            "the whole batch: set micro_batch = None"
        )
