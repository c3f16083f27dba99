"""Columns of well-known data sets, and columns that a config names, read as those of `formats.COLUMNS`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlhf_jax.data.readers import Row
from rlhf_jax.types import RlhfError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Roles of chats by ShareGPT's names."""

ALPACA = (
    "Below is an instruction that describes a task{further}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n"
)
"""Prompt that Alpaca was trained with (github.com/tatsu-lab/stanford_alpaca)."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the file's columns, where they differ from ours; None: our own name."""

    prompt: str | None = None  # column with the prompt: text or chat
    chosen: str | None = None  # column with the preferred answer
    rejected: str | None = None  # column with the other answer
    completion: str | None = None  # column with a single answer
    completions: str | None = None  # column with several answers, best first or with scores
    scores: str | None = None  # column with the scores of several answers
    label: str | None = None  # column that marks a single answer as good or bad
    messages: str | None = None  # column with whole chats
    text: str | None = None  # column with plain text


OWN_NAMES = Columns()


class Convention(NamedTuple):
    """Columns of a well-known data set."""

    name: str
    reads: tuple[str, ...]
    fits: Callable[[Row], bool]  # tells by a table's first row
    convert: Callable[[Row, str], Row]  # row, and its place for messages -> row with our columns


def converted(rows: Sequence[Row], columns: Columns, source: str) -> list[Row]:
    """Rename the columns that a config names, and convert the columns of well-known data sets.

    Raises RlhfError, naming the row, if a column is missing or has another form than the first row's.
    """
    rows = renamed(rows, columns, source)
    convention = convention_of(rows[0])
    if convention is None:
        return [*rows]
    found = []
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        if not convention.fits(row):
            raise RlhfError(f"{where} has not the form of {convention.name} that the first row has: correct the row")
        found.append(convention.convert(row, where))
    return found


def renamed(rows: Sequence[Row], columns: Columns, source: str) -> Sequence[Row]:
    """Rename the columns that a config names. Raises RlhfError, naming the row, if one is missing."""
    names = {theirs: ours for ours, theirs in dataclasses.asdict(columns).items() if theirs is not None}
    if not names:
        return rows
    for number, row in enumerate(rows, start=1):
        for theirs, ours in names.items():
            if theirs not in row:
                raise RlhfError(
                    f"{source}, row {number} has no column {theirs}, which data.columns.{ours} names (it has "
                    f"{', '.join(row)})"
                )
    replaced = set(names.values()) - names.keys()
    return [{names.get(name, name): value for name, value in row.items() if name not in replaced} for row in rows]


def convention_of(row: Row) -> Convention | None:
    """Recognise the convention of a table from its first row; None: our own columns, or unknown ones."""
    return next((convention for convention in _CONVENTIONS if convention.fits(row)), None)


def _sharegpt(row: Row, where: str) -> Row:
    column = _turns_of(row)
    assert column is not None
    return _without(row, column) | {"messages": _chat(row[column], f"{where}, {column}")}


def _sharegpt_pair(row: Row, where: str) -> Row:
    answers = {side: _chat([row[side]], f"{where}, {side}") for side in ("chosen", "rejected")}
    return _without(row, "conversations") | {"prompt": _chat(row["conversations"], where)} | answers


def _alpaca(row: Row, where: str) -> Row:
    instruction, given, output = row["instruction"], row.get("input") or "", row["output"]
    if not all(isinstance(value, str) for value in (instruction, given, output)):
        raise RlhfError(f"{where}: instruction, input and output must be texts")
    prompt = ALPACA.format(
        further=", paired with an input that provides further context" if given.strip() else "",
        instruction=instruction,
        input=f"\n\n### Input:\n{given}" if given.strip() else "",
    )
    return _without(row, "instruction", "input", "output") | {"prompt": prompt, "completion": output}


def _ultrafeedback(row: Row, where: str) -> Row:
    for answer in row["completions"]:
        if not isinstance(answer, dict) or not {"response", "overall_score"} <= answer.keys():
            raise RlhfError(f"{where}, completions: each needs a response and an overall_score, as in UltraFeedback")
    return _without(row, "instruction") | {
        "prompt": row["instruction"],
        "completions": [answer["response"] for answer in row["completions"]],
        "scores": [answer["overall_score"] for answer in row["completions"]],
    }


def _chats_beside_prompt(row: Row, where: str) -> Row:
    """Drop the text of a prompt that the chats begin with, or make it their first message."""
    del where
    first = next(iter(row.get("chosen", row.get("messages"))), None)
    if isinstance(first, dict) and first.get("role") == "assistant":
        return row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
    return _without(row, "prompt")


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _turns_of(row: Row) -> str | None:
    """Name of the column with a chat in ShareGPT's form."""
    for column in ("conversations", "conversation", "messages"):
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return column if column != "messages" or "from" in turns[0] else None
    return None


def _chat(turns: list[Row], where: str) -> list[Row]:
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RlhfError(f"{where}, message {number} is not an object: write {{'from': ..., 'value': ...}}")
        speaker, text = (turn.get(ours, turn.get(theirs)) for ours, theirs in (("role", "from"), ("content", "value")))
        if speaker not in ROLES:
            raise RlhfError(f"{where}, message {number} is from {speaker!r}: known roles are {', '.join(ROLES)}")
        messages.append({"role": ROLES[speaker], "content": text})
    return messages


_CONVENTIONS = (
    Convention(
        "ShareGPT pairs",
        ("conversations", "chosen", "rejected"),
        lambda row: _turns_of(row) == "conversations" and isinstance(row.get("chosen"), dict),
        _sharegpt_pair,
    ),
    Convention(
        "ShareGPT",
        ("conversations", "conversation", "messages"),
        lambda row: _turns_of(row) is not None and "chosen" not in row,
        _sharegpt,
    ),
    Convention(
        "UltraFeedback",
        ("instruction", "completions"),
        lambda row: "instruction" in row and isinstance(row.get("completions"), list) and "prompt" not in row,
        _ultrafeedback,
    ),
    Convention(
        "Alpaca",
        ("instruction", "input", "output"),
        lambda row: {"instruction", "output"} <= row.keys() and "prompt" not in row,
        _alpaca,
    ),
    Convention(
        "chats beside the text of their prompt",
        ("chosen", "rejected", "messages"),
        lambda row: isinstance(row.get("prompt"), str) and isinstance(row.get("chosen", row.get("messages")), list),
        _chats_beside_prompt,
    ),
)
