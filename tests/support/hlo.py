"""Costs of programs: FLOPs of matrix products, and bytes of collectives, from compiled HLO and from jaxprs.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs.
"""

import collections
import functools
import math
import re
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BITS = {"pred": 8, "bf16": 16}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)")
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Costs(NamedTuple):
    """Costs of one call of a program on one device."""

    flops: float  # of matrix products
    bytes: collections.Counter[str]  # results of collectives, by kind

    def plus(self, other: "Costs", times: int = 1) -> "Costs":
        """Add the costs of something that runs several times."""
        moved = collections.Counter({kind: times * count for kind, count in other.bytes.items()})
        return Costs(self.flops + times * other.flops, self.bytes + moved)


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    def attribute(self, name: str) -> list[str]:
        """Computations or numbers that an attribute names."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|(%?[\w.-]+))", self.rest)
        return re.findall(r"[\w.-]+", found[1] or found[2] or "") if found else []


def of_compiled(compiled: jax.stages.Compiled, *, unknown_loops: int = 1) -> Costs:
    """Count the costs of a program in its optimised HLO.

    Args: unknown_loops is the number of iterations of the loops whose number the compiler does not know.
    """
    text = compiled.as_text()
    assert text
    computations, entry = _parse(text)

    @functools.cache
    def cost(name: str) -> Costs:
        found = Costs(0, collections.Counter())
        shapes = {each.name: each.shape for each in computations[name]}
        for each in computations[name]:
            kind = each.op.removesuffix("-start")
            if each.op == "dot":
                found = found.plus(Costs(_dot_flops(each, shapes), collections.Counter()))
            elif kind in COLLECTIVES:
                found = found.plus(Costs(0, collections.Counter({kind: _bytes(each.shape)})))
            elif each.op == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', each.rest)
                found = found.plus(cost(each.attribute("body")[0]), int(known[1]) if known else unknown_loops)
            elif each.op == "conditional":
                branches = [cost(branch) for branch in each.attribute("branch_computations")]
                found = found.plus(max(branches, key=lambda branch: branch.flops))
            else:
                for called in _called(each):
                    found = found.plus(cost(called))
        return found

    return cost(entry)


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


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _jaxpr_of(value: Any) -> Jaxpr | None:
    value = getattr(value, "jaxpr", value)
    return value if isinstance(value, Jaxpr) else None


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations, entry, current = {}, "", ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header["name"]
            computations[current] = []
            entry = current if header["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            computations[current].append(_Instruction(**found.groupdict()))
    return computations, entry


def _called(each: _Instruction) -> list[str]:
    """Computations that an instruction runs once; those of reductions and the like have no matrix products."""
    if each.op in ("fusion", "call", "custom-call") or each.op.endswith("-start"):
        return [name for key in ("calls", "to_apply", "called_computations") for name in each.attribute(key)]
    return []


def _dims(shape: str) -> list[int]:
    found = _ARRAY.match(shape)
    assert found, shape
    return [int(size) for size in found[2].split(",") if size]


def _dot_flops(each: _Instruction, shapes: dict[str, str]) -> int:
    left = _dims(shapes[each.operands[0]])
    depth = math.prod(left[int(axis)] for axis in each.attribute("lhs_contracting_dims"))
    return 2 * depth * math.prod(_dims(each.shape))


def _bytes(shape: str) -> int:
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
        total += bits // 8 * math.prod(int(size) for size in dims.split(",") if size)
    return total
