"""Numbers of a config in which runs that train at once may differ, such as points of a sweep.

A program gets them as arrays in `frozen[PER_RUN]`, by the dotted path of their field; without the entry, the numbers of
the config are constants of the program.
"""

from collections.abc import Mapping
from typing import TypeVar

from jaxtyping import Array, PyTree

from rlhf_jax.config import with_values
from rlhf_jax.runtime.programs import PER_RUN

T = TypeVar("T")
Places = Mapping[str, tuple[str, ...]]
"""Fields of an object that a number of the config stands in, by the number's path."""

OPTIMIZER = ("optimizer.learning_rate", "optimizer.min_learning_rate", "optimizer.max_grad_norm")

IN_UPDATES: Places = {path: (path,) for path in OPTIMIZER}
IN_ITERATION: Places = {
    "kl_coef": ("method.kl_coef",),
    "beta": ("method.kl_coef", "method.learner.beta"),
    **{path: (f"config.{path}",) for path in OPTIMIZER},
}


def of_run(holder: T, frozen: Mapping[str, PyTree], places: Places) -> T:
    """Return a dataclass with the numbers of one run in the places that have them."""
    own = frozen.get(PER_RUN, {})
    return with_values(holder, {place: value for path, value in own.items() for place in places.get(path, ())})


def beta_of_run(frozen: Mapping[str, PyTree]) -> Array:
    """Return beta of one run: its own, or that of all runs."""
    return frozen.get(PER_RUN, {}).get("beta", frozen["beta"])
