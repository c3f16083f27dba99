"""Differences between two work directories: settings, and the first step and metric at which each stage parts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_rows
from rlhf_jax.runtime.workdir import flatten
from rlhf_jax.types import Json, RlhfError, Row

CLOCK = "time/"
"""Prefix of metrics that depend on the clock, which are not compared."""


class DifferentSetting(NamedTuple):
    """A setting that two runs of a stage do not share; None where a run lacks it."""

    name: str
    first: Json
    second: Json


class Parting(NamedTuple):
    """First row of metrics in which two runs of a stage differ."""

    step: int
    seed: int
    metrics: dict[str, tuple[Json, Json]]  # those that differ, in the file's order, with both values


class StageDifferences(NamedTuple):
    """Differences between two runs of a stage."""

    stage: str
    settings: list[DifferentSetting]
    rows: tuple[int, int]  # rows of metrics in each run
    parting: Parting | None  # None: all rows that both runs have are equal


def compare_stages(first: Run, second: Run) -> Iterator[StageDifferences]:
    """Compare the stages that both runs have, in the order of the first.

    Raises: RlhfError if a run has no stages, or metrics that cannot be read.
    """
    for run in (first, second):
        if not run.stages:
            raise RlhfError(f"{run.workdir} has no stages: give the --workdir of an experiment")
    for stage in first.stages:
        if stage in second.stages:
            rows = [_metrics(run, stage) for run in (first, second)]
            settings = _settings(first.config(stage), second.config(stage))
            yield StageDifferences(stage, settings, (len(rows[0]), len(rows[1])), _parting(*rows))


def _settings(first: dict[str, Any], second: dict[str, Any]) -> list[DifferentSetting]:
    flat, other = flatten(first), flatten(second)
    names = [*flat, *(name for name in other if name not in flat)]
    found = (DifferentSetting(name, flat.get(name), other.get(name)) for name in names)
    return [setting for setting in found if setting.first != setting.second]


def _metrics(run: Run, stage: str) -> dict[tuple[int, int], Row]:
    """Read the metrics of a stage by step and seed; none if it does not train."""
    file = run.directory(stage) / "metrics.jsonl"
    found: dict[tuple[int, int], Row] = {}
    try:
        for row in read_rows(file):
            found.setdefault((row["step"], row["seed"]), {}).update(row)
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise RlhfError(f"{file} is damaged ({error}): run the stage again") from error


def _parting(first: dict[tuple[int, int], Row], second: dict[tuple[int, int], Row]) -> Parting | None:
    for step, seed in sorted(first.keys() & second.keys()):
        row, other = first[step, seed], second[step, seed]
        names = [name for name in {**row, **other} if not name.startswith(CLOCK)]
        differing = {name: (row.get(name), other.get(name)) for name in names if row.get(name) != other.get(name)}
        if differing:
            return Parting(step, seed, differing)
    return None
