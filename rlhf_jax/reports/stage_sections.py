"""Sections of the report about individual stages: wall times, configs and samples."""

from typing import Any

import pandas as pd

from rlhf_jax.reports.markup import as_json, fold, plain, text
from rlhf_jax.reports.run import Run


def stages(run: Run) -> str:
    """Render the table of stages with wall times and summary values, and each config in a fold."""
    rows, configs, total = [], [], 0.0
    for name in run.stages:
        config, complete = run.config(name), run.is_complete(name)
        summary = run.summary(name) if complete else {}
        seconds = summary.get("time/seconds")
        total += seconds or 0.0
        common = config["common"]
        last = common["seed"] + common.get("seeds", 1) - 1
        seeds = f"{common['seed']}" if last == common["seed"] else f"{common['seed']}–{last}"
        wall = "not complete" if seconds is None else f"{seconds:.0f} s"
        facts = ", ".join(
            f"{key.replace('_', ' ')} {plain(value)}" for key, value in summary.items() if _is_fact(key, value)
        )
        cells = f"<td>{text(config['section']['kind'])}</td><td>{seeds}</td><td>{wall}</td>"
        rows.append(f'<tr><th>{text(name)}</th>{cells}<td class="text">{text(facts)}</td></tr>')
        configs.append(fold(name, config["section"]["kind"], as_json(config)))
    return (
        '<section id="stages"><h2>Stages, times and configs</h2><div class="scroll"><table><thead><tr><th>stage</th>'
        "<th>kind</th><th>seed</th><th>wall time</th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="note">{total:.0f} s in total.</p><h3>Configs</h3>{"".join(configs)}</section>'
    )


def stage_samples(run: Run) -> str:
    """Render the last samples of each stage in folds."""
    folds = []
    for name in run.stages:
        if run.kind(name) == "evaluate" or not (run.directory(name) / "samples.jsonl").exists():
            continue
        samples = run.samples(name)
        if len(samples):
            last = samples[samples["step"] == samples["step"].max()].head(12)
            detail = "best of n =" if run.kind(name) == "best_of_n" else "at step"
            folds.append(fold(name, f"{detail} {last['step'].iloc[0]}", _samples(last)))
    return f'<section id="samples"><h2>Samples of each stage</h2>{"".join(folds)}</section>' if folds else ""


def _samples(rows: pd.DataFrame) -> str:
    body = []
    for _, row in rows.iterrows():
        numbers = "".join(f"<td>{plain(row[name])}</td>" for name in ("score", "kl", "length"))
        prompt = f'<span class="prompt">{text(row["prompt"])}</span>'
        body.append(f'<tr><td class="text">{prompt}{text(row["completion"])}</td>{numbers}</tr>')
    head = "<th>prompt and completion</th><th>score</th><th>KL, nats</th><th>tokens</th>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _is_fact(key: str, value: Any) -> bool:
    return not key.startswith("time/") and isinstance(value, (int, float, str))
