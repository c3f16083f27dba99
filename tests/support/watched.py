"""Watches what code does to the machine while it reads an untrusted input, by Python's audit events."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from tests.support import memory

FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.conn",
)
"""Starts of the names of events that no reader may cause."""
PATHS = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.symlink": 2, "os.link": 2}
"""Events that change the file system, and the number of their paths."""
MOST_MEMORY = 4 * 2**30
"""Bytes of address space that a test's inputs may take, beyond what the process has before them."""

_directory: Path | None = None
_seen: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _directory is None:
        return
    if event.startswith(FORBIDDEN):
        _seen.append(f"{event} {args!r}"[:300])
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    for path in args[: 1 if writes else PATHS.get(event, 0)]:
        if not isinstance(path, (str, bytes, os.PathLike)) or not _is_allowed(Path(os.fsdecode(path)).absolute()):
            _seen.append(f"{event} {path!r}"[:300])


def _is_allowed(path: Path) -> bool:
    """Return whether a path is in the watched directory, or is one that Python or JAX write for themselves."""
    own = "__pycache__" in path.parts or path.is_relative_to(str(jax.config.values["jax_compilation_cache_dir"]))
    return own or path == Path(os.devnull) or (_directory is not None and path.is_relative_to(_directory))


sys.addaudithook(_audit)


@contextlib.contextmanager
def confined(directory: Path) -> Iterator[None]:
    """Fail if code writes a file outside of a directory, starts a program, loads a pickle, or connects to a host."""
    global _directory
    _seen.clear()
    _directory = directory
    try:
        yield
    finally:
        _directory = None
    assert not _seen, _seen


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Refuse requests for more address space than `MOST_MEMORY`."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory.reserved() + MOST_MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
