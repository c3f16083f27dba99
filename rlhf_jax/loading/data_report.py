"""Summary of a stage's data, written and printed before the stage works: lengths, columns and repeated rows.

Lengths are measured on at most 5,000 rows of a split, so that a large table costs little; all rows are counted.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rich.table import Table
from rich.text import Text

from rlhf_jax.data import counts, formats, lengths, pipeline
from rlhf_jax.data.splits import Row, read_source
from rlhf_jax.loading.context import Context
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.text.tokenizer import Tokenizer

FILE = "data.json"
SHOWN = ("column", "rows", "median", "95 %", "longest", "limit", "cut")

Report: TypeAlias = dict[str, Any]
"""Content of `data.json`: `splits`, by name, with counts and `lengths`; `notes` and `warnings`, sentences."""


def report_answers(context: Context, tokenizer: Tokenizer, splits: Mapping[str, list[Row]], stage: str | None) -> None:
    """Report on the splits that a stage trains and evaluates on, and on the prompts of a test split.

    Args: stage is the earlier stage that wrote the rows; None: they are the experiment's data.
    """
    found = {name: lengths.answer_pairs(rows) for name, rows in splits.items()}
    figures = {name: lengths.answer_lengths(pairs, tokenizer, context.data) for name, pairs in found.items()}
    if stage is not None:
        _report(context, {name: _counted(rows) | {"lengths": figures[name]} for name, rows in splits.items()})
        return
    if context.data.test is not None:
        test = pipeline.load_rows(context.data, "test")
        splits = {**splits, "test": test}
        figures["test"] = lengths.prompt_lengths(test, tokenizer, context.data)
    _report(context, _described(context, splits, figures))


def report_prompts(context: Context, tokenizer: Tokenizer, splits: Mapping[str, list[Row]]) -> None:
    """Report on the splits of the experiment's data that a stage takes prompts from."""
    figures = {name: lengths.prompt_lengths(rows, tokenizer, context.data) for name, rows in splits.items()}
    described = _described(context, splits, figures)
    for name, rows in splits.items():
        described[name]["without_prompt"] = lengths.share_without_prompt(rows, tokenizer, context.data)
    _report(context, described)


def unseen(report: Report, earlier: Iterable[Report]) -> Report:
    """Return the parts of a report that no earlier report of the experiment has."""
    before = [*earlier]
    known = [(name, row) for other in before for name, split in other["splits"].items() for row in split["lengths"]]
    splits = {
        name: split | {"lengths": [row for row in split["lengths"] if (name, row) not in known]}
        for name, split in report["splits"].items()
    }
    sentences = {
        key: [sentence for sentence in report[key] if not any(sentence in other[key] for other in before)]
        for key in ("notes", "warnings")
    }
    return {"splits": {name: split for name, split in splits.items() if split["lengths"]}, **sentences}


def joined(notes: Iterable[str]) -> Iterator[str]:
    """Join the notes that are the same for several splits: "train, eval: columns text."."""
    splits: dict[str, list[str]] = {}
    for split, _, note in (note.partition(": ") for note in notes):
        splits.setdefault(note, []).append(split)
    return (f"{', '.join(names)}: {note}" for note, names in splits.items())


def read_reports(directories: Iterable[Path]) -> Iterator[Report]:
    """Read the reports of the stages that have one; those of older releases, without notes, are left out."""
    found = (read_json(directory / FILE) for directory in directories if (directory / FILE).exists())
    return (report for report in found if "notes" in report)


def _described(
    context: Context, splits: Mapping[str, list[Row]], figures: Mapping[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Describe splits of the experiment's data: source, columns, counts, and lengths."""
    described: dict[str, dict[str, Any]] = {}
    training = pipeline.load_rows(context.data, "train") if splits.keys() - {"train"} else []
    for name, rows in splits.items():
        source = read_source(context.data, name)
        described[name] = {
            "source": source.name,
            "columns": source.columns,
            "further_columns": source.further,
            "convention": source.convention,
            "beyond_limit": source.rows - len(rows) if context.data.limit else 0,
            **_counted(rows),
        }
        if name != "train":
            described[name]["is_test"] = name == "eval" and _hash(context, "eval") == _hash(context, "test")
            described[name]["shared"], described[name]["compared"] = counts.shared(rows, training)
        described[name]["lengths"] = figures[name]
    return described


def _hash(context: Context, split: str) -> str:
    return formats.file_hash(context.data.source(split))


def _counted(rows: list[Row]) -> dict[str, Any]:
    equal = counts.equal_answers(rows)
    return {
        "rows": len(rows),
        "repeated": counts.repeated(rows),
        **({} if equal is None else {"equal_answers": equal}),
    }


def _report(context: Context, splits: dict[str, dict[str, Any]]) -> None:
    """Write `data.json`, and print what no earlier stage of the experiment printed."""
    report: Report = {
        "splits": splits,
        "notes": [f"{name}: {note}" for name, split in splits.items() for note in _notes(split)],
        "warnings": [
            *lengths.warnings({name: split["lengths"] for name, split in splits.items()}),
            *(warning for name, split in splits.items() for warning in _warnings(name, split)),
        ],
    }
    write_json(context.directory / FILE, report)
    earlier = context.stages[: context.stages.index(context.name)]
    new = unseen(report, read_reports(context.workdir.directory(name) for name in earlier))
    if new["splits"]:
        context.bar.say(_table(f"{context.name}: data, with lengths in tokens", new["splits"]))
    elif new["notes"] or new["warnings"]:
        context.bar.say(f"{context.name}: data")
    context.bar.say(*map(Text, joined(new["notes"])))
    context.bar.say(*(Text(f"Warning: {warning}", style="yellow") for warning in new["warnings"]))


def _table(title: str, splits: Mapping[str, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("split")
    for name in SHOWN:
        table.add_column(name, justify="left" if name == "column" else "right", no_wrap=True)
    for split, described in splits.items():
        for row in described["lengths"]:
            table.add_row(split, *(f"{row[name]:.0%}" if name == "cut" else str(row[name]) for name in SHOWN))
    return table


def _notes(split: Mapping[str, Any]) -> Iterator[str]:
    rows = split["rows"]
    if "columns" in split:
        further = f"; further columns: {', '.join(split['further_columns'])}" if split["further_columns"] else ""
        convention = f" ({split['convention']})" if split["convention"] else ""
        yield f"columns {', '.join(split['columns'])}{convention}{further}."
    if split.get("is_test"):
        yield "these rows are the test split too (data.test): a stage that is selected on them looks better than it is."
    if beyond := split.get("beyond_limit"):
        yield f"the first {rows} of {rows + beyond} rows are used (data.limit)."
    if share := split.get("without_prompt"):
        yield (
            f"{share:.1%} of the texts give no prompt, because they are too short for text_prompt_tokens or start with "
            "unknown words."
        )
    if 0 < split["repeated"] <= lengths.WARN_ABOVE * rows:
        yield _repeated(split)
    if 0 < split.get("shared", 0) <= lengths.WARN_ABOVE * rows:
        yield f"{_shared(split)}."


def _warnings(name: str, split: Mapping[str, Any]) -> Iterator[str]:
    rows = split["rows"]
    if equal := split.get("equal_answers"):
        yield (
            f"chosen and rejected are identical in {equal} of {rows} rows ({name}): these rows express no preference."
        )
    if split["repeated"] > lengths.WARN_ABOVE * rows:
        yield f"{name}: {_repeated(split)}"
    if split.get("shared", 0) > lengths.WARN_ABOVE * rows:
        yield f"{name}: {_shared(split)}: results on {name} will be too good."


def _repeated(split: Mapping[str, Any]) -> str:
    return f"{split['repeated']} of {split['rows']} rows repeat an earlier row."


def _shared(split: Mapping[str, Any]) -> str:
    return f"{split['shared']} of {split['rows']} rows have the same {split['compared']} as a row of train"
