"""Costs of programs: FLOPs of matrix products, memory traffic, and collectives, from compiled HLO and from jaxprs.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs.
"""

import collections
import functools
import json
import math
import re
from typing import NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal, Var

from rlhf_jax.runtime import hlo

Atom = Var | Literal

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency", "domain", "iota"),
)
"""Operations that move no data, but for `iota`, whose result is fused or small."""


class Costs(NamedTuple):
    """Costs of one call of a program on one device."""

    flops: float  # of matrix products
    bytes: collections.Counter[str]  # results of collectives, by kind
    calls: collections.Counter[str]  # of collectives, by kind
    received: float  # bytes that the device receives from others
    memory: float  # bytes read from main memory, or written to it

    def plus(self, other: "Costs", times: int = 1) -> "Costs":
        """Add the costs of something that runs several times."""
        return Costs(
            self.flops + times * other.flops,
            self.bytes + _scaled(other.bytes, times),
            self.calls + _scaled(other.calls, times),
            self.received + times * other.received,
            self.memory + times * other.memory,
        )


NOTHING = Costs(0, collections.Counter(), collections.Counter(), 0, 0)
"""Costs of a program that does nothing."""


def of_compiled(compiled: jax.stages.Compiled, *, unknown_loops: int = 1) -> Costs:
    """Count the costs of a program in its optimised HLO.

    Args: unknown_loops is the number of iterations of the loops whose number the compiler does not know.
    """
    return of_text(compiled.as_text() or "", unknown_loops=unknown_loops)


def of_text(text: str, *, unknown_loops: int = 1) -> Costs:
    """Count the costs of a program; see `of_compiled`."""
    program = hlo.parse(text)

    @functools.cache
    def cost(name: str, fused: bool) -> Costs:
        found, computation = NOTHING, program.computations[name]
        for each in computation:
            kind = each.op.removesuffix("-start")
            if each.op in ("dot", "convolution"):
                found = found.plus(NOTHING._replace(flops=hlo.product_flops(each, computation)))
            elif kind in COLLECTIVES:
                found = found.plus(_collective(kind, each, computation, program.devices))
            elif each.op == "while":
                times = hlo.trip_count(each, program)
                body = cost(each.attribute("body")[0], False)
                found = found.plus(body, unknown_loops if times is None else times)
            elif each.op == "conditional":
                names = each.attribute("branch_computations") or [
                    *each.attribute("true_computation"),
                    *each.attribute("false_computation"),
                ]
                found = found.plus(max((cost(branch, False) for branch in names), key=lambda branch: branch.flops))
            else:
                for inner in hlo.called(each):
                    found = found.plus(cost(inner, each.op != "call" and not each.op.endswith("-start")))
                found = found.plus(NOTHING._replace(flops=_library_flops(each, computation)))
            if not fused:
                found = found.plus(NOTHING._replace(memory=_traffic(each, computation, program)))
        return found

    return cost(program.entry, False)


def _collective(kind: str, each: hlo.Instruction, computation: hlo.Computation, devices: int) -> Costs:
    size, parts = hlo.size_of_shape(each.shape), hlo.group_size(each, devices)
    if each.op.endswith("-start") and each.shape.startswith("(") and kind != "all-reduce":
        results = [array.bytes for array in hlo.arrays_of(each.shape) if array.sizes]  # with the operands
        size = sum(results) - sum(hlo.size_of_shape(computation.shape(name)) for name in each.operands)
    ring = (parts - 1) / parts
    received = {"all-reduce": 2 * ring * size, "reduce-scatter": (parts - 1) * size, "collective-permute": size}
    return NOTHING._replace(
        bytes=collections.Counter({kind: int(size)}),
        calls=collections.Counter({kind: 1}),
        received=received.get(kind, ring * size),
    )


def _traffic(each: hlo.Instruction, computation: hlo.Computation, program: hlo.HloProgram) -> float:
    """Bytes that one instruction outside a fusion moves between main memory and the chip."""
    if each.op in (*FREE, "while", "conditional", "call", "async-start") or each.op.endswith("-done"):
        return 0
    if each.op == "fusion":
        return hlo.fused_traffic(each, computation, program.computations[each.attribute("calls")[0]])
    sizes = [hlo.memory_of_shape(computation.shape(name)) for name in each.operands]
    result = hlo.memory_of_shape(each.shape)
    if each.op in ("dynamic-slice", "slice", "gather"):
        return min(sizes[0], hlo.size_of_shape(each.shape)) + result
    if each.op in ("dynamic-update-slice", "scatter"):
        return 2 * sizes[1 if each.op == "dynamic-update-slice" else 2]
    if each.op == "copy-start":  # (destination, source, context)
        destination = hlo.arrays_of(each.shape)[0]
        return sizes[0] + (destination.bytes if destination.in_memory else 0)
    if each.op.endswith("-start") and each.shape.startswith("("):
        return result  # operands and results
    return sum(sizes) + result


def _library_flops(each: hlo.Instruction, computation: hlo.Computation) -> float:
    """FLOPs of a matrix product that a library of the GPU computes."""
    if each.op != "custom-call" or "cublas" not in each.rest:
        return 0
    config = re.search(r"backend_config=(\{.*\})", each.rest)
    settings = json.loads(config[1].partition(", metadata=")[0]) if config else {}
    dims = settings.get("gemm_backend_config", {}).get("dot_dimension_numbers")
    if dims is None:
        return 0
    left = hlo.arrays_of(computation.shape(each.operands[0]))[0].sizes
    depth = math.prod(left[int(axis)] for axis in dims["lhs_contracting_dimensions"])
    return 2 * depth * math.prod(hlo.arrays_of(each.shape)[0].sizes)


def of_jaxpr(jaxpr: Jaxpr, *, unknown_loops: int = 1) -> float:
    """Count the FLOPs of all matrix products in a jaxpr, which stand for the whole batch.

    Args: unknown_loops as for `of_compiled`.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(_shape(equation.invars[0])[axis] for axis in contracted)
            total += 2 * depth * math.prod(_shape(equation.outvars[0]))
        elif name == "while":
            total += unknown_loops * of_jaxpr(params["body_jaxpr"].jaxpr, unknown_loops=unknown_loops)
        elif name == "cond":
            total += max(of_jaxpr(branch.jaxpr, unknown_loops=unknown_loops) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            inner = [found for value in params.values() if (found := _jaxpr_of(value)) is not None]
            total += times * sum(of_jaxpr(found, unknown_loops=unknown_loops) for found in inner)
    return total


def _shape(variable: Atom) -> tuple[int, ...]:
    return tuple(getattr(variable.aval, "shape", ()))


def _jaxpr_of(value: object) -> Jaxpr | None:
    value = getattr(value, "jaxpr", value)
    return value if isinstance(value, Jaxpr) else None


def _scaled(counts: collections.Counter[str], times: int) -> collections.Counter[str]:
    return collections.Counter({kind: times * count for kind, count in counts.items()})
