"""Several processes that run one experiment on the devices of all of them, connected by `jax.distributed`.

All processes run the same program on the same data and share a file system. Programs on a mesh of all devices divide
the work. The first process alone writes files, prints, and calls code with effects elsewhere, such as Python rewards
and HTTP judges; the others receive the results. With a single process, every function here is trivial.
"""

import io
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from rlhf_jax.types import RlhfError

_calls = itertools.count()
"""Number of the next exchange: all processes make the same exchanges in the same order."""

_MOST_WAIT = 30 * 24 * 3600 * 1000
"""Milliseconds to wait for another process. If one dies, JAX ends the others within two minutes."""

_GRACE = 10 * 1000
"""Milliseconds in which all processes may fail with the same error, before the first to fail leaves."""


def connect(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Connect this process to the others of the experiment, before the first computation.

    Args: coordinator is the address HOST:PORT of process 0, count the number of processes, and index that of this one;
    None: found from the environment of SLURM, Open MPI, Kubernetes or a Cloud TPU.
    Raises RlhfError if they are not found, or the processes cannot be reached.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM; see `runtime.termination`
    try:
        jax.distributed.initialize(coordinator, count, index, shutdown_timeout_seconds=60)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise RlhfError(
            f"the processes of the experiment could not be connected ({reason}): start the same command in each "
            "process, by srun, mpirun or a Kubernetes job, or give --coordinator=HOST:PORT, --processes and --process"
        ) from error


def count() -> int:
    """Number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Return whether this process writes files and prints."""
    return count() == 1 or jax.process_index() == 0


def wait() -> None:
    """Wait until all processes have called this function."""
    if count() > 1:
        _client().wait_at_barrier(f"rlhf_jax/{next(_calls)}", _MOST_WAIT)


def from_first(compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Compute an array in the first process alone, and return it in all of them.

    Raises RlhfError in all processes if `compute` does.
    """
    if count() == 1:
        return compute()
    key = f"rlhf_jax/{next(_calls)}"
    if is_first():
        try:
            found = compute()
        except RlhfError as error:
            _client().key_value_set_bytes(key, b"E" + str(error).encode())
            raise
        content = io.BytesIO()
        np.save(content, found, allow_pickle=False)
        _client().key_value_set_bytes(key, b"A" + content.getvalue())
    else:
        sent = _client().blocking_key_value_get_bytes(key, _MOST_WAIT)
        if sent[:1] == b"E":
            raise RlhfError(sent[1:].decode())
        found = np.load(io.BytesIO(sent[1:]), allow_pickle=False)
    wait()
    if is_first():
        _client().key_value_delete(key)
    return found


def on_first(act: Callable[[], None]) -> None:
    """Act in the first process alone, while the others wait. Raises RlhfError in all processes if `act` does."""

    def nothing() -> np.ndarray:
        act()
        return np.zeros(0)

    from_first(nothing)


def any_of(here: bool) -> bool:
    """Return whether a condition holds in any process."""
    if count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array([here]))))


def on_host(tree: PyTree) -> PyTree:
    """Copy arrays to the memory of every host, with the parts that devices of other processes hold."""
    if count() > 1:
        from jax.experimental import multihost_utils

        tree = jax.tree.map(
            lambda leaf: multihost_utils.process_allgather(leaf, tiled=True) if _is_split(leaf) else leaf, tree
        )
    return jax.device_get(tree)


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated


def place(leaf: jax.Array | np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Place an array, equal in all processes, on devices; each process copies the parts of its own devices only."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def disconnect() -> None:
    """End the connection once all processes have come to this call: the first one serves the others until then."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def leave(status: int) -> None:
    """End this process after an error, even if others wait for it; they then end too."""
    if count() == 1:
        return
    try:
        _client().wait_at_barrier("rlhf_jax/failed", _GRACE)  # all processes have failed: they may end in peace
    except Exception:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _client() -> Any:
    from jax._src import distributed  # JAX's coordination service has no public interface

    return distributed.global_state.client
