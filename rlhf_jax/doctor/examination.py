"""The parts of the checkup, in a process of their own that ends with the budget, even within a compilation."""

import contextlib
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.doctor import exactness, numerics, rates, workloads
from rlhf_jax.doctor.peers import PEERS
from rlhf_jax.doctor.rates import Rates
from rlhf_jax.doctor.workloads import Workload
from rlhf_jax.runtime import compilation_cache, provenance
from rlhf_jax.types import Json, RlhfError

NUMERICS, EXACTNESS, RATES = "numbers against float64", "determinism and resuming", "rates of the devices"
"""Names of the first parts; the others are workloads."""

PROCESSES = multiprocessing.get_context("spawn")
"""Starts processes anew, as the threads of a JAX that is already in use do not survive a fork."""


def examine(seconds: float, *, large: bool, report: Callable[[str], None]) -> dict[str, Json]:
    """Check and measure this machine, in at most some seconds.

    Returns: what was found, by part; `skipped` names what was not done in time, or does not fit into the memory; and
    `only_accelerators` tells whether larger models are left out because there is no accelerator.
    Raises RlhfError if the process that checks dies.
    """
    end = time.monotonic() + seconds
    found: dict[str, Json] = {"numerics": [], "exactness": [], "rates": None, "speeds": [], "skipped": []}
    waiting, part = [NUMERICS, EXACTNESS, RATES], "the start of JAX"
    receiver, sender = PROCESSES.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        process = PROCESSES.Process(target=work, args=(sender, Path(directory), seconds, large), daemon=True)
        process.start()
        sender.close()
        try:
            while receiver.poll(max(0.0, end - time.monotonic())):
                kind, value = receiver.recv()
                if kind == "part":
                    part = value
                    report(value)
                elif kind == "done":
                    waiting.remove(value)
                elif kind == "planned":
                    waiting += value
                elif isinstance(found.get(kind), list):
                    found[kind].append(value)
                else:
                    found[kind] = value
                if not waiting:
                    break
        except EOFError:
            process.join()
            raise RlhfError(
                f"the process that checks this machine died with exit status {process.exitcode} in: {part}"
            ) from None
        finally:
            process.kill()
            process.join()
    found["skipped"] += [{"name": name, "reason": "the budget is spent"} for name in waiting]
    found["only_accelerators"] = large and found.get("machine", {}).get("platform") == "cpu"
    return found


def work(sender: Connection, directory: Path, seconds: float, large: bool) -> None:
    """Do all parts, and send what is found as soon as it is known."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this process
    end = time.monotonic() + seconds
    compilation_cache.enable()

    def send(kind: str, value: Any) -> None:
        sender.send((kind, value))

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        send("part", name)
        yield
        send("done", name)

    devices = jax.devices()
    planned = workloads_of(devices[0].platform, large=large)
    send("planned", [name_of(workload) for workload in planned])
    for kind, value in {
        "machine": provenance.machine(),
        "packages": provenance.packages(),
        "source": provenance.source(),
        "memory": (devices[0].memory_stats() or {}).get("bytes_limit"),
        "date": time.strftime("%Y-%m-%d"),
    }.items():
        send(kind, value)
    with part(NUMERICS):
        for check in numerics.checks(devices[0]):
            send("numerics", check._asdict() | {"passed": check.passed})
    with part(EXACTNESS):
        for check in exactness.checks(directory):
            send("exactness", check._asdict())
    with part(RATES):
        measured = rates.measure(devices)
        send("rates", measured._asdict())
    for workload in planned:
        with part(name_of(workload)):
            send(*_speed(workload, devices[0], measured, max(1.0, min(10.0, (end - time.monotonic()) / 10))))
    sender.close()


def _speed(workload: Workload, device: jax.Device, measured: Rates, seconds: float) -> tuple[str, Json]:
    speed = workloads.measure(workload, device, measured, seconds)
    if speed is None:
        return "skipped", {"name": name_of(workload), "reason": "does not fit into the memory"}
    peer = PEERS.get((workload.stage, workload.shape, workload.rows))
    known = {"tokens_per_second": speed.tokens_per_second, "peer": None if peer is None else peer._asdict()}
    return "speeds", workload._asdict() | speed._asdict() | known


def name_of(workload: Workload) -> str:
    """Name of a workload's measurement."""
    return f"speed of {workload.stage}, shape {workload.shape}, {workload.rows} rows"


def workloads_of(platform: str, *, large: bool) -> list[Workload]:
    """Return what to measure: the sizes at which other libraries were measured, or a model for a CPU, in seconds."""
    if platform == "cpu":
        return [Workload(stage, "tiny", rows, 32, 32) for stage, rows in (("sampling", 16), ("dpo", 8), ("ppo", 8))]
    return [
        workload
        for shape, pairs in (("S", 32), ("L", 16))[: 2 if large else 1]
        for workload in (
            Workload("sampling", shape, 64, 128, 128),
            Workload("dpo", shape, pairs, 256, 256),
            Workload("ppo", shape, 64, 128, 128),
            Workload("sampling", shape, 256, 128, 128),
        )
    ]
