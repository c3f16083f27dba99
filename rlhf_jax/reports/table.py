"""Results tables: `results.csv`, and the tables printed in the terminal at the end of an experiment."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rlhf_jax.reports import frames
from rlhf_jax.reports.differences import differences
from rlhf_jax.reports.run import FURTHER_COLUMNS, RESULT_COLUMNS, Run
from rlhf_jax.runtime.files import write_text
from rlhf_jax.runtime.progress import printable

CHOSEN = "*"
PAIRS_WON = "% of pairs won by the row's answer against the column's;\nties count half [Wilson's 95 % interval]."


class Column(NamedTuple):
    """Column of a results table: the result that it shows, its heading, meaning and format."""

    name: str
    heading: str
    meaning: str
    digits: int
    error: str | None = None  # result with the standard error
    spread: bool = True  # show the standard deviation over seeds
    percent: bool = False
    pairs: bool = False  # computed on pairs with the reference, so empty for the reference itself
    interval: tuple[str, str] | None = None  # results with the ends of the interval
    joint: bool = False  # one value per method, over all of its seeds


COLUMNS = (
    Column("gold_score", "gold", "the judge's rating of the answers, mean ± standard error over prompts", 2, "gold_se"),
    Column(
        "gain",
        "gain",
        "{score} minus the first row's [95 % interval: paired over seeds if there are several, otherwise over prompts]",
        2,
        pairs=True,
        interval=("gain_low", "gain_high"),
        joint=True,
    ),
    Column(
        "win_rate",
        "wins, %",
        "pairs won against the first row's answer to the same prompt; ties count half [Wilson's 95 % interval]",
        0,
        percent=True,
        pairs=True,
        interval=("win_low", "win_high"),
    ),
    Column("reward_score", "reward", "score of {reward}, which Best-of-N maximises", 2),
    Column(
        "kl",
        "KL, nats",
        "divergence from the first row: mean log-ratio of the answers; for Best-of-N, its upper bound",
        2,
        "kl_se",
    ),
    Column("length", "length", "tokens per response, EOS included", 1),
    Column(
        "vader", "VADER", "sentiment by the VADER lexicon, which was not used in training, −1 to 1", 2, spread=False
    ),
    Column("distinct_2", "dist-2", "distinct bigrams over all bigrams; 1 means no repetition", 2, spread=False),
    Column("seconds", "s", "wall time of the method's own stage, in seconds", 0, spread=False),
)

FURTHER = (
    Column("tie_rate", "ties, %", "tied pairs", 0, spread=False, percent=True, pairs=True),
    Column(
        "boot_low",
        "bootstrap",
        "95 % interval of the win rate, in %, by resampling prompts",
        0,
        percent=True,
        pairs=True,
        interval=("boot_low", "boot_high"),
    ),
    Column(
        "lc_win_rate",
        "LC wins, %",
        "length-controlled win rate: predicted for answers of equal length, ± standard error",
        0,
        "lc_win_se",
        percent=True,
        pairs=True,
    ),
    Column("kl_k3", "KL k3", "k3 estimate of the divergence in nats, ± standard error over prompts", 2, "kl_k3_se"),
    Column("ref_nll", "ref nll", "log-perplexity of the answers under the first row, nats per token", 2, spread=False),
    Column(
        "text_nll", "text nll", "log-perplexity of held-out texts under the method, nats per token", 2, spread=False
    ),
    Column("distinct_1", "dist-1", "distinct words over all words", 2, spread=False),
    Column("distinct_3", "dist-3", "distinct trigrams over all trigrams", 2, spread=False),
    Column("repetition_4", "rep-4", "repeated 4-grams within an answer; 0 means no repetition", 2, spread=False),
)
"""Columns of the second table, for evaluations that measure them."""


def write_csv(results: pd.DataFrame, path: Path) -> None:
    """Write the results atomically: RESULT_COLUMNS, then the FURTHER_COLUMNS present. Missing values are empty."""
    names = [*RESULT_COLUMNS, *(name for name in FURTHER_COLUMNS if name in results)]
    write_text(path, results[names].to_csv(index=False, lineterminator="\n"))


def columns(run: Run, candidates: Sequence[Column] = COLUMNS) -> list[Column]:
    """Select the columns with at least one measured value."""
    results, reward = _with_gains(run), frames.reward_of(run)
    score = "gold score" if frames.judged_by_gold(results) else "reward score"
    described = (column._replace(meaning=column.meaning.format(reward=reward, score=score)) for column in candidates)
    return [column for column in described if column.name in results and results[column.name].notna().any()]


def cells(run: Run, candidates: Sequence[Column] = COLUMNS) -> list[list[str]]:
    """Format the table's body, one row per method: its name (with * if it was selected), then its `columns`.

    With several seeds, a cell is the mean ± standard deviation over seeds. A dash means not measured.
    """
    results, selected, shown = _with_gains(run), run.selected(), columns(run, candidates)
    rows = []
    for method, group in results.groupby("method", sort=False):
        name = f"{method} {CHOSEN}" if method in selected else str(method)
        rows.append([name, *(_cell(group, column, bool(group["reference"].iloc[0])) for column in shown)])
    return rows


def _with_gains(run: Run) -> pd.DataFrame:
    """Join each method's gain over the reference to its rows of the comparison."""
    table, start = differences(run), frames.reference(run)
    gains = table[table["against"] == start].set_index("method")[["difference", "low", "high"]]
    gains.columns = ["gain", "gain_low", "gain_high"]
    return frames.comparison(run).join(gains, on="method")


def opponents(run: Run) -> list[str]:
    """List the methods besides the reference that all methods were compared with."""
    rates = run.win_rates()
    return [name for name in rates["against"].unique() if name != frames.reference(run)]


def pairs_won(run: Run) -> list[list[str]]:
    """Format win rates in % of each row's method against each of the `opponents`."""
    rates, columns = run.win_rates(), opponents(run)
    wins = next(column for column in COLUMNS if column.name == "win_rate")
    rows = []
    for method in frames.comparison(run)["method"].unique():
        own = rates[rates["method"] == method]
        rows.append([str(method), *(_cell(own[own["against"] == other], wins, method == other) for other in columns)])
    return rows


def notes(run: Run) -> list[str]:
    """Sentences that explain the table."""
    results = run.results()
    sentences = [f"{int(results['n_prompts'].max())} prompts of the test split, one answer each."]
    if run.selected():
        sentences.append(f"{CHOSEN} selected on the evaluation split among the stages of its kind.")
    if frames.judged_in_both_orders(run):
        sentences.append(f"A pair is won by the answer that {frames.judge_of(run)} prefers in both orders.")
    elif not frames.judged_by_gold(results):
        sentences.append(f"No gold judge: pairs are decided by the score of {frames.reward_of(run)}.")
    seeds = results.groupby("method", sort=False)["seed"].nunique()
    if seeds.max() > 1:
        fixed = ", ".join(seeds.index[seeds == 1])
        sentences.append(
            f"With {seeds.max()} seeds: mean ± standard deviation over seeds, and gains with 95 % intervals over seeds "
            f"(paired t){f'; one seed, held fixed: {fixed}' if fixed else ''}."
        )
    else:
        sentences.append("One seed: errors and intervals are over prompts only, without the variation between seeds.")
    return sentences


def tables(run: Run, width: int) -> list[Table | Text]:
    """Results for a terminal: main table, further measurements and pairwise win rates, split to fit the width."""
    headings = [column.heading for column in columns(run)]
    shown = split_to_width(headings, cells(run), width, caption="\n".join(notes(run)))
    if further := columns(run, FURTHER):
        shown += split_to_width([column.heading for column in further], cells(run, FURTHER), width)
    if others := opponents(run):
        shown += split_to_width(others, pairs_won(run), width, caption=PAIRS_WON)
    return shown


def split_to_width(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, caption: str | None = None
) -> list[Table | Text]:
    """Split a table into as few tables as fit into `width` characters without truncation, each with the row names.

    Args: rows begin with their names; the caption follows the last table.
    """
    console, parts, start = Console(width=width), [], 0
    while start < len(headings):
        stop = start + 1
        while stop < len(headings) and _fits(console, headings[start : stop + 1], rows, start):
            stop += 1
        parts.append((start, stop))
        start = stop
    shown: list[Table | Text] = [_table(headings[start:stop], _slice(rows, start, stop)) for start, stop in parts]
    return shown if caption is None else [*shown, Text(f"{caption}\n", style="dim")]


def answers_table(run: Run, count: int = 5) -> Table:
    """Table of the first prompts with every method's answer and its score."""
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


def _slice(rows: Sequence[Sequence[str]], start: int, stop: int) -> list[list[str]]:
    return [[name, *values[start:stop]] for name, *values in rows]


def _fits(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], start: int) -> bool:
    table = _table(headings, _slice(rows, start, start + len(headings)))
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, *values in rows:
        table.add_row(*map(Text, (name, *values)))
    return table


def _cell(group: pd.DataFrame, column: Column, reference: bool) -> str:
    scale = 100 if column.percent else 1
    if (reference and column.pairs) or group.empty or group[column.name].isna().all():
        return "–"
    values = scale * group[column.name].astype(float)
    if column.joint:
        return f"{_number(values.iloc[0], column.digits)} {_interval(group, column)}"
    if column.interval and column.name in column.interval:
        return "–" if len(values) > 1 else _interval(group, column)
    mean = _number(values.mean(), column.digits)
    if len(values) > 1:
        return f"{mean} ± {_number(values.std(ddof=1), max(column.digits, 1))}" if column.spread else mean
    if column.interval:
        return f"{mean} {_interval(group, column)}"
    error = scale * group[column.error].iloc[0] if column.error else math.nan
    return f"{mean} ± {_number(error, column.digits)}" if error and not math.isnan(error) else mean


def _interval(group: pd.DataFrame, column: Column) -> str:
    assert column.interval is not None
    scale = 100 if column.percent else 1
    low, high = (_number(scale * group[name].iloc[0], column.digits) for name in column.interval)
    return f"[{low}, {high}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")
