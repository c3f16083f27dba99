"""Lock of a work directory, so that two runs never write into it at once.

The operating system releases the lock when the process ends, however it ends; the empty file stays. On a file system
without locks, a file with the process's number stands for it, which is ignored once no such process exists on this
machine.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.types import RlhfError

LOCK, HOLDER = ".running", ".running.json"


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of a work directory. Raises RlhfError, naming the process, if another one holds it."""
    root.mkdir(parents=True, exist_ok=True)
    lock = _acquired(root)
    try:
        write_json(root / HOLDER, {"process": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        (root / HOLDER).unlink(missing_ok=True)
        # The file of the lock stays: a process that opened it a moment ago would lock a file that others do not see.
        lock.release()


def _acquired(root: Path) -> filelock.BaseFileLock:
    try:
        try:
            return _acquire(filelock.FileLock(root / LOCK))
        except filelock.Timeout:
            raise
        except (OSError, NotImplementedError):  # the file system has no locks
            return _acquire(filelock.SoftFileLock(root / LOCK))
    except filelock.Timeout as error:
        raise RlhfError(
            f"{_holder(root)} runs an experiment in {root}: wait until it ends (rlhf-jax status {root}), stop it, or "
            "give another --workdir"
        ) from error


def _acquire(lock: filelock.BaseFileLock) -> filelock.BaseFileLock:
    lock.acquire(timeout=0)
    return lock


def _holder(root: Path) -> str:
    if not (root / HOLDER).exists():  # it has just taken the lock
        return "another process"
    found = read_json(root / HOLDER)
    return f"process {found['process']} on {found['host']}"
