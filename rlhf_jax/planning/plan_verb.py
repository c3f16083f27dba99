"""`rlhf-jax plan`: memory, costs and least times of an experiment on a machine that need not be at hand."""

import json

from rich.console import Console

from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.commands import parse_config_flags
from rlhf_jax.runtime.progress import duration, rounded, size
from rlhf_jax.types import Json, RlhfError

DESCRIPTION = """\
Compile the programs of every stage for a machine, with none at hand and without
reading weights, and print what they need: memory and whether it fits, FLOPs,
collectives, the least time of a call and what it is bound by, work that several
devices do alike, the smallest mesh that fits, and the least time of the run.

  rlhf-jax plan --config=my.py --topology=v5e:2x2 --config.runtime.fsdp=4

Rows have the maximum lengths of config.data: shorter ones are packed, and need
less. TPUs need pip install 'rlhf-jax[plan]', and GPUs 'rlhf-jax[cuda12]'."""


def plan_verb(arguments: list[str]) -> None:
    """Print the plan of an experiment on a machine."""
    parser = Parser("rlhf-jax plan", DESCRIPTION)
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:N", help="machine: v5e:2x2, v5p:4x4x8, v6e:4x4, h100:8, cpu:2"
    )
    parser.add_argument("--stage", metavar="NAME", help="plan this stage only")
    parser.add_argument("--json", action="store_true", help="print one JSON object per stage, and one for the run")
    config, options = parse_config_flags(parser, arguments)
    from rlhf_jax.planning import machines

    machine = machines.machine(options.topology)
    machines.prepare(machine)
    from rlhf_jax import experiment  # jaxlib is started by the imports below
    from rlhf_jax.planning.plans import Planner
    from rlhf_jax.planning.records import record_of, stage_record

    checked = experiment.parse(config)
    if options.stage is not None and options.stage not in checked.stages:
        raise RlhfError(f"--stage={options.stage} is not in config.stages = {tuple(checked.stages)}")
    planner, console = Planner(checked, machine), Console(highlight=False)
    progress, plans = Console(stderr=True, highlight=False), []

    def report(text: str) -> None:
        if progress.is_terminal:
            progress.print(f"{text} ...", style="dim")

    with until_closed():
        for plan in planner.stages(options.stage):
            plans.append(plan)
            found = stage_record(plan, planner)
            console.print(json.dumps(found), soft_wrap=True, markup=False) if options.json else show(found, console)
        if not plans:
            raise RlhfError("no stage of the experiment has a program that can be planned")
        whole = record_of(plans, planner, report)
        console.print(json.dumps(whole), soft_wrap=True, markup=False) if options.json else summarise(whole, console)


def show(stage: dict[str, Json], console: Console) -> None:
    """Print the plan of a stage."""
    counts = [f"{rounded(stage['trained'])} trained parameters"] if stage["trained"] else []
    counts += [f"{rounded(stage['frozen'])} frozen"] if stage["frozen"] else []
    calls = "" if stage["calls"] is None else f", {stage['calls']:,} times"
    console.print(f"[bold]{stage['stage']}[/bold] ({stage['kind']}): {', '.join(counts)}; {stage['rows']} rows{calls}")
    console.print(f"  a row is a {stage['row']}")
    for program in stage["programs"]:
        for line in program_lines(program):
            console.print(f"  {line}", soft_wrap=True)


def program_lines(program: dict[str, Json]) -> list[str]:
    """Describe a program in lines."""
    name, memory = program["program"], program["memory"]
    lines = [f"{name}: {fit_line(program)}"]
    if memory is None:
        return lines
    lines.append(
        f"{' ' * len(name)}  memory: {size(memory['arguments'])} arguments, {size(memory['temporaries'])} "
        f"temporaries, {size(memory['peak'])} at most, {size(memory['extras'])} beside"
    )
    moved = [f"{each['calls']:,} {kind} ({size(each['bytes'])})" for kind, each in program["collectives"].items()]
    lines.append(f"{' ' * len(name)}  work: {program['flops']:.3g} FLOPs; {', '.join(moved) or 'no collectives'}")
    times = ", ".join(f"{1000 * seconds:.3g} ms {resource}" for resource, seconds in program["times"].items())
    lines.append(f"{' ' * len(name)}  least time: {times}: bound by {program['bound']}")
    if program["replicated"]:
        lines.append(
            f"{' ' * len(name)}  replication: all devices together compute {program['replication']:.2f} times the "
            "products of the batch"
        )
    return lines


def fit_line(program: dict[str, Json]) -> str:
    """Say whether a program fits, of how much memory."""
    needed, limit = program["needed"], program["limit"]
    needs = "more than there is" if needed is None else size(needed)
    if limit is None:
        return f"needs {needs}"
    verdict = "fits" if program["fits"] else "[bold]does not fit[/bold]"
    return f"{verdict}: {needs} of {size(limit)} on each device"


def summarise(whole: dict[str, Json], console: Console) -> None:
    """Print the smallest mesh, and the least time of the run."""
    smallest = whole["smallest"]
    if smallest is not None:
        console.print(smallest_line(smallest), soft_wrap=True)
    if whole["unknown"]:
        console.print(f"Time not known, as it depends on earlier stages: {', '.join(whole['unknown'])}.")
    hours = whole["device_hours"]
    console.print(
        f"At least {duration(whole['seconds'])} on {whole['devices']} devices ({hours:.3g} device hours) of "
        f"{whole['topology']}.",
        soft_wrap=True,
    )


def smallest_line(smallest: dict[str, Json]) -> str:
    """Describe the smallest mesh that fits."""
    largest = f"{smallest['stage']} needs {size(smallest['bytes'])} a device by arithmetic"
    if smallest["mesh"] is None:
        return f"No mesh of this machine fits: {largest} on the best one."
    mesh = ", ".join(f"{axis} = {size}" for axis, size in smallest["mesh"].items())
    confirmed = "it was compiled, and fits" if smallest["fits"] else "but compiled, it does not fit"
    return f"Smallest mesh that fits: {mesh}: {largest}; {confirmed}."
