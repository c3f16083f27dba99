"""`rlhf-jax compare`: the settings in which two runs differ, and where their metrics part."""

from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.reports.partings import StageDifferences, compare_stages
from rlhf_jax.reports.run import Run

DESCRIPTION = """\
Compare two work directories, stage by stage: the settings that differ, and the
first step at which a metric differs, with all metrics that differ there. Equal
means the same number, to the last bit. Metrics that depend on the clock are
left out. Of two runs that should be equal, the first stage that parts is where
to look; with the same settings and inputs it may be the machine, the devices
or the versions, which summary.json lists under `provenance`."""


def compare_verb(arguments: list[str]) -> None:
    """Compare the two runs that the arguments name."""
    parser = Parser("rlhf-jax compare", DESCRIPTION)
    parser.add_argument("first", type=Path, metavar="RUN_A", help="work directory of an experiment")
    parser.add_argument("second", type=Path, metavar="RUN_B", help="another one")
    options = parser.parse_args(arguments)
    first, second = Run(options.first), Run(options.second)
    lines = [line for found in compare_stages(first, second) for line in described(found)]
    for run, other in ((first, second), (second, first)):
        lines += [f"{stage}: only in {run.workdir}" for stage in run.stages if stage not in other.stages]
    with until_closed():
        print("\n".join(lines))


def described(found: StageDifferences) -> Iterator[str]:
    """Describe the differences of one stage, in lines."""
    shared, parting = min(found.rows), found.parting
    if parting is not None:
        seed = f", seed {parting.seed}" if parting.seed else ""
        yield f"{found.stage}: metrics part at step {parting.step}{seed}"
    elif max(found.rows) == 0:
        yield f"{found.stage}: no metrics to compare"
    else:
        lengths = "" if found.rows[0] == found.rows[1] else f", of {found.rows[0]} and {found.rows[1]}"
        yield f"{found.stage}: metrics agree in all {shared} rows that both have{lengths}"
    for setting in found.settings:
        yield f"  setting {setting.name}: {setting.first!r} | {setting.second!r}"
    for name, (one, other) in ({} if parting is None else parting.metrics).items():
        yield f"  metric {name}: {one} | {other}"
