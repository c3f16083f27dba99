"""Set-up of a process that computes: memory that stays with it, and the compilation cache."""

import ctypes
import functools
import os
import platform

import jax

from rlhf_jax.runtime import compilation_cache

VARIABLE = "RLHF_JAX_KEEP_MEMORY"
"""Environment variable that leaves the C library's allocator as it is if it is "off"."""

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a compiled program."""

LARGE = 1.0
"""Seconds that a large program takes to compile, at least."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_NEVER = 2**31 - 1


def set_up() -> None:
    """Keep memory, and compiled programs on disk. Call this before JAX starts its threads; later calls do nothing."""
    keep_memory()
    compilation_cache.enable()


def keep_memory() -> bool:
    """Have glibc's allocator keep freed memory for the next arrays; return whether it does.

    On CPUs, XLA allocates the intermediate arrays of a program for every call. glibc returns arrays above 32 MiB to the
    kernel, which clears their pages when they are next used. With this setting the process keeps them. Nothing is
    changed if the user has set the allocator's own variables.
    """
    own = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if os.environ.get(VARIABLE) == "off" or own or platform.libc_ver()[0] != "glibc":
        return False
    return _configure()


@functools.cache
def _configure() -> bool:
    library = ctypes.CDLL(None)
    # Only the main arena can grow beyond 64 MiB, and only without mmap does it hold large arrays.
    options = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    accepted = [library.mallopt(option, value) == 1 for option, value in options]

    def return_memory(event: str, duration_secs: float, **_: str | int) -> None:
        """Return the memory of a large program's compilation: it leaves pieces that no large array fits into."""
        if event == COMPILED and duration_secs > LARGE:
            library.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(return_memory)
    return all(accepted)
