"""Report on a stage's data: the lengths of its rows, and the share of rows that are truncated."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf_jax.data import lengths
from rlhf_jax.data.lengths import Pairs
from rlhf_jax.data.pipeline import Row
from rlhf_jax.loading.context import Context
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.text.tokenizer import Tokenizer

FILE = "data.json"
SHOWN = ("column", "rows", "median", "95 %", "longest", "limit", "cut")


def report_answers(context: Context, tokenizer: Tokenizer, splits: Mapping[str, Mapping[str, Pairs]]) -> None:
    """Report the lengths of prompts and answers, by split and column; see `data.lengths`."""
    figures = {name: lengths.answer_lengths(pairs, tokenizer, context.data) for name, pairs in splits.items()}
    _report(context, figures, [warning for name, pairs in splits.items() if (warning := _identical(pairs, name))])


def report_prompts(context: Context, tokenizer: Tokenizer, splits: Mapping[str, list[Row]]) -> None:
    """Report the lengths of prompts, by split."""
    _report(context, {name: lengths.prompt_lengths(rows, tokenizer, context.data) for name, rows in splits.items()}, [])


def _identical(pairs: Mapping[str, Pairs], split: str) -> str | None:
    """Return a warning if the chosen and the rejected answer are identical in some rows, otherwise None."""
    if not {"chosen", "rejected"} <= pairs.keys():
        return None
    same = [one == other for one, other in zip(pairs["chosen"][1], pairs["rejected"][1], strict=True)]
    if not any(same):
        return None
    count = f"{sum(same)} of {len(same)} rows ({split})"
    return f"chosen and rejected are identical in {count}: these rows express no preference."


def _report(context: Context, splits: dict[str, list[dict[str, Any]]], warnings: list[str]) -> None:
    """Write `data.json`, and print it with its warnings unless an earlier stage of the experiment printed the same."""
    splits = {name: figures for name, figures in splits.items() if figures}
    report = {"splits": splits, "warnings": [*lengths.warnings(splits), *warnings]}
    write_json(context.directory / FILE, report)
    earlier = [context.workdir.directory(name) / FILE for name in context.stages[: context.stages.index(context.name)]]
    if not splits or any(path.exists() and read_json(path) == report for path in earlier):
        return
    table = Table(box=None, pad_edge=False, title=f"{context.name}: lengths in tokens", title_justify="left")
    table.add_column("split")
    for name in SHOWN:
        table.add_column(name, justify="left" if name == "column" else "right", no_wrap=True)
    for split, figures in splits.items():
        for row in figures:
            table.add_row(split, *(f"{row[name]:.0%}" if name == "cut" else str(row[name]) for name in SHOWN))
    context.bar.say(table, *(Text(f"Warning: {warning}", style="yellow") for warning in report["warnings"]))
