"""Curves of the report, as data for `assets/curves.js`: every metric that the stages logged, by kind of stage."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from rlhf_jax.reports import frames
from rlhf_jax.reports.run import Run
from rlhf_jax.stages.kinds import KINDS, Panel, Series, shown_kind
from rlhf_jax.types import Json

NUMBERS, MOST_POINTS, FEWEST_POINTS = 200_000, 1000, 50
"""Number of values that all curves may have together, and the points of one curve at most and at least."""

DIGITS = 5
"""Significant digits of a value in the report."""

HELD_OUT = "eval/"
"""Prefix of metrics on held-out data, which are drawn in the panel of the metric on training data."""

UNDRAWN = {"step", "seed", "time/elapsed"}


class Trained(NamedTuple):
    """One line of each panel: a stage of a run, or the same stage of several runs that differ in their seeds only."""

    label: str
    run: Run
    stage: str
    metrics: pd.DataFrame


def curves(runs: Mapping[str, Run]) -> list[Json]:
    """Curves of all stages with metrics: one group per kind, in the order of the table of kinds.

    Curves with many steps are thinned: a point is then the mean of `every` steps.
    """
    groups = trained_by_kind(runs)
    lines = sum(
        stage.metrics["seed"].nunique() * stage.metrics.shape[1] for group in groups.values() for stage in group
    )
    points = max(FEWEST_POINTS, min(MOST_POINTS, NUMBERS // max(lines, 1)))
    return [_group(name, stages, points) for name, stages in groups.items()]


def trained_by_kind(runs: Mapping[str, Run]) -> dict[str, list[Trained]]:
    """Stages with metrics by their kind; stages that differ in their seeds only are joined."""
    groups: dict[str, dict[str, list[tuple[str, Run, str, pd.DataFrame]]]] = {}
    seen = set()
    for name, run in runs.items():
        for stage in frames.by_strength(run, run.stages):
            directory = run.directory(stage).resolve()  # runs may read a stage from the same --inputs
            if directory in seen or not (directory / "metrics.jsonl").exists():
                continue
            seen.add(directory)
            metrics, config = run.metrics(stage), run.config(stage)
            if metrics.empty:
                continue
            common = {key: value for key, value in config["common"].items() if key not in ("seed", "seeds")}
            same = groups.setdefault(run.kind(stage), {}).setdefault(
                json.dumps([stage, config["section"], common], sort_keys=True), []
            )
            same.append((name, run, stage, metrics))
    order = [*(kind for kind in KINDS if kind in groups), *(kind for kind in groups if kind not in KINDS)]
    return {kind: [*_joined(groups[kind].values(), several=len(runs) > 1)] for kind in order}


def _joined(settings: Iterable[list[tuple[str, Run, str, pd.DataFrame]]], *, several: bool) -> Iterable[Trained]:
    for found in settings:
        seeds = [seed for *_, metrics in found for seed in metrics["seed"].unique()]
        _, run, stage, metrics = found[0]
        label = frames.stage_labels(run, run.stages)[stage]
        label = label if stage.lower() in label.lower() else f"{stage}: {label}"
        if len(found) > 1 and len(seeds) == len(set(seeds)):
            yield Trained(f"{label} · {len(found)} runs", run, stage, pd.concat([metrics for *_, metrics in found]))
            continue
        for name, run, stage, metrics in found:
            yield Trained(f"{label} · {name}" if several else label, run, stage, metrics)


def _group(name: str, stages: list[Trained], points: int) -> Json:
    kind = shown_kind(name)
    columns = sorted({str(column) for stage in stages for column in stage.metrics.columns} - UNDRAWN)
    panels = [panel for panel in (kind.curves if kind is not None else ()) if _columns(panel) & set(columns)]
    shown = {column for panel in panels for column in _columns(panel)}
    rest = dict.fromkeys(column.removeprefix(HELD_OUT) for column in columns if column not in shown)
    charts = [_chart(panel, stages, points) | {"key": True} for panel in panels]
    for column in rest:
        names = ((column, "train"), (f"{HELD_OUT}{column}", "held out"))
        charts.append(
            _chart(Panel(column, "", tuple(Series(*name) for name in names if name[0] in columns)), stages, points)
        )
    lengths = [stage.metrics["step"].nunique() for stage in stages]
    return {
        "kind": name,
        "title": name if kind is None else kind.title or name,
        "caption": "" if kind is None else kind.caption,
        "colour": "grey" if kind is None else kind.colour,
        "step": "step" if kind is None else kind.step,
        "stages": [stage.label for stage in stages],
        "every": max(math.ceil(length / points) for length in lengths),
        "charts": charts,
    }


def _chart(panel: Panel, stages: list[Trained], points: int) -> dict[str, Json]:
    levels = {_level(panel, stage.run.config(stage.stage)["section"]) for stage in stages}
    lines = [
        {"stage": i, "name": series.name, "heldOut": series.column.startswith(HELD_OUT)}
        | ({"colour": colour.colour} if series.kind and (colour := KINDS.get(series.kind)) else {})
        | _line(stage.metrics, series.column, points)
        for i, stage in enumerate(stages)
        for series in panel.series
        if series.column in stage.metrics and stage.metrics[series.column].notna().any()
    ]
    return {
        "title": panel.title,
        "unit": panel.unit,
        "columns": sorted(_columns(panel) & {column for stage in stages for column in stage.metrics.columns}),
        "levels": sorted(level for level in levels if level is not None),
        "lines": lines,
    }


def _line(metrics: pd.DataFrame, column: str, points: int) -> dict[str, Json]:
    """Steps and one list of values per seed, thinned to at most `points` steps."""
    by_seed = metrics.pivot(index="step", columns="seed", values=column).astype(float).dropna(how="all")
    if len(by_seed) > points:
        group = np.arange(len(by_seed)) // math.ceil(len(by_seed) / points)
        steps = by_seed.index.to_series().groupby(group).last()
        by_seed = by_seed.groupby(group).mean().set_axis(steps)
    values = [[rounded(value) for value in by_seed[seed]] for seed in by_seed]
    return {"x": [int(step) for step in by_seed.index], "y": values}


def rounded(value: float | None) -> float | None:
    """Round to the report's significant digits; None for a missing value or one that is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def _columns(panel: Panel) -> set[str]:
    return {series.column for series in panel.series}


def _level(panel: Panel, section: dict[str, Json]) -> float | None:
    return panel.chance(section) if callable(panel.chance) else panel.chance
