"""Section of the report about the time that stages took, with the other numbers of their summaries."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from rlhf_jax.reports.markup import fold, plain, table_of, text
from rlhf_jax.reports.run import Run

HEADINGS = ("stage", "kind", "seed", "wall time", "steps", "s per step", "tokens per s", "share of tokens")


def stages(run: Run) -> str:
    """Render the table of stages with wall times, rates (medians over the training) and summary values."""
    rows, facts, total = [], {}, 0.0
    for name in run.stages:
        config, complete = run.config(name), run.is_complete(name)
        summary = run.summary(name) if complete else {}
        seconds = summary.get("time/seconds")
        total += seconds or 0.0
        common = config["common"]
        last = common["seed"] + common.get("seeds", 1) - 1
        seeds = f"{common['seed']}" if last == common["seed"] else f"{common['seed']}–{last}"
        wall = "not complete" if seconds is None else f"{seconds:.0f} s"
        facts[name] = ", ".join(
            f"{text(key.replace('_', ' '))} {plain(value)}" for key, value in summary.items() if _is_fact(key, value)
        )
        rows.append([name, config["section"]["kind"], seeds, wall, *_rates(run, name)])
    note = (
        f"{total:.0f} s in total. Rates are medians over the training, of all seeds together. Share of tokens: the "
        "part of a batch's positions that is not padding."
    )
    items = "".join(f"<dt>{text(name)}</dt><dd>{fact}</dd>" for name, fact in facts.items() if fact)
    summaries = (
        fold("Summaries of the stages", "sizes, selections and accuracies", f"<dl>{items}</dl>") if items else ""
    )
    return f'{table_of(HEADINGS, rows)}<p class="note">{note}</p>{summaries}' if rows else ""


def _rates(run: Run, stage: str) -> list[str]:
    """Steps, and medians of seconds per step, tokens per second and the share of tokens; dashes if not logged."""
    logged = (run.directory(stage) / "metrics.jsonl").exists()
    metrics = run.metrics(stage) if logged else pd.DataFrame()
    columns: list[tuple[str, Callable[[pd.Series], str]]] = [
        ("step", lambda values: f"{values.max():.0f}"),
        ("time/seconds_per_step", lambda values: f"{values.median():.3g}"),
        ("time/tokens_per_second", lambda values: f"{values.median():,.0f}"),
        ("token_share", lambda values: f"{values.median():.0%}"),
    ]
    return [
        write(metrics[name].dropna()) if name in metrics and metrics[name].notna().any() else "–"
        for name, write in columns
    ]


def _is_fact(key: str, value: Any) -> bool:
    return not key.startswith("time/") and isinstance(value, (int, float, str))
