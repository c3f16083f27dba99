"""The results as a table: `results.csv`, and what the terminal shows when an experiment has ended."""

import math
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from rlhf_jax.reports import frames
from rlhf_jax.reports.run import RESULT_COLUMNS, Run
from rlhf_jax.runtime.files import write_text

CHOSEN = "*"


class Column(NamedTuple):
    """A column of the table for readers: its heading, what it means, and the result that it shows."""

    name: str
    heading: str
    meaning: str
    digits: int
    error: str | None = None  # the column with its standard error
    spread: bool = True  # whether the deviation over seeds is shown


COLUMNS = (
    Column("gold_score", "gold", "the judge's rating of the answers, mean ± standard error over prompts", 2, "gold_se"),
    Column(
        "win_rate",
        "wins, %",
        "pairs won against the first row's answer to the same prompt, ties half [Wilson's 95 % interval]",
        0,
    ),
    Column("reward_score", "reward", "the reward model's score: what Best-of-N and PPO were told to raise", 2),
    Column(
        "kl",
        "KL, nats",
        "divergence from the first row: mean log-ratio of the answers; of Best-of-N, its upper bound",
        2,
        "kl_se",
    ),
    Column("length", "length", "tokens a response, its end included", 1),
    Column("vader", "VADER", "sentiment by a lexicon that nothing was trained on, −1 to 1", 2, spread=False),
    Column(
        "distinct_2", "dist-2", "distinct pairs of words over all pairs of words; 1 is no repetition", 2, spread=False
    ),
    Column("seconds", "s", "wall time of the method's own stage, in seconds", 0, spread=False),
)


def write_csv(results: pd.DataFrame, path: Path) -> None:
    """Writes the results, whole or not at all, with RESULT_COLUMNS in their order; what was not measured is empty."""
    write_text(path, results[list(RESULT_COLUMNS)].to_csv(index=False, lineterminator="\n"))


def columns(run: Run) -> list[Column]:
    """COLUMNS, without those that nothing was measured for."""
    results = run.results()
    return [column for column in COLUMNS if results[column.name].notna().any()]


def cells(run: Run) -> list[list[str]]:
    """The table's body as text, a row a method: its name (with * if it was selected), then its `columns`.

    With several seeds a figure is the mean over them ± their standard deviation. A dash is what was not measured.
    """
    results, selected, shown = frames.comparison(run), run.selected(), columns(run)
    rows = []
    for method, group in results.groupby("method", sort=False):
        name = f"{method} {CHOSEN}" if method in selected else str(method)
        rows.append([name, *(_cell(group, column, bool(group["reference"].iloc[0])) for column in shown)])
    return rows


def notes(run: Run) -> list[str]:
    """What a reader must know of the table, a sentence each."""
    results = run.results()
    found = [f"{int(results['n_prompts'].max())} prompts of the test split, one answer each."]
    if run.selected():
        found.append(f"{CHOSEN} chosen on the evaluation split, among the stages of its kind.")
    if not frames.judged_by_gold(results):
        found.append("No gold judge was asked: pairs are won by the reward model's score.")
    seeds = results.groupby("method")["seed"].nunique().max()
    if seeds > 1:
        found.append(f"Where a method was trained with {seeds} seeds: mean ± standard deviation over seeds.")
    return found


def results_table(run: Run) -> Table:
    """The table for a terminal 100 columns wide."""
    caption = Text("\n".join(notes(run)), style="dim")
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in columns(run):
        table.add_column(column.heading, justify="right", no_wrap=True)
    for name, *values in cells(run):
        table.add_row(Text(name, style="bold" if name.endswith(CHOSEN) else ""), *map(Text, values))
    return table


def answers_table(run: Run, count: int = 5) -> Table:
    """The first prompts with every method's answer under one another, each with its score."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    gold = frames.judged_by_gold(run.results())
    table.add_column("method", no_wrap=True, style="dim")
    table.add_column("answer", ratio=1)
    table.add_column("gold" if gold else "reward", justify="right", no_wrap=True)
    for prompt, rows in frames.answers(run, count):
        table.add_section()
        table.add_row("", Text(printable(prompt), style="bold"), "")
        for _, row in rows.iterrows():
            score = row["gold"] if gold else row["score"]
            table.add_row(Text(row["method"]), Text(printable(f"…{row['completion']}")), _number(score, 2))
    return table


def printable(text: str) -> str:
    """A text that can neither steer a terminal nor break its lines: what does not print shows as a dot."""
    return "".join(char if char.isprintable() else "·" for char in text.replace("\n", "↵"))


def _cell(group: pd.DataFrame, column: Column, reference: bool) -> str:
    values, percent = group[column.name].astype(float), 100 if column.name == "win_rate" else 1
    if values.isna().all() or (reference and column.name == "win_rate"):
        return "–"
    mean = _number(percent * values.mean(), column.digits)
    if len(values) > 1:
        spread = percent * values.std(ddof=1)
        return f"{mean} ± {_number(spread, max(column.digits, 1))}" if column.spread else mean
    if column.name == "win_rate":
        low, high = (_number(100 * group[name].iloc[0], 0) for name in ("win_low", "win_high"))
        return f"{mean} [{low}, {high}]"
    error = group[column.error].iloc[0] if column.error else math.nan
    return f"{mean} ± {_number(error, column.digits)}" if error and not math.isnan(error) else mean


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")
