"""The results as a table: `results.csv`, and what the terminal shows when an experiment has ended."""

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

CHOSEN = "*"
PAIRS_WON = "% of pairs won by the row's answer against the column's,\nties half [Wilson's 95 % interval]."


class Column(NamedTuple):
    """A column of the table for readers: its heading, what it means, and the result that it shows."""

    name: str
    heading: str
    meaning: str
    digits: int
    error: str | None = None  # the column with its standard error
    spread: bool = True  # whether the deviation over seeds is shown
    percent: bool = False
    pairs: bool = False  # of pairs with the reference, which has none with itself
    interval: tuple[str, str] | None = None  # the columns with its ends
    joint: bool = False  # one value a method, over all of its seeds


COLUMNS = (
    Column("gold_score", "gold", "the judge's rating of the answers, mean ± standard error over prompts", 2, "gold_se"),
    Column(
        "gain",
        "gain",
        "{score} less the first row's [95 % interval: over seeds, paired, where there are several; else over prompts]",
        2,
        pairs=True,
        interval=("gain_low", "gain_high"),
        joint=True,
    ),
    Column(
        "win_rate",
        "wins, %",
        "pairs won against the first row's answer to the same prompt, ties half [Wilson's 95 % interval]",
        0,
        percent=True,
        pairs=True,
        interval=("win_low", "win_high"),
    ),
    Column("reward_score", "reward", "the score of {reward}, by which Best-of-N chooses", 2),
    Column(
        "kl",
        "KL, nats",
        "divergence from the first row: mean log-ratio of the answers; of Best-of-N, its upper bound",
        2,
        "kl_se",
    ),
    Column("length", "length", "tokens per response, its end included", 1),
    Column("vader", "VADER", "sentiment by a lexicon that nothing was trained on, −1 to 1", 2, spread=False),
    Column(
        "distinct_2", "dist-2", "distinct pairs of words over all pairs of words; 1 is no repetition", 2, spread=False
    ),
    Column("seconds", "s", "wall time of the method's own stage, in seconds", 0, spread=False),
)

FURTHER = (
    Column("tie_rate", "ties, %", "pairs that nobody won", 0, spread=False, percent=True, pairs=True),
    Column(
        "boot_low",
        "bootstrap",
        "95 % interval of the pairs won, in %, by drawing prompts anew",
        0,
        percent=True,
        pairs=True,
        interval=("boot_low", "boot_high"),
    ),
    Column(
        "lc_win_rate",
        "LC wins, %",
        "pairs won had the answers been equally long (length-controlled), ± standard error",
        0,
        "lc_win_se",
        percent=True,
        pairs=True,
    ),
    Column("kl_k3", "KL k3", "divergence in nats by the estimator k3, ± standard error over prompts", 2, "kl_k3_se"),
    Column(
        "ref_nll", "ref nll", "nats per token of the answers under the first row: their log-perplexity", 2, spread=False
    ),
    Column("text_nll", "text nll", "nats per token of held-out texts under the method's policy", 2, spread=False),
    Column("distinct_1", "dist-1", "distinct words over all words", 2, spread=False),
    Column("distinct_3", "dist-3", "distinct triples of words over all triples", 2, spread=False),
    Column(
        "repetition_4", "rep-4", "repeated quadruples of words within an answer; 0 is no repetition", 2, spread=False
    ),
)
"""Of a second table, for evaluations that have measured them."""


def write_csv(results: pd.DataFrame, path: Path) -> None:
    """Writes the results, whole or not at all: RESULT_COLUMNS, then those FURTHER_COLUMNS that there are.

    What was not measured is empty.
    """
    names = [*RESULT_COLUMNS, *(name for name in FURTHER_COLUMNS if name in results)]
    write_text(path, results[names].to_csv(index=False, lineterminator="\n"))


def columns(run: Run, of: Sequence[Column] = COLUMNS) -> list[Column]:
    """Those of some columns that something was measured for."""
    results, reward = _with_gains(run), frames.reward_of(run)
    score = "gold score" if frames.judged_by_gold(results) else "reward score"
    named = (column._replace(meaning=column.meaning.format(reward=reward, score=score)) for column in of)
    return [column for column in named if column.name in results and results[column.name].notna().any()]


def cells(run: Run, of: Sequence[Column] = COLUMNS) -> list[list[str]]:
    """The table's body as text, a row a method: its name (with * if it was selected), then its `columns`.

    With several seeds a figure is the mean over them ± their standard deviation. A dash is what was not measured.
    """
    results, selected, shown = _with_gains(run), run.selected(), columns(run, of)
    rows = []
    for method, group in results.groupby("method", sort=False):
        name = f"{method} {CHOSEN}" if method in selected else str(method)
        rows.append([name, *(_cell(group, column, bool(group["reference"].iloc[0])) for column in shown)])
    return rows


def _with_gains(run: Run) -> pd.DataFrame:
    """The comparison, with each method's gain over the reference in every row of the method."""
    found, start = differences(run), frames.reference(run)
    gains = found[found["against"] == start].set_index("method")[["difference", "low", "high"]]
    gains.columns = ["gain", "gain_low", "gain_high"]
    return frames.comparison(run).join(gains, on="method")


def opponents(run: Run) -> list[str]:
    """Whom all methods were compared with beside the reference, if anyone."""
    rates = run.win_rates()
    return [name for name in rates["against"].unique() if name != frames.reference(run)]


def pairs_won(run: Run) -> list[list[str]]:
    """Wins in % of the method of a row against each of the `opponents`, as `cells` shows them."""
    rates, faced = run.win_rates(), opponents(run)
    wins = next(column for column in COLUMNS if column.name == "win_rate")
    rows = []
    for method in frames.comparison(run)["method"].unique():
        own = rates[rates["method"] == method]
        rows.append([str(method), *(_cell(own[own["against"] == other], wins, method == other) for other in faced)])
    return rows


def notes(run: Run) -> list[str]:
    """What a reader must know of the table, a sentence each."""
    results = run.results()
    found = [f"{int(results['n_prompts'].max())} prompts of the test split, one answer each."]
    if run.selected():
        found.append(f"{CHOSEN} chosen on the evaluation split, among the stages of its kind.")
    if frames.asked_in_both_orders(run):
        found.append(f"Pairs are won by what {frames.judge_of(run)} prefers in both orders.")
    elif not frames.judged_by_gold(results):
        found.append(f"No gold judge was asked: pairs are won by the score of {frames.reward_of(run)}.")
    seeds = results.groupby("method", sort=False)["seed"].nunique()
    if seeds.max() > 1:
        fixed = ", ".join(seeds.index[seeds == 1])
        found.append(
            f"With {seeds.max()} seeds: mean ± standard deviation over seeds, and gains with 95 % intervals over seeds "
            f"(paired t){f'; one seed, held fixed: {fixed}' if fixed else ''}."
        )
    else:
        found.append("One seed: errors and intervals are over prompts only, without the spread between seeds.")
    return found


def tables(run: Run, width: int) -> list[Table | Text]:
    """The results for a terminal: what the methods reach, what their answers are like, all pairs; in parts that fit."""
    headings = [column.heading for column in columns(run)]
    shown = packed(headings, cells(run), width, caption="\n".join(notes(run)))
    if further := columns(run, FURTHER):
        shown += packed([column.heading for column in further], cells(run, FURTHER), width)
    if faced := opponents(run):
        shown += packed(faced, pairs_won(run), width, caption=PAIRS_WON)
    return shown


def packed(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, caption: str | None = None
) -> list[Table | Text]:
    """As few tables as show every cell whole in lines of `width` characters, each with the rows' names.

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
        table.add_row(Text(name, style="bold" if name.endswith(CHOSEN) else ""), *map(Text, values))
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
