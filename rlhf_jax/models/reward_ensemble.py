"""Ensembles of reward models: the number of members, and the combination of their scores."""

import dataclasses
import functools
from typing import Literal

from jaxtyping import Array, Float

from rlhf_jax.config import AtLeastTwo, NonNegative, check_ranges
from rlhf_jax.core import ensembles

Combine = Literal["mean", "wco", "uwo"]
"""Mean, worst case and uncertainty-weighted optimisation (Coste et al. 2023, arXiv:2310.02743)."""


@dataclasses.dataclass(frozen=True)
class EnsembleConfig:
    """Number of members of an ensemble, and the combination of their scores."""

    members: AtLeastTwo  # reward models trained at once, from different initialisations
    combine: Combine  # score of the ensemble: mean, worst case (wco), or mean minus variance (uwo)
    # Weight of the members' variance, which uwo subtracts from their mean.
    variance_coefficient: NonNegative | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        check_combination(self.combine, self.variance_coefficient)


def check_combination(combine: Combine | None, variance_coefficient: float | None) -> None:
    """Raise ValueError unless a coefficient is given exactly for uwo."""
    if (combine == "uwo") != (variance_coefficient is not None):
        raise ValueError(
            f"variance_coefficient = {variance_coefficient} with combine = {combine!r}: uwo requires it (Coste et al. "
            "use 0.1), and no other combination uses it"
        )
    if variance_coefficient is not None and variance_coefficient < 0:
        raise ValueError(f"variance_coefficient = {variance_coefficient} must be >= 0: it weights a penalty")


def combined(config: EnsembleConfig, scores: Float[Array, "members B"]) -> Float[Array, "B"]:
    """Combine the members' scores into one score per response."""
    coefficient = config.variance_coefficient or 0.0
    functions = {
        "mean": ensembles.mean,
        "wco": ensembles.worst_case,
        "uwo": functools.partial(ensembles.uncertainty_weighted, variance_coefficient=coefficient),
    }
    return functions[config.combine](scores)
