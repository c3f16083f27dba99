"""The compiler of this process: its flags, and its cache of programs."""

import os

import jax
from jax._src import xla_bridge  # no public interface says whether the flags have been read

from rlhf_jax.runtime import compilation_cache
from rlhf_jax.runtime.programs import RuntimeConfig


def start(runtime: RuntimeConfig) -> str | None:
    """Set the compiler's flags, and keep the programs that it compiles.

    Returns a sentence if a setting has no effect, as XLA reads its flags once, before the first computation.
    """
    compilation_cache.enable()
    flags = os.environ.get("XLA_FLAGS", "").split()
    missing = [flag for flag in runtime.xla_flags.split() if flag not in flags]
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = " ".join([*flags, *missing])
        return None
    settings = []
    if runtime.compile_quickly and any("_cpu_" in flag or "_backend_" in flag for flag in missing):
        settings.append("compile_quickly")
    if runtime.deterministic and jax.default_backend() == "gpu" and any("_gpu_" in flag for flag in missing):
        settings.append("deterministic")
    if not settings:
        return None
    return (
        f"{' and '.join(f'config.runtime.{name} = True' for name in settings)} cannot take effect: this process has "
        "computed with JAX before, when the compiler reads its settings. Run the experiment first, or in a new process."
    )
