"""Rates of the devices at hand: matrix products, main memory, and sums over devices."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.models.model_config import DType

LEAST_SECONDS = 0.1
"""Time that a measurement takes at least; shorter ones are repeated more often."""
REPEATS = 3
"""Measurements, of which the fastest counts: others share the machine."""
PASSES = 16
"""Passes over the memory in one program."""


class Rates(NamedTuple):
    """Measured rates of one device."""

    products: dict[DType, float]  # FLOP/s of matrix products
    memory: float  # bytes read and written per second
    links: float | None  # bytes received per second in a sum over all devices; None: there is one device


def measure(devices: list[jax.Device]) -> Rates:
    """Measure the rates of the first device, and of the connections between all."""
    small = devices[0].platform == "cpu"
    with jax.default_device(devices[0]):
        products: dict[DType, float] = {
            dtype: _products(1024 if small else 8192, dtype) for dtype in ("float32", "bfloat16")
        }
        memory = _memory(2**24 if small else 2**28)
    return Rates(products, memory, None if len(devices) == 1 else _links(devices, 2**20 if small else 2**27))


def seconds_of(function: Callable[..., Any], *args: Any) -> float:
    """Fastest time of a call, after one that compiles."""
    jax.block_until_ready(function(*args))
    times, calls = [], 1
    for _ in range(REPEATS):
        while True:
            start = time.perf_counter()
            jax.block_until_ready([function(*args) for _ in range(calls)])
            elapsed = time.perf_counter() - start
            if elapsed >= LEAST_SECONDS:
                break
            calls *= 2
        times.append(elapsed / calls)
    return min(times)


def _products(size: int, dtype: DType) -> float:
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    return 2 * size**3 / seconds_of(jax.jit(lambda a, b: a @ b), matrix, matrix)


def _memory(elements: int) -> float:
    """Bytes per second of passes over one array in place: a new one's pages would have to be mapped, on a CPU."""
    array = jnp.ones(elements, jnp.float32)
    over = jax.jit(lambda x: jax.lax.fori_loop(0, PASSES, lambda _, y: y * 1.5 + 1, x))
    return 2 * PASSES * array.nbytes / seconds_of(over, array)


def _links(devices: list[jax.Device], elements: int) -> float:
    """Bytes that a device receives per second in an all-reduce."""
    mesh = Mesh(devices, ("devices",))
    rows = jax.device_put(jnp.ones((len(devices), elements), jnp.float32), NamedSharding(mesh, P("devices")))
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, P()))
    return 2 * (1 - 1 / len(devices)) * 4 * elements / seconds_of(total, rows)
