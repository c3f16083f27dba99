"""`rlhf-jax sweep`: run an experiment at every point that its `get_sweep` returns, and tabulate the results."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from rlhf_jax import config as configs
from rlhf_jax import dry_run, experiment
from rlhf_jax.api import call_config_file, open_workdir, run
from rlhf_jax.cli.parser import Parser
from rlhf_jax.commands import parse_config_flags
from rlhf_jax.experiment import Experiment
from rlhf_jax.runtime.files import read_json, write_json, write_text
from rlhf_jax.stages.kinds import find_kind
from rlhf_jax.types import RlhfError
from rlhf_jax.vmapped import train_points

DESCRIPTION = """\
Run an experiment at every point of a sweep. The config file has a function
get_sweep, which returns a list of points, each a dict from fields to values:

  def get_sweep(arg=""):
      return [{"ppo.kl_coef": kl} for kl in (0.05, 0.1, 0.2)]

Stages that are the same at all points run once, in DIR/shared, unless --inputs
has them. Each point has a work directory in DIR, named after its values, with a
report of its own. DIR/sweep.csv has a row for each point and method. The same
command resumes a sweep; if get_sweep has changed, it runs the new points."""

SHARED, TABLE, POINT = "shared", "sweep.csv", "point.json"
LONGEST_NAME = 80
UNSAFE = re.compile(r"[^\w.+-]+")
"""Characters of a value that a directory's name should not have."""

SHOWN = ("gold_score", "reward_score", "win_rate", "kl")
"""Columns of results.csv in the printed table, if they were measured."""


class Point(NamedTuple):
    """A point of a sweep: its directory's name, its fields, and the config."""

    name: str
    fields: dict[str, Any]
    config: ConfigDict


def sweep_verb(arguments: list[str]) -> None:
    """Run all points of a sweep, or one, or print how to."""
    parser = Parser("rlhf-jax sweep", DESCRIPTION)
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="directory for all results")
    parser.add_argument("--inputs", type=Path, metavar="DIR", help="work directory that has the shared stages already")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="points to run at once (default 1)")
    parser.add_argument("--vmap", action="store_true", help="train points that differ in numbers only in one program")
    parser.add_argument("--slurm", action="store_true", help="print a SLURM array job, and run the shared stages only")
    parser.add_argument("--point", metavar="NAME", help="run this point only, after the shared stages")
    parser.add_argument("--dry-run", action="store_true", help="list the points and the shared stages, and run nothing")
    config, options = parse_config_flags(parser, arguments)
    found = points(options.config, config, arguments)
    if options.processes < 1:
        raise RlhfError(f"--processes={options.processes} must be at least 1")
    if options.vmap and (options.processes > 1 or options.slurm or options.point is not None):
        raise RlhfError("--vmap trains the points in one process: leave out --processes, --slurm and --point")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    parsed = [experiment.parse(point.config) for point in found]  # every point is checked before the first one runs
    shared = shared_stages(parsed)
    if options.dry_run:
        for point in found:
            console.print(point.name, soft_wrap=True)
        console.print(f"{len(found)} points. Shared stages: {', '.join(shared) or 'none'}.")
        return
    inputs = options.inputs
    if shared and not has_stages(parsed[0], shared, inputs):
        inputs = options.workdir / SHARED
        run_shared(parsed[0], shared, inputs, console)
    if options.point is not None:
        chosen = [point for point in found if point.name == options.point]
        if not chosen:
            raise RlhfError(f"--point={options.point} is not a point of the sweep: {', '.join(p.name for p in found)}")
        run_point(chosen[0], options.workdir, inputs)
        return
    commands = [[*_command(arguments), f"--point={point.name}"] for point in found]
    if options.slurm:
        print(slurm_script(commands, options.workdir))
        return
    if options.vmap:
        places = [open_workdir(options.workdir / point.name, inputs) for point in found]
        for name in parsed[0].stages:
            if name not in shared:
                train_points([*zip(parsed, places, strict=True)], name, console)
    if options.processes == 1:
        for number, point in enumerate(found, start=1):
            console.rule(f"{number} of {len(found)}: {point.name}")
            run_point(point, options.workdir, inputs)
    else:
        run_processes([*zip((p.name for p in found), commands, strict=True)], options, console)
    show(
        tabulate(found, options.workdir), [*dict.fromkeys(field for point in found for field in point.fields)], console
    )
    console.print(f"Results: {options.workdir / TABLE}", soft_wrap=True)


def points(source: str, config: ConfigDict, arguments: Sequence[str]) -> list[Point]:
    """Read the points of a sweep. Flags of the command apply to all points; those of a point win.

    Raises RlhfError unless `get_sweep` returns a list of different dicts.
    """
    found = call_config_file(source, "get_sweep")
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(each, Mapping) for each in found):
        raise RlhfError(f"config {source}: get_sweep() should return a list of dicts from fields to values")
    names = names_of(found)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RlhfError(f"config {source}: get_sweep() returned the point {twice} twice")
    made = []
    for name, fields in zip(names, found, strict=True):
        own = config.copy_and_resolve_references()
        for field, value in fields.items():
            configs.override(own, field, value)
        made.append(Point(name, dict(fields), own))
    return made


def names_of(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name every point after its values, with fields as short as they remain distinct."""
    fields = [*dict.fromkeys(field for point in found for field in point)]
    short = {field: _shortest(field, fields) for field in fields}
    names = []
    for point in found:
        name = ",".join(f"{short[field]}={UNSAFE.sub('_', str(value))}" for field, value in point.items())
        if len(name) > LONGEST_NAME:
            name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        names.append(name or "default")
    return names


def _shortest(field: str, fields: Sequence[str]) -> str:
    parts = field.split(".")
    endings = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next(end for end in endings if sum(f".{other}".endswith(f".{end}") for other in fields) == 1)


def shared_stages(experiments: Sequence[Experiment]) -> list[str]:
    """Stages that are the same at all points, in order."""
    first, shared = experiments[0], list[str]()
    if len(experiments) == 1:
        return shared
    for name, stage in first.stages.items():
        seeded = find_kind(stage.kind, name).seeded
        same = all(
            other.stages.get(name) == stage
            and (other.seed, other.data) == (first.seed, first.data)
            and (other.seeds == first.seeds or not seeded)
            for other in experiments
        )
        if same and set(configs.input_stages(stage, first.stages)) <= set(shared):
            shared.append(name)
    return shared


def has_stages(parsed: Experiment, shared: Sequence[str], inputs: Path | None) -> bool:
    """Return whether a work directory has all shared stages, complete and of the same config."""
    if inputs is None:
        return False
    part = dataclasses.replace(parsed, stages={name: parsed.stages[name] for name in shared})
    return not any(stage.runs for stage in dry_run.plan(part, open_workdir(inputs, None), None))


def run_shared(parsed: Experiment, shared: Sequence[str], directory: Path, console: Console) -> None:
    """Run the shared stages in a work directory of their own."""
    part = dataclasses.replace(parsed, stages={name: parsed.stages[name] for name in shared})
    console.rule(f"shared stages: {', '.join(shared)}")
    experiment.run(part, open_workdir(directory, None), None, console)


def run_point(point: Point, workdir: Path, inputs: Path | None) -> None:
    """Run one point in its directory."""
    run(point.config, workdir / point.name, inputs=inputs)
    write_json(workdir / point.name / POINT, point.fields)


def run_processes(commands: list[tuple[str, list[str]]], options: Any, console: Console) -> None:
    """Run points in processes, each on its own share of the cores, with its output in a file of its directory.

    Raises RlhfError naming the points that failed, after the others are complete.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = max(1, len(cores) // options.processes)
    free = [cores[slot * share : (slot + 1) * share] or cores for slot in range(options.processes)]
    waiting, running, failed = list(commands), dict[str, tuple[subprocess.Popen, list[int]]](), list[str]()
    try:
        while waiting or running:
            while waiting and free:
                name, command = waiting.pop(0)
                mask = free.pop(0)
                log = options.workdir / name / "log.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                environment = os.environ | ({"NPROC": str(len(mask))} if mask else {})
                with log.open("a") as output:
                    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
                if mask:
                    os.sched_setaffinity(process.pid, mask)
                running[name] = process, mask
                console.print(f"{name}: started, output in {log}", soft_wrap=True)
            for name, (process, mask) in [*running.items()]:
                if process.poll() is not None:
                    del running[name]
                    free.append(mask)
                    failed += [name] if process.returncode else []
                    console.print(f"{name}: {'failed' if process.returncode else 'complete'}", soft_wrap=True)
            time.sleep(0.2)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    if failed:
        raise RlhfError(f"{len(failed)} points failed: {', '.join(failed)}; see log.txt in their directories")


def slurm_script(commands: Sequence[Sequence[str]], workdir: Path) -> str:
    """Write an array job with one task per point."""
    lines = [f"  {number}) {shlex.join(command)} ;;" for number, command in enumerate(commands)]
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --array=0-{len(commands) - 1}",
            f"#SBATCH --output={workdir.absolute()}/slurm-%a.txt",
            "# Add your partition, time and devices; submit with sbatch. The command without --slurm writes the table.",
            f"cd {shlex.quote(os.getcwd())}",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *lines,
            "esac",
        ]
    )


def _command(arguments: Sequence[str]) -> list[str]:
    """Return the command of this sweep without the flags that say how to run it."""
    own = ("--processes", "--vmap", "--slurm", "--point", "--dry-run")
    kept, rest = list[str](), iter(arguments)
    for argument in rest:
        if argument in ("--processes", "--point"):
            next(rest, None)
        elif argument.partition("=")[0] not in own:
            kept.append(argument)
    return [sys.executable, "-m", "rlhf_jax", "sweep", *kept]


def tabulate(found: Sequence[Point], workdir: Path) -> pd.DataFrame:
    """Write sweep.csv: the fields of each complete point beside each row of its results."""
    tables = []
    for point in found:
        results = workdir / point.name / "results.csv"
        if not (workdir / point.name / POINT).exists() or not results.exists():
            continue
        fields = {name: json.dumps(value) if isinstance(value, (list, tuple, dict)) else value for name, value in
                  read_json(workdir / point.name / POINT).items()}  # fmt: skip
        table = pd.read_csv(results)
        fields = {name: value for name, value in fields.items() if name not in table}  # seed is a column already
        tables.append(pd.concat([pd.DataFrame([fields] * len(table)), table], axis=1))
    if not tables:
        raise RlhfError("no point has results: does the experiment have a stage of kind evaluate?")
    table = pd.concat(tables, ignore_index=True)
    write_text(workdir / TABLE, table.to_csv(index=False))
    return table


def show(table: pd.DataFrame, fields: Sequence[str], console: Console) -> None:
    """Print the main columns, as means over seeds. Args: fields are those of the points."""
    columns = [name for name in SHOWN if name in table and table[name].notna().any()]
    means = table.groupby([*fields, "method"], sort=False, dropna=False)[columns].mean().reset_index()
    printed = Table(box=None, pad_edge=False)
    for name in [*(_shortest(field, fields) for field in fields), "method", *columns]:
        printed.add_column(name, justify="right" if name in columns else "left")
    for row in means.itertuples(index=False):
        printed.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    console.print(printed)
