"""Asynchronous Orbax checkpoints of training states, one directory per step with one item per network.

Orbax takes half a second to import, so it is imported when a directory of checkpoints is opened.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rlhf_jax.models.sharding import Where, on_devices
from rlhf_jax.runtime.best import BestSoFar, Preservation, best_step
from rlhf_jax.types import RlhfError

if TYPE_CHECKING:
    import orbax.checkpoint


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

        self._directory = directory
        logging.getLogger("asyncio").addFilter(_REPEATED)
        settings = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
        if best is None:
            settings.max_to_keep = keep
        else:
            settings.preservation_policy = Preservation(keep, best)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=settings)

    def latest_step(self) -> int | None:
        """Newest step with a complete checkpoint, or None."""
        return self._manager.latest_step()

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
            self._manager.save(int(np.ravel(state.step)[0]), args=ocp.args.Composite(rest=rest, **items))

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
    Raises RlhfError if there is no such checkpoint.
    """
    import orbax.checkpoint as ocp

    with _reading(directory) as manager:
        steps = manager.all_steps()
        if not steps or (step is not None and step not in steps):
            kept = ", ".join(map(str, sorted(steps))) or "none"
            raise RlhfError(f"{directory} has no checkpoint{'' if step is None else f' at step {step}'} (kept: {kept})")
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = on_devices(like, where or (lambda path, shape: device))
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, places)
        best = best_step(directory.parent)
        chosen = step if step is not None else best if best in steps else max(steps)
        return manager.restore(chosen, args=ocp.args.Composite(**{network: ocp.args.StandardRestore(target)}))[network]


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
