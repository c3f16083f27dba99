"""Report files at the root of a work directory: *.csv tables, figures/*.png and report.html."""

import io
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from rlhf_jax.reports import figures, frames, html, matched, reward_figures, table
from rlhf_jax.reports.cautions import cautions
from rlhf_jax.reports.differences import at_equal_kl, differences
from rlhf_jax.reports.run import Run
from rlhf_jax.reports.snapshot import Snapshot
from rlhf_jax.reports.style import context
from rlhf_jax.runtime.files import write_bytes, write_text

REPORT, RESULTS, WIN_RATES, MATCHED = "report.html", "results.csv", "win_rates.csv", "matched.csv"
DIFFERENCES, MATCHED_DIFFERENCES = "differences.csv", "matched_differences.csv"
FIGURES = "figures"
MOST_CURVES = 8
"""Maximum number of stages of one kind in a figure of learning curves."""

PNG_DPI = 200
"""Twice the figures' resolution: 1,400 pixels wide."""


def write_report(workdir: str | Path, inputs: str | Path | None = None) -> Path:
    """Write tables (*.csv), figures/*.png and finally report.html, and return its path.

    Each file is written atomically. Incomplete stages are shown too.
    """
    run = Snapshot(Run(workdir, inputs))
    if run.of_kind("evaluate", complete=True):
        table.write_csv(run.results(), run.workdir / RESULTS)
        _write_csv(differences(run), run.workdir / DIFFERENCES)
        if table.opponents(run):
            _write_csv(run.win_rates(), run.workdir / WIN_RATES)
    for stage in run.of_kind("frontier", complete=True)[-1:]:
        _write_csv(run.matched(stage), run.workdir / MATCHED)
        _write_csv(at_equal_kl(run.at_kl(stage)), run.workdir / MATCHED_DIFFERENCES)
    drawn = draw(run)
    if drawn:
        (run.workdir / FIGURES).mkdir(exist_ok=True)
    for name, figure in drawn.items():
        write_png(figure, run.workdir / FIGURES / f"{name}.png")
    html.write_page([run], run.workdir / REPORT)
    return run.workdir / REPORT


def is_current(workdir: str | Path, inputs: str | Path | None = None) -> bool:
    """Return whether report.html, which is written last, exists and is of all complete stages."""
    run = Snapshot(Run(workdir, inputs))
    report = run.workdir / REPORT
    evaluated = bool(run.of_kind("evaluate", complete=True))
    if not report.exists() or (evaluated and not (run.workdir / RESULTS).exists()):
        return False
    return report.read_text(encoding="utf-8").endswith(html.mark([run]))


def print_summary(run: Run, console: Console) -> None:
    """Print cautions, the frontier table, example answers and the results table, as far as the stages exist."""
    run = Snapshot(run)
    for sentence in cautions(run):
        console.print(Text(f"Caution: {sentence}", style="bold yellow"))
    for stage in run.of_kind("frontier", complete=True)[-1:]:
        for part in matched.matched_tables(run.matched(stage), frames.frontier_score(run, stage), console.width):
            console.print(part, highlight=False)
    if not run.of_kind("evaluate", complete=True):
        if run.of_kind("frontier", complete=True):
            return
        complete = ", ".join(name for name in run.stages if run.is_complete(name)) or "none"
        console.print(f"There is no evaluation yet; complete stages: {complete}", highlight=False)
        return
    console.print(table.answers_table(run), highlight=False)
    for shown in table.tables(run, console.width):
        console.print(shown, highlight=False)


def draw(run: Run) -> dict[str, Figure]:
    """Draw every figure for which the run has data, by file name, in the order of the report."""
    run = Snapshot(run)
    drawn: dict[str, Figure] = {}
    if run.of_kind("evaluate", complete=True):
        drawn |= _comparisons(run)
    for stage in run.of_kind("best_of_n", complete=True)[-1:]:
        judge = run.config(stage)["section"].get("judge")
        name = "" if judge is None else frames.judge_name(run, judge)
        drawn["best_of_n"] = figures.best_of_n(run.best_of_n_curve(stage), frames.sft_deviations(run), judge=name)
    for stage in run.of_kind("frontier", complete=True)[-1:]:
        points, at_kl = run.points(stage), run.matched(stage)
        kinds = {method: run.kind(method) for method in at_kl["method"].unique()}
        score = frames.frontier_score(run, stage)
        drawn["runs"] = matched.runs(points, kinds, points["method"].iloc[0], score)
        drawn["equal_kl"] = matched.ranking(at_kl, kinds, score)
    if (report := frames.calibration_of(run)) is not None:
        drawn["reward_calibration"] = reward_figures.calibration(report)
        drawn["reward_accuracy"] = reward_figures.accuracy(report)
    for name, kind in frames.learning_kinds(run).items():
        tables = frames.curves(run, name)
        if 0 < len(tables) <= MOST_CURVES:
            drawn[frames.learning_figure(name)] = figures.learning_curves(kind, tables)
    return drawn


def _comparisons(run: Run) -> dict[str, Figure]:
    results = frames.comparison(run)
    gold = frames.judged_by_gold(results)
    start = results.loc[results["reference"], "label"].iloc[0]
    drawn = {
        "frontier": figures.frontier(
            results,
            frames.best_of_n_points(run, gold=gold),
            score=frames.compared_score(run) if gold else "score of the reward model",
            start=start,
        )
    }
    others = results[~results["reference"]]
    if len(others):
        drawn["win_rates"] = figures.win_rates(others, judge=frames.judge_of(run), start=start)
    return drawn


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure atomically."""
    content, dpi = io.BytesIO(), figure.dpi
    with context():
        figure.dpi = PNG_DPI
        FigureCanvasAgg(figure).print_png(content)  # savefig draws twice, for layouts that change while drawing
        figure.dpi = dpi
    write_bytes(path, content.getvalue())
