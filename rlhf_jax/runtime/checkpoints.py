"""Asynchronous Orbax checkpoints of training states, one directory per step with one item per network.

Each has the hashes of its files, so that a file that was cut short or changed on disk is never read.

Orbax takes half a second to import, so it is imported when a directory of checkpoints is opened.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rlhf_jax import processes
from rlhf_jax.models.sharding import Where, on_devices
from rlhf_jax.runtime.best import BestSoFar, Preservation, best_step
from rlhf_jax.runtime.files import write_json
from rlhf_jax.types import RlhfError

if TYPE_CHECKING:
    import orbax.checkpoint


HASHES = "_sha256.json"
"""File in a checkpoint with the hashes of its other files, by path; older releases wrote none."""

WRITTEN_LATER = "_CHECKPOINT_METADATA"
"""File that Orbax still changes when all others are complete; it has times only."""


class TrainState(NamedTuple):
    """Training state, donated to each step and checkpointed. With several seeds, leaves have a leading seed axis."""

    step: jax.Array  # int32[]: number of completed steps
    params: dict[str, PyTree]  # by trained network: policy, value, reward
    opt_state: PyTree
    controller: PyTree = ()  # further state, such as an adaptive coefficient


class _Repeated(logging.Filter):
    """Suppress asyncio's log of repeated exceptions in Orbax's writers; the first exception is raised and reported."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not ("exception was never retrieved" in message and "orbax" in message)


_REPEATED = _Repeated()


class Checkpoints:
    """Checkpoints of one stage; the newest `keep` are retained, and the best one if a metric is given."""

    def __init__(self, directory: Path, keep: int, best: BestSoFar | None = None) -> None:
        """Open or create a directory, and remove the remains of interrupted saves."""
        import orbax.checkpoint as ocp

        self._directory, self._saving = directory, 0
        logging.getLogger("asyncio").addFilter(_REPEATED)
        settings = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_hashes),
        )
        if best is None:
            settings.max_to_keep = keep
        else:
            settings.preservation_policy = Preservation(keep, best)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=settings)

    def steps(self) -> frozenset[int]:
        """Return the steps that have a checkpoint."""
        return frozenset(self._manager.all_steps())

    def newest_whole(self, among: frozenset[int]) -> tuple[int, list[str]]:
        """Find the newest of some steps with an undamaged checkpoint, 0 for none, and remove the damaged ones after it.

        Returns: the step, and a damaged file of each removed checkpoint.
        """
        damaged: list[str] = []
        for step in sorted(among, reverse=True):
            file = damaged_file(self._directory / str(step))
            if file is None:
                return step, damaged
            damaged.append(f"{step}/{file}")
            self._manager.delete(step)
        return 0, damaged

    def remove_after(self, done: int) -> None:
        """Remove the checkpoints of later steps."""
        for step in self._manager.all_steps():
            if step > done:
                self._manager.delete(step)

    def keep_only(self, wanted: Callable[[int], bool]) -> None:
        """Remove the checkpoints of other steps, unless there is no other."""
        with _writing(self._directory):
            self._manager.wait_until_finished()
        steps = self._manager.all_steps()
        if any(map(wanted, steps)):
            for step in steps:
                if not wanted(step):
                    self._manager.delete(step)

    def save(self, state: TrainState) -> None:
        """Start saving a state under its step, and return before the files are written.

        One copy of the state exists until then. On accelerators Orbax makes it in host memory before it returns. On
        CPUs Orbax reads the memory of the arrays, which the next step overwrites, so that the state is copied first,
        once the copy of the last checkpoint is written.
        """
        import orbax.checkpoint as ocp

        with _writing(self._directory):
            self._manager.wait_until_finished()
            if jax.default_backend() == "cpu":
                state = jax.tree.map(jnp.copy, state)
            items = {name: ocp.args.StandardSave(tree) for name, tree in state.params.items()}
            rest = ocp.args.StandardSave(_rest(state))
            self._saving = int(np.ravel(processes.on_host(state.step))[0])
            self._manager.save(self._saving, args=ocp.args.Composite(rest=rest, **items))

    def _write_hashes(self) -> None:
        """Hash the files of a checkpoint before Orbax gives its directory the final name."""
        if not processes.is_first():
            return
        for partial in self._directory.glob(f"{self._saving}.*"):
            write_json(partial / HASHES, {name: _hash(partial / name) for name in _files(partial)})

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restore the state saved at a step, with the shapes, dtypes and shardings of `like` (see `abstract`)."""
        import orbax.checkpoint as ocp

        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.params.items()}
        target = ocp.args.StandardRestore(_rest(like))
        restored = self._manager.restore(step, args=ocp.args.Composite(rest=target, **items))
        params = {name: restored[name] for name in like.params}
        rest = restored["rest"]
        return TrainState(rest["step"], params, rest["opt_state"], rest.get("controller", like.controller))

    def close(self) -> None:
        """Wait for the last save and report its errors."""
        with _writing(self._directory):
            self._manager.wait_until_finished()
            self._manager.close()


def steps_of(directory: Path) -> list[int]:
    """List the steps that have a checkpoint, in ascending order."""
    with _reading(directory) as manager:
        return sorted(manager.all_steps())


def load_params(directory: Path, network: str, like: PyTree, *, step: int | None, where: Where | None = None) -> PyTree:
    """Load one network's parameters from a stage's checkpoints.

    Args: like gives the shapes (`jax.eval_shape` of the network's init, with a leading axis for several seeds); step is
    None for the best checkpoint of a stage with `loop.best`, and for the newest of others; where gives the sharding of
    each parameter (None: the first device).
    Raises RlhfError if there is no such checkpoint, or if it is damaged.
    """
    import orbax.checkpoint as ocp

    with _reading(directory) as manager:
        steps = manager.all_steps()
        if not steps or (step is not None and step not in steps):
            kept = ", ".join(map(str, sorted(steps))) or "none"
            raise RlhfError(f"{directory} has no checkpoint{'' if step is None else f' at step {step}'} (kept: {kept})")
        best = best_step(directory.parent)
        chosen = step if step is not None else best if best in steps else max(steps)
        if file := damaged_file(directory / str(chosen), network):
            raise RlhfError(
                f"the checkpoint {directory / str(chosen)} is damaged ({file}): remove complete.json in "
                f"{directory.parent}, and run its stage again"
            )
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = on_devices(like, where or (lambda path, shape: device))
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, places)
        return manager.restore(chosen, args=ocp.args.Composite(**{network: ocp.args.StandardRestore(target)}))[network]


def damaged_file(checkpoint: Path, item: str = "") -> str | None:
    """Return the first file of a checkpoint, or of one item, that is missing or has another hash; None if all agree.

    The first of several processes reads the files.
    """
    found = processes.from_first(lambda: np.array(_damaged_file(checkpoint, item)))
    return str(found) or None


def _damaged_file(checkpoint: Path, item: str) -> str:
    if not (checkpoint / HASHES).exists():
        return ""
    try:
        hashes = json.loads((checkpoint / HASHES).read_bytes())
        wanted = {name: value for name, value in hashes.items() if name.startswith(f"{item}/" if item else "")}
    except (ValueError, AttributeError, RecursionError):
        return HASHES
    there = _files(checkpoint)
    return next((name for name, value in wanted.items() if name not in there or _hash(checkpoint / name) != value), "")


def _files(checkpoint: Path) -> list[str]:
    """Paths of a checkpoint's files that have a hash."""
    files = (str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in (HASHES, WRITTEN_LATER))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator["orbax.checkpoint.CheckpointManager"]:
    """Open checkpoints for reading, without Orbax's warnings about read-only managers."""
    import orbax.checkpoint as ocp

    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(min(verbosity, absl.logging.ERROR))
    try:
        options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
            yield manager
    finally:
        absl.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the exception type depends on the file system
        reason = str(error).strip().split("\n")[0][:300]
        raise RlhfError(
            f"a checkpoint could not be written to {directory} ({reason}): check the disk space and run again; the "
            "last complete checkpoint is kept"
        ) from error


def _rest(state: TrainState) -> dict[str, PyTree]:
    """State to save beside the parameters. An empty controller is omitted, as in older checkpoints."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    return rest | ({"controller": state.controller} if jax.tree.leaves(state.controller) else {})


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of arrays, which need no memory."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
