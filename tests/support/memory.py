"""Memory of the process that runs the tests: JAX keeps every compiled program, about 2 MB each."""

import ctypes
import gc
import os
import sys
from pathlib import Path

import jax

LIMIT = 2000 * 2**20
"""Resident bytes above which programs are dropped: with what one test adds, a worker stays below 2.5 GiB."""


def resident() -> int:
    """Resident bytes of this process, or 0 on a system without /proc."""
    return _pages(1)


def reserved() -> int:
    """Bytes of the address space of this process, or 0 on a system without /proc."""
    return _pages(0)


def _pages(field: int) -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[field]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def drop_programs() -> None:
    """Drop all compiled programs and return their memory to the system. Later calls read the compilation cache."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # without it glibc keeps most of what is freed
