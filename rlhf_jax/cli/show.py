"""`rlhf-jax show DIR/STAGE`: a stage's config, inputs, metrics and last samples."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.cli.status import stage_status
from rlhf_jax.runtime.files import read_json, read_rows
from rlhf_jax.runtime.progress import printable
from rlhf_jax.runtime.workdir import flatten
from rlhf_jax.types import Json, RlhfError, Row

DESCRIPTION = """\
Show a stage: its status, its config with all defaults, what it reads, its
metrics at the first and the last step, and its last samples. Directories of
running stages can be shown too."""

SAMPLES = 5


def show_verb(arguments: list[str]) -> None:
    """Print what is known about a stage."""
    parser = Parser("rlhf-jax show", DESCRIPTION)
    parser.add_argument("stage", type=Path, metavar="DIR/STAGE", help="directory of a stage, in a work directory")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"samples (default {SAMPLES})")
    options = parser.parse_args(arguments)
    directory = options.stage
    if not (directory / "config.json").exists():
        known = ", ".join(sorted(file.parent.name for file in directory.parent.glob("*/config.json"))) or "none"
        raise RlhfError(f"{directory} is not the directory of a stage; the stages of {directory.parent}: {known}")
    console = Console(highlight=False)
    with until_closed():
        for part in _parts(directory, options.samples):
            console.print(part)


def _parts(directory: Path, samples: int) -> Iterator[RenderableType]:
    config = read_json(directory / "config.json")
    status = stage_status(directory)
    yield _heading(f"{directory.name} ({config['section']['kind']})")
    steps = status.steps and f"{status.steps} steps"
    yield Text(", ".join(filter(None, (status.state, steps, status.time, status.detail))))
    yield from _section("Config", flatten(config["section"]))
    yield from _section("Shared config", flatten(config["common"]))
    yield from _section("Inputs", config["inputs"])
    data = directory / "data.json"
    if data.exists() and (sentences := [*_sentences(read_json(data))]):
        yield _heading("Data")
        yield from map(Text, sentences)
    if metrics := read_rows(directory / "metrics.jsonl"):
        yield _heading("Metrics")
        yield _metrics(metrics)
    elif (directory / "summary.json").exists():
        yield from _section("Summary", flatten(_without_provenance(read_json(directory / "summary.json"))))
    if rows := read_rows(directory / "samples.jsonl")[-samples:] if samples else []:
        yield _heading("Last samples")
        yield from map(_sample, rows)


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _section(title: str, values: Mapping[str, Json]) -> Iterator[RenderableType]:
    if values:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for name, value in values.items():
            table.add_row(name, Text(_plain(value)))
        yield _heading(title)
        yield table


def _sentences(report: Mapping[str, Json]) -> Iterator[str]:
    yield from report.get("notes", [])
    yield from (f"Warning: {warning}" for warning in report["warnings"])


def _metrics(rows: Sequence[Row]) -> Table:
    """Tabulate the first and the last value of each metric, of the first seed."""
    seed = rows[0].get("seed")
    own = [row for row in rows if row.get("seed") == seed]
    table = Table(box=None, pad_edge=False)
    table.add_column(f"of {own[-1]['step']} steps{'' if len(own) == len(rows) else f', seed {seed}'}", overflow="fold")
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")
    for name in dict.fromkeys(name for row in own for name in row):
        values = [row[name] for row in own if row.get(name) is not None]
        if name not in ("step", "seed") and values:
            table.add_row(name, _plain(values[0]), _plain(values[-1]))
    return table


def _sample(row: Row) -> Text:
    score = "" if row.get("score") is None else f" [{row['score']:.3g}]"
    text = Text(f"step {row['step']}{score}  ")
    return text.append(printable(row["prompt"]), style="dim").append(printable(row["completion"]))


def _without_provenance(summary: Mapping[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in summary.items() if name != "provenance"}


def _plain(value: Json) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
