"""Charts of the report, as data: marks, axes and captions. `assets/charts.js` draws them with uPlot."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from rlhf_jax.reports import frames
from rlhf_jax.reports.curve_data import rounded
from rlhf_jax.reports.run import Run
from rlhf_jax.stages.kinds import Colour
from rlhf_jax.types import Json

CYCLE: tuple[Colour, ...] = ("grey", "green", "blue", "amber", "sky", "violet", "orange", "pink", "brown")
"""Colours that distinguish methods of one kind."""

BINS = 5
"""Groups of equal size in which the mean score is shown against length."""

MOST_DOTS = 300
"""Answers per method that are drawn one by one."""


class Mark(NamedTuple):
    """A series of a chart: points, a line, a band between `low` and `high`, or steps of a histogram."""

    label: str
    colour: Colour
    kind: Literal["points", "dots", "line", "band", "steps"]
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    left: Sequence[float] | None = None
    right: Sequence[float] | None = None
    name: str = ""  # direct label, at the last point
    dashed: bool = False
    notes: Sequence[str] | None = None  # shown for each point under the cursor

    def data(self) -> dict[str, Json]:
        """Encode without the empty fields, with rounded numbers."""
        fields = {key: value for key, value in self._asdict().items() if value not in (None, "", False)}
        numbers = ("x", "y", "low", "high", "left", "right")
        return {k: [rounded(float(v)) for v in value] if k in numbers else value for k, value in fields.items()}


class Axis(NamedTuple):
    """Label and scale of an axis."""

    label: str
    scale: Literal["linear", "root"] = "linear"


def chart(marks: Iterable[Mark], x: Axis, y: Axis) -> dict[str, Json]:
    """Encode a chart."""
    return {"x": x._asdict(), "y": y._asdict(), "marks": [mark.data() for mark in marks]}


def frontier(runs: Mapping[str, Run]) -> dict[str, Json] | None:
    """Score against KL of every evaluated method, and Best-of-N for every n; None without an evaluation.

    Best-of-N was measured on other prompts. Its curve is shifted so that n = 1 is at the reference's score.
    """
    marks: list[Mark] = []
    scores, starts = [], []
    for name, run in runs.items():
        if not run.of_kind("evaluate", complete=True):
            continue
        results = frames.comparison(run)
        gold = frames.judged_by_gold(results)
        scores.append(frames.compared_score(run) if gold else "score of the reward model")
        starts.append(results.loc[results["reference"], "label"].iloc[0])
        curve = frames.best_of_n_points(run, gold=gold)
        tag = f" · {name}" if len(runs) > 1 else ""
        if curve is not None:
            marks += _curve_with_band(curve, f"Best-of-N{tag}")
        dpo = results[results["kind"] == "dpo"].groupby("label", sort=False)[["kl", "score"]].mean()
        if len(dpo) > 1:
            marks.append(Mark(f"DPO in the order of β{tag}", "blue", "line", [*dpo["kl"]], [*dpo["score"]]))
        for label, rows in results.groupby("label", sort=False):
            marks += _method(f"{label}{tag}", rows, frames.colour_of(run, rows["method"].iloc[0]))
    if not marks:
        return None
    x = Axis(f"KL from {' or '.join(dict.fromkeys(starts))}, nats per response (square-root scale)", "root")
    return chart(marks, x, Axis(" or ".join(dict.fromkeys(scores))))


def _method(label: str, rows: pd.DataFrame, colour: Colour) -> list[Mark]:
    x, y = rows["kl"].to_numpy(float), rows["score"].to_numpy(float)
    if len(rows) == 1:
        return [_with_errors(label, colour, x, y, rows["kl_se"].to_numpy(float), rows["score_se"].to_numpy(float))]
    errors = [np.array([values.std(ddof=1) / len(values) ** 0.5]) for values in (x, y)]
    seeds = [f"seed {seed}" for seed in rows["seed"]]
    return [
        Mark(f"{label}, seeds", colour, "dots", [*x], [*y], notes=seeds),
        _with_errors(label, colour, np.array([x.mean()]), np.array([y.mean()]), *errors),
    ]


def _with_errors(
    label: str, colour: Colour, x: np.ndarray, y: np.ndarray, x_error: np.ndarray, y_error: np.ndarray
) -> Mark:
    left, right, low, high = ([*side] for side in (x - x_error, x + x_error, y - y_error, y + y_error))
    return Mark(label, colour, "points", [*x], [*y], low, high, left, right, name=label)


def _curve_with_band(curve: pd.DataFrame, label: str) -> list[Mark]:
    x, y, error = (curve[column].to_numpy(float) for column in ("kl", "score", "score_se"))
    sizes = [f"n = {n}" for n in curve["n"]]
    last = label.replace("-of-N", f" of {curve['n'].iloc[-1]}")
    return [
        Mark(label, "green", "band", [*x], [*y], low=[*(y - error)], high=[*(y + error)]),
        Mark(label, "green", "line", [*x], [*y], name=last, notes=sizes),
    ]


def best_of_n(run: Run) -> dict[str, Json] | None:
    """Gain over n = 1 in the reward model's and the judge's score, against the KL; None without a Best-of-N stage.

    Both are in standard deviations over the reference's answers, if an evaluation measured these.
    """
    stages = run.of_kind("best_of_n", complete=True)
    if not stages:
        return None
    curve, deviations = run.best_of_n_curve(stages[-1]), frames.sft_deviations(run)
    judge = run.config(stages[-1])["section"].get("judge")
    named: list[tuple[str, str, Colour]] = [("proxy", "reward model", "pink")]
    if curve["gold"].notna().any():
        named.append(("gold", "judge" if judge is None else frames.judge_name(run, judge), "amber"))
    marks = []
    for i, (column, label, colour) in enumerate(named):
        scale = deviations[i] if deviations is not None else 1.0
        y, error = (curve[column] - curve[column].iloc[0]) / scale, curve[f"{column}_se"] / scale
        x, sizes = [*curve["kl"]], [f"n = {n}" for n in curve["n"]]
        marks.append(Mark(label, colour, "band", x, [*y], low=[*(y - error)], high=[*(y + error)]))
        marks.append(Mark(label, colour, "line", x, [*y], name=label, notes=sizes))
    unit = "deviations of the reference" if deviations is not None else "score"
    return chart(marks, Axis("KL, nats (square-root scale)", "root"), Axis(f"gain over n = 1, {unit}"))


def calibration(run: Run) -> dict[str, dict[str, Json]]:
    """Reliability diagram and histogram of the scores of the last reward model; empty if it has not recorded them."""
    report = frames.calibration_of(run)
    if report is None:
        return {}
    rows = pd.DataFrame(report["reliability"]) * 100
    reliability = [
        Mark("perfect calibration", "grey", "line", [50, 100], [50, 100], dashed=True),
        Mark(
            "reward model, with Wilson's 95 % intervals",
            "pink",
            "points",
            [*rows["confidence"]],
            [*rows["accuracy"]],
            low=[*rows["low"]],
            high=[*rows["high"]],
            notes=[f"{row['n']} pairs" for row in report["reliability"]],
        ),
    ]
    edges = report["scores"]["edges"]
    histogram = [
        Mark(name, colour, "steps", edges, [*report["scores"][name], 0], name=name)
        for name, colour in (("chosen", "pink"), ("rejected", "grey"))
    ]
    return {
        "reliability": chart(
            reliability, Axis("predicted probability of the preferred response, %"), Axis("ranked correctly, %")
        ),
        "scores": chart(histogram, Axis("score"), Axis("responses")),
    }


def lengths(run: Run) -> dict[str, Json] | None:
    """Score of each answer against its length, with means over groups of equal size; None without an evaluation."""
    if not run.of_kind("evaluate", complete=True):
        return None
    results, answers = frames.comparison(run), run.samples(run.evaluation())
    column = "gold" if frames.judged_by_gold(results) else "score"
    marks, dots = [], []
    methods = results.drop_duplicates("method")[["method", "label"]].itertuples(index=False)
    for (method, label), colour in zip(methods, itertools.cycle(CYCLE)):
        table = answers[answers["method"] == method][["length", column]].astype(float).dropna()
        if table.empty:
            continue
        some = table.iloc[:: max(1, len(table) // MOST_DOTS)]
        dots.append(Mark(f"{label}, answers", colour, "dots", [*some["length"]], [*some[column]]))
        group = (table["length"].rank(method="first") - 1) // max(1, len(table) / BINS)
        grouped = table.groupby(group)
        mean, error = grouped.mean(), grouped[column].sem()
        x, y = mean["length"].to_numpy(), mean[column].to_numpy()
        marks += [
            Mark(label, colour, "line", [*x], [*y]),
            Mark(label, colour, "points", [*x], [*y], [*(y - error)], [*(y + error)], name=label),
        ]
    return chart([*dots, *marks], Axis("length, tokens"), Axis(f"{column.replace('score', 'reward')} score"))


def checkpoints(run: Run) -> dict[str, Json] | None:
    """Score against KL at every checkpoint that a frontier stage measured, one line per method and seed."""
    stages = run.of_kind("frontier", complete=True)
    if not stages:
        return None
    points, score = run.points(stages[-1]), frames.frontier_score(run, stages[-1])
    start = points["method"].iloc[0]
    first = points[points["method"] == start].iloc[0]
    marks = []
    for (method, seed), rows in points[points["method"] != start].groupby(["method", "seed"], sort=False):
        rows = rows.sort_values("step")
        x, y = [0.0, *rows["kl"].clip(lower=0)], [first["gold"], *rows["gold"]]
        steps = [str(start), *(f"step {step}, seed {seed}" for step in rows["step"])]
        name = str(method) if seed == points.loc[points["method"] == method, "seed"].min() else ""
        marks.append(
            Mark(f"{method}, seed {seed}", frames.colour_of(run, method), "line", x, y, name=name, notes=steps)
        )
    return chart(marks, Axis(f"KL from {start}, nats per response (square-root scale)", "root"), Axis(score))


def all_charts(runs: Mapping[str, Run]) -> dict[str, Any]:
    """All charts by the id of their figures; those of one run carry its number."""
    drawn: dict[str, Any] = {"frontier": frontier(runs)}
    for i, run in enumerate(runs.values()):
        drawn |= {f"checkpoints-{i}": checkpoints(run), f"best-of-n-{i}": best_of_n(run), f"lengths-{i}": lengths(run)}
        drawn |= {f"{name}-{i}": data for name, data in calibration(run).items()}
    return {name: data for name, data in drawn.items() if data is not None}
