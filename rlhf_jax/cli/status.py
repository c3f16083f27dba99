"""`rlhf-jax status DIR`: the stages of an experiment, and what each does now."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.runtime.files import read_json
from rlhf_jax.runtime.progress import duration
from rlhf_jax.runtime.stage_state import INTERRUPTED, is_running, read_state
from rlhf_jax.runtime.workdir import read_record
from rlhf_jax.types import Json, RlhfError

DESCRIPTION = """\
List the stages of a work directory: complete, running (with step, rate and time
left), failed (with the error), interrupted (by Ctrl-C or SIGTERM), killed, or
not started. The same `rlhf-jax run` command continues a stage that ended early."""


class StageStatus(NamedTuple):
    """A row of the table."""

    stage: str
    state: str
    steps: str
    time: str
    detail: str = ""  # printed below the row


def status_verb(arguments: list[str]) -> None:
    """Print the status of the stages of a work directory."""
    parser = Parser("rlhf-jax status", DESCRIPTION)
    parser.add_argument("workdir", type=Path, metavar="DIR", help="work directory of an experiment")
    workdir = parser.parse_args(arguments).workdir
    rows = [*statuses(workdir)]
    table = Table(box=None, pad_edge=False)
    for heading in StageStatus._fields[:-1]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row[:-1])
    with until_closed():
        console = Console(highlight=False)
        console.print(table)
        for row in rows:
            if row.detail:
                console.print(Text(f"{row.stage}: {row.detail}"))


def statuses(workdir: Path) -> Iterator[StageStatus]:
    """Yield the status of each stage, in the order of the experiment. Raises RlhfError unless there is one."""
    record = read_record(workdir)
    begun = sorted((file.stat().st_mtime_ns, file.parent.name) for file in workdir.glob("*/config.json"))
    names = dict.fromkeys([*record.stages, *(name for _, name in begun)])
    if not names:
        raise RlhfError(f"{workdir} has no stage: give the --workdir of an experiment")
    for name in names:
        elsewhere = record.inputs is not None and (record.inputs / name / "complete.json").exists()
        if not (workdir / name / "config.json").exists() and elsewhere:
            yield StageStatus(name, "complete", "", f"in {record.inputs}")
        else:
            yield stage_status(workdir / name)


def stage_status(directory: Path) -> StageStatus:
    """Read the status of one stage."""
    name = directory.name
    if (directory / "complete.json").exists():
        summary = read_json(directory / "summary.json")
        return StageStatus(name, "complete", str(summary.get("steps", "")), duration(summary["time/seconds"]))
    state = read_state(directory)
    if state is None:
        begun = (directory / "config.json").exists()
        return StageStatus(name, "not complete" if begun else "not started", "", "")
    steps = f"{state['done']}/{state['total']}" if state.get("total") else ""
    if is_running(directory):
        return StageStatus(name, "running", steps, _running(state), state["doing"] or state.get("figures", ""))
    when = f"{_since(state['written'])} ago"
    if state["error"] is not None:
        stopped = "interrupted" if state["error"] == INTERRUPTED else "failed"
        return StageStatus(name, stopped, steps, when, "" if stopped == "interrupted" else state["error"])
    return StageStatus(name, "killed", steps, when)


def _since(moment: float) -> str:
    """Time since a moment; 0 s if the clock was set back behind it."""
    return duration(max(0.0, time.time() - moment))


def _running(state: Mapping[str, Json]) -> str:
    found = f"for {_since(state['started'])}"
    if state.get("seconds_per_step"):
        left = (state["total"] - state["done"]) * state["seconds_per_step"]
        found += f", {1 / state['seconds_per_step']:.3g} steps/s, {duration(left)} left"
    return found
