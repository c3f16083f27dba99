"""The best checkpoint of a stage by a logged metric: kept, read by later stages, and a reason to stop early."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from rlhf_jax.config import Count, check_ranges
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.types import RlhfError, Row

BEST_FILE = "best.json"
"""File in a stage's directory with the step of its best checkpoint, and the metric's value there."""


@dataclasses.dataclass(frozen=True)
class Best:
    """Keep the checkpoint that is best by a metric; later stages and commands read it instead of the newest.

    A checkpoint is judged by the last value that was logged up to its step, the mean over seeds; the first of equal
    ones wins. With a metric of evaluations, let checkpoint_every be a multiple of eval_every.
    """

    metric: str  # logged metric, such as eval/loss
    goal: Literal["min", "max"]  # whether lower or higher values are better
    # Stop at a checkpoint that comes this many steps after the best one; None: train to the end.
    patience: Count | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


class BestSoFar:
    """The best checkpoint up to now. It is a function of the logged rows alone, so that resuming is exact."""

    def __init__(self, config: Best) -> None:
        """Start without a checkpoint."""
        self._config = config
        self._values: dict[int, float] = {}  # last value of each seed
        self._known: set[str] = set()
        self._last: int | None = None  # step of the newest checkpoint
        self.step: int | None = None
        self.value = np.inf if config.goal == "min" else -np.inf

    def log(self, rows: Iterable[Row]) -> None:
        """Read the metric from logged rows. A value that is not finite counts as the worst possible."""
        worst = np.inf if self._config.goal == "min" else -np.inf
        for row in rows:
            self._known |= row.keys()
            if self._config.metric in row:
                value = row[self._config.metric]
                self._values[row.get("seed", 0)] = worst if value is None else value

    def at_checkpoint(self, step: int) -> None:
        """Compare the checkpoint of a step with the best one. Raises RlhfError if the metric was not logged yet."""
        if not self._values:
            raise RlhfError(
                f"loop.best.metric = {self._config.metric!r} was not logged up to the checkpoint at step {step}: name "
                f"one of {', '.join(sorted(self._known - {'step', 'seed'}))}, or raise checkpoint_every to eval_every"
            )
        value, self._last = float(np.mean([*self._values.values()])), step
        better = value < self.value if self._config.goal == "min" else value > self.value
        if better or self.step is None:
            self.step, self.value = step, value

    def out_of_patience(self, step: int) -> bool:
        """Return whether a step has a checkpoint at which training should stop."""
        patience = self._config.patience
        return patience is not None and self.step is not None and step == self._last and step - self.step >= patience

    def write(self, directory: Path) -> None:
        """Record the best checkpoint for `best_step`."""
        value = self.value if np.isfinite(self.value) else None
        write_json(directory / BEST_FILE, {"step": self.step, "metric": self._config.metric, "value": value})


def best_step(directory: Path) -> int | None:
    """Step of the best checkpoint of a stage; None if the newest one is to be read."""
    file = directory / BEST_FILE
    return read_json(file)["step"] if file.exists() else None


@runtime_checkable
class Saved(Protocol):
    """A checkpoint, as Orbax describes it."""

    @property
    def step(self) -> int:
        """Step after which it was saved."""
        ...


class Preservation:
    """Orbax's policy of preservation that keeps the newest checkpoints and the best one."""

    def __init__(self, keep: int, best: BestSoFar) -> None:
        """Keep so many checkpoints besides the best one."""
        self._keep, self._best = keep, best

    def should_preserve(self, checkpoints: Sequence[Saved], *, context: object) -> Sequence[bool]:
        """Tell for each checkpoint, in the order of their steps, whether to keep it."""
        del context
        newest = {info.step for info in checkpoints[-self._keep :]}
        return [info.step in newest or info.step == self._best.step for info in checkpoints]
