"""Processes whose clock is set back by libfaketime, a library that is loaded before the C library."""

import glob
import multiprocessing
import os

SPAWNED = multiprocessing.get_context("spawn")
"""Starts processes anew, with the environment's libraries, where a server would fork them from a running one."""


def library() -> str | None:
    """Path of libfaketime, or None if it is not installed (package `faketime` or `libfaketime`)."""
    found = glob.glob("/usr/lib/*/faketime/libfaketime.so.1") + glob.glob("/usr/lib*/faketime/libfaketime.so.1")
    return found[0] if found else None


def set_back(seconds: int) -> dict[str, str]:
    """Environment of processes whose clock is behind, except for the monotonic clock, which no one sets."""
    found = library()
    assert found is not None, "install libfaketime"
    return {"LD_PRELOAD": found, "FAKETIME": f"-{seconds}", "DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": os.getcwd()}
