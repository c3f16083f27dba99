"""Parser of compiled HLO text: computations, their instructions, and the sizes of arrays."""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
"""Bits of an element, for the types whose names do not tell them."""

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)")
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_ON_CHIP = re.compile(r"S\(\d+\)")


class ArrayShape(NamedTuple):
    """An array of a shape: bits of an element, sizes, and whether it lies in the device's main memory."""

    bits: float
    sizes: tuple[int, ...]
    in_memory: bool

    @property
    def bytes(self) -> float:
        """Size of the array."""
        return self.bits / 8 * math.prod(self.sizes)


@functools.lru_cache(maxsize=100_000)
def arrays_of(shape: str) -> tuple[ArrayShape, ...]:
    """Arrays of a shape, which may be a tuple."""
    return tuple(
        ArrayShape(_bits(dtype), tuple(int(size) for size in sizes.split(",") if size), not _ON_CHIP.search(layout))
        for dtype, sizes, layout in _ARRAY.findall(shape)
    )


def size_of_shape(shape: str) -> float:
    """Bytes of all arrays of a shape."""
    return sum(array.bytes for array in arrays_of(shape))


def memory_of_shape(shape: str) -> float:
    """Bytes of the arrays of a shape that lie in main memory, not in a faster memory on the chip."""
    return sum(array.bytes for array in arrays_of(shape) if array.in_memory)


def _bits(dtype: str) -> float:
    known = BITS.get(dtype)
    if known is not None:
        return known
    found = re.match(r"[a-z]+(\d+)", dtype)  # f32, s4, f8e4m3fn
    return int(found[1]) if found else 0


class Instruction(NamedTuple):
    """One instruction."""

    name: str
    shape: str
    op: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    def attribute(self, name: str) -> list[str]:
        """Computations or numbers that an attribute names."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|(%?[\w.-]+))", self.rest)
        return re.findall(r"[\w.-]+", found[1] or found[2] or "") if found else []

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the result, a single array."""
        return arrays_of(self.shape)[0].sizes


@dataclasses.dataclass
class Computation:
    """Instructions of a computation, by name and in order, and the name of its result."""

    instructions: dict[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        """Instructions in order."""
        return iter(self.instructions.values())

    def shape(self, name: str) -> str:
        """Shape of an instruction's result."""
        return self.instructions[name].shape


class HloProgram(NamedTuple):
    """Computations of a program by name, and the number of devices that it runs on."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> HloProgram:
    """Parse the text of a compiled program."""
    found: dict[str, Computation] = {}
    entry, instructions, name = "", {}, ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, instructions = header["name"], {}
            found[name] = Computation(instructions, "")
            entry = name if header["entry"] else entry
        elif match := _INSTRUCTION.match(line):
            instruction = Instruction(**match.groupdict())
            instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                found[name].root = instruction.name
    devices = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    replicas = re.search(r"replica_count=(\d+)", text.partition("\n")[0])
    return HloProgram(found, entry, int(devices[1] if devices else 1) * int(replicas[1] if replicas else 1))


def group_size(each: Instruction, devices: int) -> int:
    """Number of devices that a collective combines."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", each.rest)
    if listed:
        return listed[1].count(",") + 1
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=", each.rest)
    return int(tiled[1].split(",")[-1]) if tiled else devices


def trip_count(each: Instruction, program: HloProgram) -> int | None:
    """Return the number of iterations of a loop; None if its text does not tell.

    The compiler notes it for most loops. Otherwise the condition compares a counter with a constant.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', each.rest)
    if known:
        return int(known[1])
    condition = program.computations[each.attribute("condition")[0]]
    root = condition.instructions[condition.root]
    inside = [condition, *(program.computations[name] for name in root.attribute("calls"))]
    compares = inside[-1].instructions[inside[-1].root]
    constants = [part for computation in inside for part in computation if part.op == "constant" and not part.sizes]
    if compares.op != "compare" or len(constants) != 1:  # a loop that may also end for another reason
        return None
    return int(constants[0].rest.partition(")")[0])


def product_flops(each: Instruction, computation: Computation) -> float:
    """FLOPs of a `dot`, or of a `convolution`, which TPUs compute dots by."""
    operands = [arrays_of(computation.shape(name))[0].sizes for name in each.operands[:2]]
    if each.op == "dot":
        depth = math.prod(operands[0][int(axis)] for axis in each.attribute("lhs_contracting_dims"))
        return 2 * depth * math.prod(each.sizes)
    ((left, right, out),) = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
    window = _window(each.rest)
    spatial = sum(label.isdigit() for label in out)
    pairs = math.prod(
        _valid_pairs(
            operands[0][left.index(str(axis))],
            each.sizes[out.index(str(axis))],
            *(window[name][axis] if name in window else default for name, default in _WINDOW),
        )
        for axis in range(spatial)
    )
    groups = int((each.attribute("batch_group_count") or ["1"])[0])
    rows = operands[0][left.index("b")] // groups
    return 2.0 * rows * operands[1][right.index("i")] * operands[1][right.index("o")] * pairs


_WINDOW = (("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))


def _window(rest: str) -> dict[str, list[int]]:
    """Attributes of a convolution's window, of each spatial axis; of the padding, the one before."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    given = (part.split("=") for part in found[1].split()) if found else ()
    return {name: [int(size.partition("_")[0]) for size in values.split("x")] for name, values in given}


@functools.lru_cache(maxsize=10_000)
def _valid_pairs(inputs: int, outputs: int, size: int, stride: int, pad: int, dilate: int, spread: int) -> int:
    """Count the pairs of an output and a tap of the window that read an element, not padding or a hole."""
    taps = np.arange(size) * spread
    total = 0
    for first in range(0, outputs, 4096):
        places = np.arange(first, min(first + 4096, outputs))[:, None] * stride + taps - pad
        total += int(np.sum((places >= 0) & (places <= (inputs - 1) * dilate) & (places % dilate == 0)))
    return total


def called(each: Instruction) -> list[str]:
    """Computations that an instruction runs once; those of reductions and the like have no matrix products."""
    if each.op in ("fusion", "call", "custom-call") or each.op.endswith("-start"):
        return [name for key in ("calls", "to_apply", "called_computations") for name in each.attribute(key)]
    return []


def fused_traffic(each: Instruction, computation: Computation, fused: Computation) -> float:
    """Bytes that a fusion moves between main memory and the chip.

    A slice of an operand reads only the slice, and an update in place writes only the update.
    """
    parameters = {int(part.rest.partition(")")[0]): part.name for part in fused if part.op == "parameter"}
    users = collections.defaultdict(list)
    for part in fused:
        for name in part.operands:
            users[name].append(part)
    total = 0.0
    for place, name in enumerate(each.operands):
        whole = memory_of_shape(computation.shape(name))
        if whole and place in parameters:
            whole = min(whole, _read(parameters[place], users))
        total += whole
    roots = [fused.root]
    if fused.instructions[fused.root].op == "tuple":
        roots = fused.instructions[fused.root].operands
    results = arrays_of(each.shape)
    for array, root in itertools.zip_longest(results, roots[: len(results)]):
        if array.in_memory:
            total += min(array.bytes, _written(root, fused) if root else array.bytes)
    return total


_VIEWS = ("bitcast", "reshape", "copy", "convert")


def _read(parameter: str, users: dict[str, list[Instruction]]) -> float:
    """Bytes of an operand that a fusion reads: those of its slices if it is only sliced or updated in place."""
    total = 0.0
    for user in users[parameter]:
        if user.op in ("bitcast", "reshape"):
            total += _read(user.name, users)
        elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter:
            total += size_of_shape(user.shape)
        elif not (user.op == "dynamic-update-slice" and user.operands[0] == parameter):
            return math.inf
    return total


def _written(root: str, fused: Computation) -> float:
    each = fused.instructions[root]
    while each.op in _VIEWS and each.operands:
        each = fused.instructions[each.operands[0]]
    return size_of_shape(fused.shape(each.operands[1])) if each.op == "dynamic-update-slice" else math.inf
