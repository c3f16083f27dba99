"""XLA flags for tests: programs run once, so they are compiled quickly."""

from importlib.metadata import version

XLA_FLAGS = "--xla_backend_optimization_level=0"
if version("jax") < "0.11":  # later ones do not know this flag
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
