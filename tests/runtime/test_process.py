"""Memory kept by the process: calls of a program after the first one find the pages of their arrays in place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.runtime import process

PROGRAM = """
import resource
from rlhf_jax.runtime import process

kept = process.keep_memory()
import jax
import jax.numpy as jnp

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

program = jax.jit(lambda x: (jnp.sin(x) @ x).sum())  # 64 MiB of intermediate values
x = jnp.ones((4096, 4096))
for _ in range(3):
    before = faults()
    program(x).block_until_ready()
print(kept, faults() - before)
"""


def page_faults(**variables: str) -> tuple[str, int]:
    """Measure whether memory is kept, and the page faults of a program's third call in a new process."""
    own = {name: value for name, value in os.environ.items() if name not in (process.VARIABLE, "GLIBC_TUNABLES")}
    own = {name: value for name, value in own.items() if not name.startswith("MALLOC_")}
    environment = own | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu", **variables}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    kept, faults = ran.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_memory_of_arrays_is_not_returned_between_calls():
    kept, faults = page_faults()
    left, usual = page_faults(**{process.VARIABLE: "off"})
    assert (kept, left) == ("True", "False")
    assert 4 * faults < usual


def test_allocator_that_the_user_configured_is_left_alone(monkeypatch):
    monkeypatch.delenv(process.VARIABLE, raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not process.keep_memory()
