"""`rlhf-jax doctor`: checks of the numbers and measurements of the speed of this machine."""

import json
import os
import re

from rich.console import Console
from rich.table import Table

from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.doctor.examination import examine
from rlhf_jax.runtime import provenance
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
    budget = seconds_in(options.budget)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    progress = Console(stderr=True, highlight=False)
    with progress.status("checking") as status, until_closed():
        found = examine(budget, large=budget >= LARGE_BUDGET, report=status.update)
    console = Console(highlight=False)
    with until_closed():
        console.print(json.dumps(found), soft_wrap=True, markup=False) if options.json else show(found, console)
    failed = [each["name"] for part in ("numerics", "exactness") for each in found[part] if not each["passed"]]
    if failed:
        raise RlhfError(f"{len(failed)} checks failed: {'; '.join(failed)}")


def show(found: dict[str, Json], console: Console) -> None:
    """Print what was found."""
    if "machine" in found:
        machine = found["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
        memory = f", {found['memory'] / 1e9:.1f} GB each" if found["memory"] else ""
        console.print(f"{provenance.machine_name(machine)}{memory}; Python {machine['python']}; {versions}\n")
    if found["numerics"]:
        console.print(numerics_table(found["numerics"]), "")
    if found["exactness"]:
        console.print(exactness_table(found["exactness"]), "")
    if found["rates"]:
        console.print(rates_sentence(found["rates"]))
    if found["speeds"]:
        console.print(speed_table(found["speeds"]))
        console.print("Share: least time by these rates, for the FLOPs and the memory traffic, over the measured time.")
        console.print("It is above 100 % where data stay in a cache, which is faster than the memory.")
    for reason in ("does not fit into the memory", "the budget is spent"):
        if names := [each["name"] for each in found["skipped"] if each["reason"] == reason]:
            console.print(f"Left out, as {reason}: {'; '.join(names)}.")
    if found["only_accelerators"]:
        console.print("Larger models are measured on accelerators only.")


def numerics_table(checks: list[dict[str, Json]]) -> Table:
    """Lay out the largest errors."""
    table = Table("numbers against float64 on the CPU", "largest error", "limit", "", box=None, pad_edge=False)
    for check in checks:
        worst = f" ({check['worst']})" if check["worst"] else ""
        table.add_row(f"{check['name']}{worst}", f"{check['error']:.1e}", f"{check['limit']:.0e}", verdict(check))
    return table


def exactness_table(checks: list[dict[str, Json]]) -> Table:
    """Lay out the comparisons of runs."""
    table = Table("determinism and resuming", "largest difference", "", box=None, pad_edge=False)
    for check in checks:
        table.add_row(check["name"], "same bits" if check["passed"] else f"{check['difference']:.1e}", verdict(check))
    return table


def rates_sentence(rates: dict[str, Json]) -> str:
    """Describe the rates of a device."""
    products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates["products"].items())
    links = f"; {rates['links'] / 1e9:.3g} GB/s received in sums over all devices" if rates["links"] else ""
    return f"Rates of a device: products {products}; memory {rates['memory'] / 1e9:.3g} GB/s{links}\n"


def speed_table(speeds: list[dict[str, Json]]) -> Table:
    """Lay out the measured speeds, beside those of other libraries at the same sizes."""
    headings = ["speed", "shape", "rows", "seconds", "tokens/s", "share", "bound by", "memory"]
    compared = any(speed["peer"] for speed in speeds)
    table = Table(*headings, *(["fastest peer on an H100"] if compared else []), box=None, pad_edge=False)
    for speed in speeds:
        start = (speed["stage"], speed["shape"], str(speed["rows"]))
        numbers = f"{speed['seconds']:.3g}", f"{speed['tokens_per_second']:,.0f}", f"{speed['share']:.0%}"
        end = speed["bound"], f"{speed['peak'] / 1e9:.2f} GB"
        peer = [f"{speed['peer']['seconds']:.3g} s, {speed['peer']['name']}"] if speed["peer"] else []
        table.add_row(*start, *numbers, *end, *peer)
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
