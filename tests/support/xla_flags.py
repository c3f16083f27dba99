"""XLA flags for tests: programs run once, so they are compiled quickly."""

from importlib.metadata import version

# One module of machine code a program: every further one costs LLVM a start of its own, and more memory.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# Devices that wait for one another are threads here, which a busy machine may keep from running for long.
XLA_FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
if version("jax") < "0.11":  # later ones do not know this flag
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
