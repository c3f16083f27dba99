"""Compilation of programs for a machine, and what they need: memory, FLOPs, traffic, and the least time of a call."""

import dataclasses
import re
import time
from typing import Literal, NamedTuple

import jax

from rlhf_jax.models.model_config import DType
from rlhf_jax.planning.machines import Machine
from rlhf_jax.planning.stage_outlines import ProgramOutline
from rlhf_jax.runtime import program_costs
from rlhf_jax.runtime.program_costs import Costs

Bound = Literal["FLOP", "memory", "interconnect"]

REPLICATED = 1.1
"""Share of the work done twice, above which a program is said to replicate work."""

_USED = re.compile(r"Used (?P<used>[\d.]+)(?P<unit>[KMGT]?) of [\d.]+[KMGT]? hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of one device that a program needs."""

    arguments: int
    temporaries: int
    peak: int  # arguments, results and temporaries at the worst moment


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Measurements of one program on one device, for one call."""

    name: str
    seconds: float  # of tracing and compiling
    products: float  # FLOPs of the matrix products that the whole batch needs, divided by the devices
    memory: Memory | None  # None: the program does not fit, and was not compiled
    needed: int | None  # bytes, as far as the compiler tells
    costs: Costs | None

    @property
    def replication(self) -> float | None:
        """FLOPs of all devices, as a multiple of those that the batch needs."""
        if self.costs is None or not self.products:
            return None
        return self.costs.flops / self.products

    def times(self, machine: Machine, dtype: DType) -> dict[Bound, float]:
        """Least seconds of a call, by what limits it. A program that does not fit has only those of its products."""
        if self.costs is None:
            return {"FLOP": self.products / machine.peak(dtype)}
        return {
            "FLOP": self.costs.flops / machine.peak(dtype),
            "memory": self.costs.memory / machine.chip.memory_rate,
            "interconnect": self.costs.received / machine.chip.link_rate,
        }


def compile_program(outline: ProgramOutline, machine: Machine, devices: int) -> Compiled:
    """Compile a program and measure it; a program that does not fit into the memory is an answer too.

    Args: devices is the number that the program runs on.
    """
    start = time.perf_counter()
    traced = outline.function.trace(*outline.args)
    products = program_costs.of_jaxpr(traced.jaxpr.jaxpr, unknown_loops=outline.loops) / devices
    options = {"xla_backend_optimization_level": "0"} if machine.chip.platform == "cpu" else None
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        return Compiled(outline.name, time.perf_counter() - start, products, None, used_bytes(str(error)), None)
    seconds = time.perf_counter() - start
    found = compiled.memory_analysis()
    assert found is not None
    live = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    peak = max(found.peak_memory_in_bytes, live) or live + found.temp_size_in_bytes
    memory = Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, peak)
    costs = program_costs.of_compiled(compiled, unknown_loops=outline.loops)
    return Compiled(outline.name, seconds, products, memory, peak, costs)


def used_bytes(message: str) -> int | None:
    """Read the bytes that a program would use from the compiler's message; None if it does not say."""
    found = _USED.search(message)
    return int(float(found["used"]) * _UNITS[found["unit"]]) if found else None
