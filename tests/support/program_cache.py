"""Compiled programs, which one worker keeps for the next run's workers."""

import contextlib
import fcntl
import itertools
import os
from pathlib import Path

import pytest


def own_cache(config: pytest.Config) -> Path:
    """Directory for the compiled programs of this process, with those that all earlier processes compiled.

    JAX does not write entries atomically, so that no two processes may share a directory. This one is the first of
    this worker's that no other process holds. When the process ends, its programs are linked into a common directory.
    """
    own, common = _unused(config), config.cache.mkdir("jax-programs")
    link_all(common, own)
    config.add_cleanup(lambda: link_all(own, common))
    return own


def _unused(config: pytest.Config) -> Path:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    for number in itertools.count():
        directory = config.cache.mkdir(f"jax-{worker}-{number}")
        lock = (directory / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            config.add_cleanup(lock.close)
            return directory
    raise AssertionError("unreachable")


def link_all(source: Path, target: Path) -> None:
    """Link the programs of a directory into another one, which keeps those that it has."""
    for name in {file.name for file in source.glob("*-cache")} - {file.name for file in target.glob("*-cache")}:
        with contextlib.suppress(FileExistsError):  # another process was quicker
            os.link(source / name, target / name)
