"""Files that training writes into the directory of a stage, and the state of several stages that train at once."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax import processes
from rlhf_jax.config import Count, check_ranges
from rlhf_jax.runtime.best import Best, BestSoFar
from rlhf_jax.runtime.checkpoints import Checkpoints, TrainState
from rlhf_jax.runtime.files import RowWriter, read_rows
from rlhf_jax.runtime.programs import Placement
from rlhf_jax.runtime.trackers import Service, Tracker, opened
from rlhf_jax.types import Row


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Numbers of steps per device call and between checkpoints."""

    steps_per_call: Count  # steps per device call; logging and checkpoints happen between calls
    checkpoint_every: Count  # steps between checkpoints
    keep: Count = 2  # number of newest checkpoints to keep
    best: Best | None = None  # keep the best checkpoint by a metric, for later stages; None: they read the newest

    def __post_init__(self) -> None:
        check_ranges(self)


class Output:
    """Metrics, samples and checkpoints of one stage, and the copies of its metrics."""

    def __init__(self, directory: Path, config: LoopConfig, services: Sequence[Service]) -> None:
        """Open the checkpoints. The other files are opened by `open`."""
        self.directory, self._services, self._files = directory, services, contextlib.ExitStack()
        self.best = None if config.best is None else BestSoFar(config.best)
        self.checkpoints = Checkpoints(directory / "checkpoints", config.keep, self.best)
        self._trackers: list[Tracker] = []

    @property
    def has_metrics(self) -> bool:
        """Return whether an earlier process wrote metrics."""
        return bool(read_rows(self.directory / "metrics.jsonl"))

    def open(self, done: int, steps_per_call: int, is_planned: Callable[[int], bool]) -> None:
        """Open all files, without what was written after `done` steps.

        Args: is_planned tells whether a step has a checkpoint.
        """
        self._metrics, self.samples = (
            self._files.enter_context(contextlib.closing(RowWriter(self.directory / f"{name}.jsonl", done)))
            for name in ("metrics", "samples")
        )
        if processes.is_first():
            self._trackers = self._files.enter_context(opened(self._services, self.directory))
        if self.best and done:
            rows = read_rows(self.directory / "metrics.jsonl")
            for step in range(steps_per_call, done + 1, steps_per_call):
                self.best.log(row for row in rows if step - steps_per_call < row["step"] <= step)
                if is_planned(step):
                    self.best.at_checkpoint(step)

    def log(self, rows: list[Row]) -> None:
        """Write rows of metrics."""
        self._metrics.write(rows)
        for tracker in self._trackers:
            tracker.write(rows)
        if self.best:
            self.best.log(rows)

    def out_of_patience(self, step: int) -> bool:
        """Return whether training should stop at a step."""
        return self.best is not None and self.best.out_of_patience(step)

    def save(self, state: TrainState, step: int, is_planned: Callable[[int], bool]) -> None:
        """Write all rows to disk, and start to save the state."""
        self._metrics.flush()
        self.samples.flush()
        if is_planned(step):  # the kept ones are then those of a run that nothing ended
            if self.best:
                self.best.at_checkpoint(step)
            self.checkpoints.keep_only(is_planned)
        self.checkpoints.save(state)

    def close(self) -> None:
        """Close all files, and wait for the last checkpoint."""
        with contextlib.closing(self.checkpoints):
            self._files.close()


def resume(outputs: Sequence[Output]) -> tuple[int, list[str]]:
    """Find the newest step with an undamaged checkpoint in every directory, and remove later and damaged checkpoints.

    Returns: the step, 0 for none, and a damaged file of each removed checkpoint.
    """
    damaged: list[str] = []
    while True:
        common = frozenset.intersection(*(output.checkpoints.steps() for output in outputs))
        found = [output.checkpoints.newest_whole(common) for output in outputs]
        damaged += [file for _, files in found for file in files]
        done = min(step for step, _ in found)
        if all(step == done for step, _ in found):
            for output in outputs:
                output.checkpoints.remove_after(done)
            return done, damaged


def runs_of(runs: int, stages: int) -> list[range]:
    """Numbers of the runs of each stage that trains at once."""
    each = runs // stages
    return [range(stage * each, (stage + 1) * each) for stage in range(stages)]


def split(state: PyTree, runs: int, stages: int) -> list[PyTree]:
    """Split the state of all runs into those of the stages, as each has it when it trains alone."""
    if stages == 1:
        return [state]
    return [
        jax.tree.map(lambda leaf, own=own: leaf[own.start] if len(own) == 1 else leaf[own.start : own.stop], state)
        for own in runs_of(runs, stages)
    ]


def joined(states: Sequence[PyTree], runs: int) -> PyTree:
    """Join the states of stages, as `split` returns them, to the state of all runs."""
    if len(states) == 1:
        return states[0]
    join = jnp.stack if len(states) == runs else jnp.concatenate
    return jax.tree.map(lambda *leaves: join(leaves), *states)


def abstract_part(state: PyTree, placement: Placement, stages: int) -> PyTree:
    """Shapes, dtypes and shardings of one stage's part of the state, with which to restore its checkpoint."""
    if stages == 1:
        return placement.restored(state)
    part = jax.eval_shape(lambda state: split(state, placement.seeds, stages)[0], state)
    return dataclasses.replace(placement, seeds=placement.seeds // stages).restored(part)
