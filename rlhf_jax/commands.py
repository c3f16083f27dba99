"""The commands `run`, `config` and `fetch`; the others are in `rlhf_jax.cli` and `rlhf_jax.papers`."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from rlhf_jax import dry_run, experiment, processes
from rlhf_jax.api import fetch, load_config, open_workdir, run
from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.config import override
from rlhf_jax.data.fetch import DATASETS
from rlhf_jax.interop.hf import read_config
from rlhf_jax.interop.hub import MODELS, quantisation_note
from rlhf_jax.runtime.progress import duration, rounded, size
from rlhf_jax.runtime.workdir import Workdir, flatten
from rlhf_jax.types import RlhfError

RUN = """\
Run the stages of an experiment that are not complete, and report.

--config.SECTION.FIELD=VALUE sets a field of any section, whether or not the
file has it; `rlhf-jax fields` lists them. VALUE is a Python literal, a string,
or names separated by commas:
  --config.seeds=4  --config.stages=sft,ppo  --config.ppo.optimizer.b1=0.8"""


CONFIG = """\
Print the config of an experiment with all its defaults, one field per line, as
`run` would read it. Fields that neither the file nor a flag sets are marked."""


def run_verb(arguments: list[str]) -> None:
    """Run an experiment and report on it, or print what would run."""
    config, options = parse_run_flags(arguments)
    if options.distributed or options.coordinator is not None:
        processes.connect(options.coordinator, options.processes, options.process)
    if options.dry_run:
        show_plan(config, open_workdir(options.workdir, options.inputs), options.stage)
    else:
        run(config, options.workdir, stage=options.stage, inputs=options.inputs)
    processes.disconnect()


def config_verb(arguments: list[str]) -> None:
    """Print a config with all its defaults."""
    parser = Parser("rlhf-jax config", CONFIG)
    config, _ = parse_config_flags(parser, arguments)
    given = flatten(json.loads(config.to_json_best_effort()))
    with until_closed():
        for name, value in flatten(resolved(experiment.parse(config))).items():
            known = any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for key in given)
            print(f"config.{name} = {value!r}{'' if known else '  # default'}")


def resolved(parsed: experiment.Experiment) -> dict[str, Any]:
    """Convert a checked experiment to the config that it was made from, with all defaults."""
    common = {"seed": parsed.seed, "seeds": parsed.seeds, "stages": tuple(parsed.stages)}
    sections = {"data": parsed.data, "runtime": parsed.runtime, **parsed.stages}
    return common | {name: dataclasses.asdict(section) for name, section in sections.items()}


def show_plan(config: ConfigDict, workdir: Workdir, only: str | None) -> None:
    """Print what a run would do to each stage, with sizes, and time and disk space where an earlier run tells them."""
    plan = dry_run.plan(experiment.parse(config), workdir, only)
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "", "parameters", "training", "time", "disk"):
        table.add_column(heading, justify="right" if heading in ("parameters", "time", "disk") else "left")
    for stage in plan:
        numbers = ((rounded, stage.parameters), (duration, stage.seconds), (size, stage.bytes))
        count, *costs = ("" if value is None else write(value) for write, value in numbers)
        table.add_row(stage.name, stage.status, count, stage.training, *costs)
    console = Console(highlight=False)
    console.print(table)
    for stage in plan:
        if stage.reason:
            console.print(f"{stage.name}: {stage.reason}", soft_wrap=True)
    todo = [stage for stage in plan if stage.runs]
    if not todo:
        console.print("Every stage is complete; nothing to do.")
        return
    times, disks = _total([stage.seconds for stage in todo], duration), _total([stage.bytes for stage in todo], size)
    console.print(f"To run: {len(todo)} of {len(plan)} stages. Time: {times}. Disk: {disks}.")
    console.print("Times are those of earlier runs on this machine with the same sizes.", style="dim")


def _total(values: Sequence[float | None], write: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not known yet"
    return write(sum(known)) if len(known) == len(values) else f"more than {write(sum(known))}"


def fetch_verb(arguments: list[str]) -> None:
    """Download a data set or a model."""
    parser = Parser("rlhf-jax fetch", "Download a data set or a model.")
    parser.add_argument("name", choices=[*DATASETS, *MODELS], help="data set or model")
    name = parser.parse_args(arguments).name
    place = fetch(name)
    print(place)
    if name not in MODELS:
        return
    if note := quantisation_note(name, read_config(place)):
        print(note, file=sys.stderr)


def parse_run_flags(arguments: list[str]) -> tuple[ConfigDict, argparse.Namespace]:
    """Return the config with its overrides, and the other flags. Raises RlhfError for a bad flag or file."""
    parser = Parser("rlhf-jax run", RUN)
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="directory for all results")
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="DIR",
        help="earlier work directory to read unchanged stages from (default: that of the last run in --workdir)",
    )
    parser.add_argument("--stage", metavar="NAME", help="run this stage only")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    several = parser.add_argument_group("several processes, each of which runs the same command")
    several.add_argument(
        "--distributed", action="store_true", help="find them from SLURM, Open MPI, Kubernetes or a Cloud TPU"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port")
    several.add_argument("--processes", type=int, metavar="N", help="number of processes")
    several.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    return parse_config_flags(parser, arguments)


def parse_config_flags(parser: Parser, arguments: list[str]) -> tuple[ConfigDict, argparse.Namespace]:
    """Parse the flags of a command with a config; return the config with its overrides, and the other flags."""
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config(ARG), or an experiment"
    )
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config)
    rest = iter(overrides)
    for argument in rest:
        flag, equals, text = argument.partition("=")
        if not re.fullmatch(r"--config(\.\w+)+", flag):
            verb = parser.prog.removeprefix("rlhf-jax ")
            raise RlhfError(
                f"{argument!r} is not a flag of {verb}: write --config.SECTION.FIELD=VALUE, or see {verb} --help"
            )
        value = text if equals else next(rest, None)
        if value is None or (not equals and value.startswith("--")):
            raise RlhfError(f"{flag} has no value: write {flag}=VALUE")
        override(config, flag.removeprefix("--config."), value)
    return config, options
