"""Run papers over seeds, recompute verdicts from their results, and list them."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import pandas as pd
from rich.console import Console
from rich.table import Table

from rlhf_jax.papers.claims import LEVEL, Outcome, judge
from rlhf_jax.papers.suite import (
    FIGURE,
    RECORD,
    VERDICTS,
    Paper,
    Question,
    Scale,
    load_paper,
    names,
    read_results,
    results_directory,
    scale_of,
)
from rlhf_jax.papers.training import stages_record
from rlhf_jax.reports import style
from rlhf_jax.runtime import provenance
from rlhf_jax.runtime.files import measured, read_json, write_json, write_text
from rlhf_jax.types import Json, RlhfError


class Judged(NamedTuple):
    """The outcome of a claim, and the paper that it is from."""

    paper: str
    outcome: Outcome


def reproduce(name: str, scale: str, seeds: int | None, workdir: Path, console: Console) -> list[Judged]:
    """Measure the seeds that have no results in `workdir`, and write tables, record, figure and verdicts there.

    Args: seeds is the number of seeds (None: the scale's own). Raises RlhfError if the results in `workdir` were
    measured with other settings.
    """
    paper = load_paper(name)
    settings = scale_of(paper, scale)
    wanted = range(settings.seeds if seeds is None else seeds)
    missing = [seed for seed in wanted if not (workdir / f"seed_{seed}.csv").exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    record = _record(paper, scale, settings, workdir)
    if missing:
        console.print(f"{name}: {len(missing)} of {len(wanted)} seeds to measure at scale {scale} ({settings.cost})")
    for seed in missing:  # each is kept as soon as it is measured
        begun = time.monotonic()
        rows = paper.measure(scale, [seed], workdir / "work")
        record["seconds"] = measured(record["seconds"] + round(time.monotonic() - begun, 1))
        if stages := stages_record(workdir / "work"):
            record["stages"] = stages
        write_json(workdir / RECORD, record)
        write_text(workdir / f"seed_{seed}.csv", rows.to_csv(index=False))
    return write_verdicts(name, workdir, console)


def check(name: str, console: Console) -> None:
    """Recompute the verdicts and the figure of a paper from the results that come with the package.

    Raises RlhfError if a verdict, a statistic or the settings differ from the files.
    """
    paper = load_paper(name)
    for scale, settings in paper.scales.items():
        directory = results_directory(name, scale)
        table = read_results(directory)
        if table is None:
            continue
        record = read_json(directory / RECORD)
        if record["settings"] != dict(settings.settings):
            raise RlhfError(f"{directory / RECORD}: the settings differ from those of paper.py: measure again")
        with style.context():
            style.fix_layout(paper.draw(table))
        found, kept = [verdict_row(outcome) for outcome in verdicts(name, table)], read_json(directory / VERDICTS)
        if found != kept:
            raise RlhfError(
                f"{directory / VERDICTS}: the results give other verdicts: run rlhf-jax reproduce {name} again"
            )
        console.print(f"{name} ({scale}): {len(found)} verdicts and the figure agree with the results")


def write_verdicts(name: str, directory: Path, console: Console) -> list[Judged]:
    """Draw the figure, and write and print the verdicts, from the results in a directory."""
    paper, table = load_paper(name), read_results(directory)
    if table is None:
        raise RlhfError(f"{directory} has no results: run rlhf-jax reproduce {name}")
    with style.context():
        figure = paper.draw(table)
        style.fix_layout(figure)
        figure.savefig(directory / FIGURE, dpi=110)
    outcomes = verdicts(name, table)
    write_json(directory / VERDICTS, [verdict_row(outcome) for outcome in outcomes])
    judged = [Judged(name, outcome) for outcome in outcomes]
    print_verdicts(judged, console)
    console.print(f"Figure: {directory / FIGURE}", soft_wrap=True)
    return judged


def verdicts(name: str, table: pd.DataFrame) -> list[Outcome]:
    """Give the verdicts on a paper's claims, among all claims of its question.

    Args: table has the paper's results; those of other papers are the ones that come with the package.
    """
    question = load_paper(name).question
    return _outcomes({other: table if other == name else _results(other) for other in _of_question(question)})[name]


def overview() -> list[dict[str, Json]]:
    """List every paper's claims with the paper's number, verdict, interval, power, cost, date and commit, for JSON."""
    tables = {name: _results(name) for name in names()}
    outcomes: dict[str, list[Outcome]] = {}
    for question in get_args(Question):
        outcomes |= _outcomes({name: tables[name] for name in _of_question(question)})
    rows = []
    for name, table in tables.items():
        paper = load_paper(name)
        scale = next(iter(paper.scales))
        record = {} if table is None else read_json(results_directory(name, scale) / RECORD)
        for outcome in outcomes[name]:
            row = {"paper": name, "title": paper.title, "source": paper.source, "question": paper.question}
            row |= {"figure": paper.figure, "statement": outcome.claim.statement, "number": outcome.claim.number}
            rows.append(
                {
                    **row,
                    **verdict_row(outcome),
                    "scale": scale,
                    "cost": paper.scales[scale].cost,
                    "seeds": 0 if table is None else int(table["seed"].nunique()),
                    "seconds": record.get("seconds"),
                    "date": record.get("environment", {}).get("date"),
                    "commit": record.get("environment", {}).get("source", {}).get("commit"),
                }
            )
    return rows


def verdict_row(outcome: Outcome) -> dict[str, Json]:
    """Convert an outcome to JSON values, rounded to six digits, so that they agree between machines."""
    numbers = {"statistic": outcome.mean, "low": outcome.low, "high": outcome.high, "p": outcome.p}
    return {
        "claim": outcome.claim.name,
        "verdict": outcome.verdict,
        "criterion": str(outcome.claim.criterion),
        "unit": outcome.claim.unit,
        "units": outcome.units,
        **{name: _rounded(value) for name, value in numbers.items()},
        "smallest_effect": _rounded(outcome.smallest),
    }


def print_verdicts(judged: Sequence[Judged], console: Console) -> None:
    """Print a line for each claim: verdict, statistic with interval, criterion and the paper's number."""
    table = Table(box=None, pad_edge=False)
    for heading in ("claim", "verdict", f"statistic [{1 - LEVEL:.0%}]", "criterion", "paper"):
        table.add_column(heading)
    for _, outcome in judged:
        claim = outcome.claim
        statistic = "" if outcome.units == 0 else f"{outcome.mean:.3g}"
        if not math.isnan(outcome.low):
            statistic += f" [{outcome.low:.3g}, {outcome.high:.3g}]"
        table.add_row(claim.name, outcome.verdict, statistic, str(claim.criterion), claim.number)
    console.print(table)


def _record(paper: Paper, scale: str, settings: Scale, workdir: Path) -> dict[str, Json]:
    """Read the record of the run in `workdir`, or begin a new one. Raises RlhfError for one with other settings."""
    if not (workdir / RECORD).exists():
        return {
            "paper": paper.source,
            "scale": scale,
            "settings": dict(settings.settings),
            "environment": provenance.environment(),
            "seconds": 0.0,
        }
    record = read_json(workdir / RECORD)
    if (record["scale"], record["settings"]) != (scale, dict(settings.settings)):
        raise RlhfError(f"{workdir} has results with other settings or of another scale: choose another --workdir")
    return record


def _of_question(question: Question) -> list[str]:
    return [name for name in names() if load_paper(name).question == question]


def _results(name: str) -> pd.DataFrame | None:
    return read_results(results_directory(name, next(iter(load_paper(name).scales))))


def _outcomes(tables: Mapping[str, pd.DataFrame | None]) -> dict[str, list[Outcome]]:
    """Judge the claims of all papers of one question together, and return the outcomes by paper."""
    family = [(name, claim) for name in tables for claim in load_paper(name).claims]
    found: dict[str, list[Outcome]] = {name: [] for name in tables}
    for (name, _), outcome in zip(family, judge([(claim, tables[name]) for name, claim in family]), strict=True):
        found[name].append(outcome)
    return found


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")
