"""Persistent compilation cache: a program that one process compiled is read from disk by later ones."""

import functools
import hashlib
import os
import sys
import warnings
from pathlib import Path

import filelock
import jax

from rlhf_jax.runtime.provenance import processor

VARIABLE = "RLHF_JAX_CACHE"
"""Environment variable with the directory of the cache, or "off"."""

MAX_BYTES = 2 << 30
"""Size at which the programs that were not used for longest are removed."""

MIN_SECONDS = 0.1
"""Programs that compile faster are not stored: reading them would take as long."""


def enable() -> None:
    """Keep compiled programs on disk, if `$RLHF_JAX_CACHE` is not "off" and the process has no other cache.

    Several processes may use the cache at once. If its directory cannot be used, a message says so and programs are
    compiled as without a cache. XLA compiles the same program to the same code, so results do not depend on the cache.
    """
    directory, own = cache_dir(), jax.config.values["jax_compilation_cache_dir"]
    if directory is None or own is not None or not _prepare(directory):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)  # with a limit, JAX also locks the directory
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    # JAX compiles a program again if its entry is damaged or cannot be written.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def cache_dir() -> Path | None:
    """Directory of this processor's programs; None if the cache is off.

    JAX's keys contain the versions of JAX and XLA, the flags and the features of the processor, but not its model, for
    which XLA also optimises. Machines that share a home directory may have different processors.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    base = Path(chosen).expanduser() if chosen else user / "rlhf_jax" / "programs"
    return base.absolute() / hashlib.sha256(processor().encode()).hexdigest()[:12]


@functools.cache
def _prepare(directory: Path) -> bool:
    """Create the directory, and remove what a killed process left; return whether the cache can be used."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever can write here can run code as this user
        with filelock.FileLock(directory / ".lockfile", timeout=10):  # JAX's lock
            _remove_incomplete(directory)
    except (OSError, filelock.Timeout) as error:
        reason = getattr(error, "strerror", None) or error
        print(
            f"Compiled programs are not kept for later runs, because {directory} cannot be used ({reason}): set "
            f"{VARIABLE} to another directory, or to off",
            file=sys.stderr,
        )
        return False
    return True


def _remove_incomplete(directory: Path) -> None:
    """Remove entries without their second file, the time of their last use, which JAX writes after the program."""
    names = {
        ending: {file.name.removesuffix(ending) for file in directory.glob(f"*{ending}")}
        for ending in ("-cache", "-atime")
    }
    for name in names["-cache"] ^ names["-atime"]:
        for ending in names:
            (directory / f"{name}{ending}").unlink(missing_ok=True)
