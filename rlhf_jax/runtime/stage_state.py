"""State of a stage that is not complete, in a file that other processes read: what it does, how far it is, and errors.

The process that works on a stage holds a lock, which the operating system releases when the process ends, however it
ends. A stage with a state and without a lock has been interrupted.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

from rlhf_jax import processes
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.runtime.termination import Terminated
from rlhf_jax.types import Json, RlhfError

STATE, LOCK = "state.json", ".running"
INTERRUPTED = "KeyboardInterrupt"
"""Error of a stage that Ctrl-C or SIGTERM ended."""

INTERVAL = 2.0
"""Seconds between writes of a stage's progress."""


class StageState:
    """State of the stage that this process works on. If another process works on it, that one keeps the lock."""

    def __init__(self, directory: Path) -> None:
        """Take the lock, and write the state of a stage that has just started."""
        self._path, self._lock = directory / STATE, filelock.FileLock(directory / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except (OSError, NotImplementedError):  # another process has it, or the file system has no locks
            self._owner = False
        else:
            self._owner = True
        self._state: dict[str, Json] = {"started": time.time(), "doing": None, "error": None}
        self._write()

    def update(self, **values: Json) -> None:
        """Replace some values, and write the state: at once if the activity changed, otherwise every `INTERVAL`."""
        before = self._state["doing"]
        self._state |= values
        if self._state["doing"] != before or time.monotonic() - self._written >= INTERVAL:
            self._write()

    def fail(self, message: str) -> None:
        """Record the error that ends the stage, and release the lock."""
        self._state["error"] = message
        with contextlib.suppress(OSError):  # on a full disk, the error itself is what the user must see
            self._write()
        self._lock.release()

    def complete(self) -> None:
        """Remove the state and the lock."""
        self._path.unlink(missing_ok=True)
        self._lock.release()
        if self._owner:
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def _write(self) -> None:
        self._written = time.monotonic()
        write_json(self._path, {**self._state, "written": time.time()})


@contextlib.contextmanager
def recorded(directory: Path) -> Iterator[StageState | None]:
    """Keep the state of a stage for other commands while it runs, and its error if it fails.

    The first of several processes keeps it.
    """
    if not processes.is_first():
        yield None
        return
    state = StageState(directory)
    try:
        yield state
    except (KeyboardInterrupt, Terminated):
        state.fail(INTERRUPTED)
        raise
    except BaseException as error:
        state.fail(str(error) if isinstance(error, RlhfError) else f"{type(error).__name__} {error}".strip())
        raise
    state.complete()


def read_state(directory: Path) -> Mapping[str, Json] | None:
    """Read the state of a stage that is not complete; None if it has not started, or an older release worked on it."""
    path = directory / STATE
    return read_json(path) if path.exists() else None


def is_running(directory: Path) -> bool:
    """Return whether a process holds the lock of a stage; False where the file system has no locks."""
    if not (directory / LOCK).exists():
        return False
    try:
        with filelock.FileLock(directory / LOCK).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):  # the file system has no locks
        return False
