"""`rlhf-jax doctor`: checks of the numbers and measurements of the speed of this machine."""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.doctor import exactness, numerics, rates, workloads
from rlhf_jax.doctor.workloads import Lengths, Workload
from rlhf_jax.runtime import compilation_cache, provenance
from rlhf_jax.types import Json, RlhfError

DESCRIPTION = """\
Check this machine: devices, versions and memory; the numbers of losses,
attention, networks and sampling against float64; that a run gives the same bits
again, and after it was interrupted; the rates of matrix products, memory and
connections; and the speed of sampling, DPO and PPO, beside the least time that
these rates allow.

Measurements end when the budget is spent; --budget=10m adds larger models. The
exit status is 1 if a check fails."""

LARGE_BUDGET = 600
"""Seconds from which on the shape L is measured, too."""


def doctor_verb(arguments: list[str]) -> None:
    """Check this machine and print what is found. Raises RlhfError if a check fails."""
    parser = Parser("rlhf-jax doctor", DESCRIPTION)
    parser.add_argument("--budget", default="5m", metavar="TIME", help="time to spend at most: 30s, 5m (default), 1h")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    end = time.monotonic() + seconds_in(options.budget)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    compilation_cache.enable()
    progress = Console(stderr=True, highlight=False)
    with progress.status("checking") as status, until_closed():
        found = examine(end, large=seconds_in(options.budget) >= LARGE_BUDGET, report=status.update)
    console = Console(highlight=False)
    with until_closed():
        console.print(json.dumps(found), soft_wrap=True, markup=False) if options.json else show(found, console)
    failed = [each["name"] for part in ("numerics", "exactness") for each in found[part] if not each["passed"]]
    if failed:
        raise RlhfError(f"{len(failed)} checks failed: {'; '.join(failed)}")


def examine(end: float, *, large: bool, report: Callable[[str], None]) -> dict[str, Json]:
    """Check and measure this machine.

    Args: end is the time of the monotonic clock after which nothing more is measured.
    """
    device = jax.devices()[0]
    found: dict[str, Json] = {
        "machine": provenance.machine(),
        "packages": provenance.packages(),
        "source": provenance.source(),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "date": time.strftime("%Y-%m-%d"),
    }
    report("numbers against float64")
    found["numerics"] = [check._asdict() | {"passed": check.passed} for check in numerics.checks(device)]
    found["exactness"], found["skipped"] = [], []
    if time.monotonic() < end:
        report("determinism and resuming: training four small models three times")
        with tempfile.TemporaryDirectory() as directory:
            found["exactness"] = [check._asdict() for check in exactness.checks(Path(directory))]
    else:
        found["skipped"].append("determinism and resuming")
    report("rates of products, memory and connections")
    measured = rates.measure(jax.devices())
    found["rates"], found["speeds"] = measured._asdict(), []
    lengths, planned = workloads_of(device.platform, large=large)
    for workload in planned:
        if time.monotonic() > end:
            found["skipped"].append(f"speed of {workload.stage}, shape {workload.shape}, {workload.rows} rows")
            continue
        report(f"speed of {workload.stage}, shape {workload.shape}, {workload.rows} rows")
        seconds = min(10.0, max(1.0, (end - time.monotonic()) / 10))
        speed = workloads.measure(workload, lengths, device, measured, seconds)
        if speed is None:
            found["skipped"].append(f"{workload.stage}, shape {workload.shape}: does not fit into the memory")
        else:
            rate = {"tokens_per_second": speed.tokens_per_second}
            found["speeds"].append(workload._asdict() | speed._asdict() | rate)
    return found


def workloads_of(platform: str, *, large: bool) -> tuple[Lengths, list[Workload]]:
    """Return the sizes to measure: models of accelerators, or one that a CPU trains in seconds."""
    if platform == "cpu":
        return Lengths(32, 32), [
            Workload("sampling", "tiny", 16),
            Workload("dpo", "tiny", 8),
            Workload("ppo", "tiny", 8),
        ]
    shapes = ("S", "L") if large else ("S",)
    return Lengths(128, 128), [
        workload
        for shape in shapes
        for workload in (
            Workload("sampling", shape, 64),
            Workload("dpo", shape, 32 if shape == "S" else 16),
            Workload("ppo", shape, 64),
            Workload("sampling", shape, 256),
        )
    ]


def show(found: dict[str, Json], console: Console) -> None:
    """Print what was found."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    memory = f", {found['memory'] / 1e9:.1f} GB each" if found["memory"] else ""
    console.print(f"{provenance.machine_name(machine)}{memory}; Python {machine['python']}; {versions}\n")
    checks = Table("numbers against float64 on the CPU", "largest error", "limit", "", box=None, pad_edge=False)
    for check in found["numerics"]:
        worst = f" ({check['worst']})" if check["worst"] else ""
        checks.add_row(f"{check['name']}{worst}", f"{check['error']:.1e}", f"{check['limit']:.0e}", verdict(check))
    console.print(checks, "")
    exact = Table("determinism and resuming", "largest difference", "", box=None, pad_edge=False)
    for check in found["exactness"]:
        exact.add_row(check["name"], "same bits" if check["passed"] else f"{check['difference']:.1e}", verdict(check))
    if found["exactness"]:
        console.print(exact, "")
    measured = found["rates"]
    products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in measured["products"].items())
    links = f"; {measured['links'] / 1e9:.3g} GB/s received in sums over all devices" if measured["links"] else ""
    console.print(f"Rates of a device: products {products}; memory {measured['memory'] / 1e9:.3g} GB/s{links}\n")
    if found["speeds"]:
        console.print(speed_table(found["speeds"]))
        console.print("Share: least time by these rates, for the FLOPs and the memory traffic, over the measured time.")
    if found["skipped"]:
        console.print(f"Not measured, as the budget is spent or the memory too small: {'; '.join(found['skipped'])}.")


def speed_table(speeds: list[dict[str, Json]]) -> Table:
    """Lay out the measured speeds."""
    headings = ("speed", "shape", "rows", "seconds", "tokens/s", "share", "bound by", "memory")
    table = Table(*headings, box=None, pad_edge=False)
    for speed in speeds:
        start = (speed["stage"], speed["shape"], str(speed["rows"]))
        numbers = f"{speed['seconds']:.3g}", f"{speed['tokens_per_second']:,.0f}", f"{speed['share']:.0%}"
        table.add_row(*start, *numbers, speed["bound"], f"{speed['peak'] / 1e9:.2f} GB")
    return table


def verdict(check: dict[str, Json]) -> str:
    """Say whether a check passed."""
    return "passed" if check["passed"] else "[bold red]failed[/bold red]"


def seconds_in(text: str) -> float:
    """Parse a time such as 90s, 5m or 1h. Raises RlhfError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None or not float(match[1]):
        raise RlhfError(f"--budget={text} should be a time, such as 90s, 5m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
