"""Machines that programs are compiled for, and the rates of their chips.

A TPU's programs are compiled by libtpu and a GPU's by JAX's CUDA plugin; neither needs the device.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jax.experimental import topologies

from rlhf_jax.models.model_config import DType
from rlhf_jax.types import RlhfError

GIB = 2**30
GPU_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""Environment variable with the share of a GPU's memory that JAX uses; 0.75 by default."""


class Chip(NamedTuple):
    """Rates of one device, as published by its maker, and its memory."""

    platform: Literal["cpu", "gpu", "tpu"]
    flops: float  # FLOP/s of dense products in bfloat16
    flops_float32: float  # FLOP/s of float32 products at JAX's default precision: bfloat16 on TPUs, TF32 on GPUs
    memory_rate: float  # bytes per second of the main memory
    link_rate: float  # bytes per second received over all links to other devices
    memory: float | None  # bytes that programs may use; None: not known


CHIPS = {
    "v4": Chip("tpu", 275e12, 275e12, 1228e9, 300e9, 30.75 * GIB),
    "v5e": Chip("tpu", 197e12, 197e12, 819e9, 200e9, 15.75 * GIB),
    "v5p": Chip("tpu", 459e12, 459e12, 2765e9, 600e9, 95 * GIB),
    "v6e": Chip("tpu", 918e12, 918e12, 1640e9, 400e9, 31.25 * GIB),
    "h100": Chip("gpu", 989e12, 494e12, 3352e9, 450e9, 84_942_979_072),
    "cpu": Chip("cpu", 1e11, 1e11, 2e10, 1e10, None),
}
"""Chips by the names that topologies begin with. The rates of `cpu` stand for a few cores, and are not measured."""

TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
"""Environment in which libtpu compiles without a TPU, in several processes at once. It would otherwise ask the cloud's
metadata server for the names of the host, and lock the host for one process."""


class Machine(NamedTuple):
    """A number of connected devices of one kind."""

    topology: str  # v5e:4x4, h100:8, cpu:2
    chip: Chip

    @property
    def device_count(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along each axis of the network."""
        return tuple(int(size) for size in self.topology.partition(":")[2].split("x"))

    @property
    def memory(self) -> float | None:
        """Bytes of a device that programs may use."""
        if self.chip.platform != "gpu" or self.chip.memory is None:
            return self.chip.memory
        return self.chip.memory * float(os.environ.get(GPU_SHARE, 0.75))

    def part(self, count: int) -> "Machine | None":
        """Return a machine with so many of these chips, its longest axes halved; None if halving does not lead there.

        Programs for TPUs occupy a whole slice: on large ones they are not compiled for some of its devices.
        """
        sizes = list(self.sizes)
        while math.prod(sizes) > count and max(sizes) % 2 == 0:
            sizes[sizes.index(max(sizes))] //= 2
            sizes.sort(key=lambda size: (size == 1, size))  # 2x2x1, 2x4x4
        if math.prod(sizes) != count:
            return None
        return Machine(f"{self.topology.partition(':')[0]}:{'x'.join(map(str, sizes))}", self.chip)

    def peak(self, dtype: DType) -> float:
        """FLOP/s of products of a dtype."""
        return self.chip.flops_float32 if dtype == "float32" else self.chip.flops


def machine(topology: str) -> Machine:
    """Parse the name of a machine. Raises RlhfError if there is no such chip."""
    name, _, sizes = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", sizes):
        raise RlhfError(
            f"--topology={topology} should be a chip and its number or arrangement, as v5e:4x4, v5p:4x4x8, h100:8 or "
            f"cpu:2; the chips are {', '.join(CHIPS)}"
        )
    return Machine(topology, CHIPS[name])


def prepare(of: Machine) -> None:
    """Set the environment to compile for a machine, before JAX starts its backends."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if of.chip.platform == "cpu" and "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={of.device_count}"


def devices(of: Machine) -> Sequence[jax.Device]:
    """Return the devices to compile for; their memory and their kernels do not exist here.

    Raises RlhfError if the compiler is not installed, or if there is no such arrangement of the chips.
    """
    found = {"cpu": _cpus, "gpu": _gpus, "tpu": _tpus}[of.chip.platform](of)
    return found[: of.device_count]


def _cpus(of: Machine) -> Sequence[jax.Device]:
    found = jax.devices("cpu")
    if len(found) < of.device_count:
        raise RlhfError(
            f"--topology={of.topology} needs {of.device_count} CPU devices, but this process has {len(found)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={of.device_count}"
        )
    return found


def _tpus(of: Machine) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise RlhfError(
            f"--topology={of.topology} is compiled by libtpu, which is not installed: pip install 'rlhf-jax[plan]'"
        )
    for name, value in TPU_HOST.items():
        os.environ.setdefault(name, value)
    chip, sizes = of.topology.partition(":")[0], of.sizes
    if of.device_count < 4:  # a host has four chips; programs may use some of them
        sizes = (2, 2) if chip in ("v5e", "v6e") else (2, 2, 1)
    name = f"{chip}:{'x'.join(map(str, sizes))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError) as error:  # of the compiler
        reason = str(error).partition("\n")[0]
        raise RlhfError(f"libtpu does not compile for --topology={of.topology}: {reason}") from error


def _gpus(of: Machine) -> Sequence[jax.Device]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise RlhfError(
            f"--topology={of.topology} is compiled by JAX's CUDA plugin, which is not installed: pip install "
            "'rlhf-jax[cuda12]'"
        )
    target = Path(__file__).with_name(f"{of.topology.partition(':')[0]}.txtpb").read_text(encoding="utf-8")
    return topologies.get_topology_desc("gpu", "cuda", target_config=target, topology=f"1x1x{of.device_count}").devices
