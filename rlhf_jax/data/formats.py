"""Tables of texts or chats in TRL's column conventions, read from files and directories.

A table is a list of rows, and a row a dict from column to value. Error messages count rows from 1, without a CSV's
header. A value is a text, or a chat: a list of messages with `role` and `content`.
"""

import contextlib
import glob
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.data.named_sources import named_source
from rlhf_jax.data.readers import Row, read_file
from rlhf_jax.types import RlhfError

RowKind = Literal[
    "preference", "implicit_prompt_preference", "unpaired", "prompt_completion", "messages", "text", "ranked", "prompt"
]

# The first match counts: a table may have more columns than its kind needs.
COLUMNS: dict[RowKind, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "implicit_prompt_preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "ranked": ("prompt", "completions"),
    "prompt": ("prompt",),
}

_TURN = "\n\nAssistant:"  # as in Anthropic's HH-RLHF, the best-known data set with implicit prompts


def read_table(source: str) -> list[Row]:
    """Read every row and column of a table.

    Sources: `tfds:NAME/SPLIT`; `hub:OWNER/NAME[:CONFIG]/SPLIT`; `arithmetic:SPLIT,...` (`data/arithmetic.py`); a
    `.jsonl`, `.jsonl.gz`, `.jsonl.xz`, `.json` (a list of objects), `.parquet` or `.csv` file in UTF-8 (all CSV values
    are strings); a directory written by Hugging Face's `save_to_disk` or containing Parquet files. `DIR/train` also
    stands for the shards `DIR/train-00000-of-00002.parquet` and so on.

    Raises: RlhfError, with file and row, if the source is missing, unreadable, truncated, ragged or empty.
    """
    if named := named_source(source):
        rows = named.read(source)
    else:
        with _readable(source):
            rows = [row for file in _files(Path(source)) for row in read_file(file)]
    if not rows:
        raise RlhfError(f"{source} has no rows: give a table with at least one")
    return rows


def file_hash(source: str) -> str:
    """SHA-256 in hex of a source's content, to detect changed inputs.

    It covers a file's bytes, a directory's file names and bytes in reading order, the name, version and split of a TFDS
    data set, the rows of a data set on the Hub, or generated rows.

    Raises: RlhfError if the source is missing or cannot be read.
    """
    if named := named_source(source):
        return named.content_hash(source)
    with _readable(source):
        files = _files(Path(source))
        if files == [Path(source)]:
            return _digest(files[0])
        return hashlib.sha256("".join(f"{file.name} {_digest(file)}\n" for file in files).encode()).hexdigest()


def kind_of(rows: Sequence[Row], source: str = "the table") -> RowKind:
    """Determine which of TRL's column conventions a table follows, from its first row.

    Raises: RlhfError if it follows none.
    """
    columns = rows[0].keys()
    for kind, needed in COLUMNS.items():
        if columns >= set(needed):
            return kind
    known = "; ".join(", ".join(needed) for needed in COLUMNS.values())
    advice = f"name them {known}, or map them by --config.data.columns.prompt=NAME and so on"
    raise RlhfError(f"{source} has the columns {', '.join(columns)}, which match no known format: {advice}")


def require_columns(rows: Sequence[Row], columns: Iterable[str], source: str) -> None:
    """Raises RlhfError, naming the row, unless every row has every one of `columns`."""
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                raise RlhfError(f"{source}, row {number} has no column {column} (it has {', '.join(row)}): add it")


def checked_rows(rows: Sequence[Row], columns: Iterable[str], source: str) -> list[Row]:
    """Check that `columns` contain only texts (possibly empty) or only chats, as in the first row, and return the rows.

    Null keys of messages are dropped: Parquet and Arrow write them for keys that only other messages have.

    Raises: RlhfError, naming row and column, if a value is missing or of another type.
    """
    columns = tuple(columns)
    require_columns(rows, columns, source)
    chat = isinstance(rows[0][columns[0]], list)
    return [_checked(row, columns, chat, f"{source}, row {number}") for number, row in enumerate(rows, start=1)]


def checked_row(row: Row, columns: Iterable[str], where: str) -> Row:
    """Check one row as `checked_rows` does. Raises RlhfError with a message that starts with `where`."""
    columns = tuple(columns)
    for column in columns:
        if column not in row:
            raise RlhfError(f"{where} has no column {column} (it has {', '.join(row) or 'none'}): add it")
    return _checked(row, columns, isinstance(row[columns[0]], list), where)


def preference_rows(rows: Sequence[Row], source: str) -> list[Row]:
    """Check preference rows; return them with `prompt`, `chosen`, `rejected` and all other columns.

    An implicit prompt is the common beginning of both answers. In chats it consists of the shared messages up to the
    last one that the assistant answers in both. In texts it ends after the last shared "Assistant:" turn of HH-RLHF,
    or else before the last shared word boundary, so that answers keep their leading space. (TRL's `extract_prompt`
    cuts at the first differing character, which can be inside a word.)

    Raises: RlhfError, naming the row, if a value is neither text nor chat, an answer is empty, or two chats have no
        common beginning.
    """
    kind = kind_of(rows, source)
    if kind not in ("preference", "implicit_prompt_preference"):
        raise RlhfError(f"{source} is not preference data: it needs the columns chosen and rejected (and prompt)")
    checked = checked_rows(rows, COLUMNS[kind], source)
    for number, row in enumerate(checked, start=1):
        for column in ("chosen", "rejected"):
            if is_blank(row[column]):
                raise RlhfError(f"{source}, row {number}, column {column} is empty: remove the row or give an answer")
    if kind == "preference":
        return checked
    return [
        row | _with_prompt(row["chosen"], row["rejected"], f"{source}, row {number}")
        for number, row in enumerate(checked, start=1)
    ]


def unpaired_rows(rows: Sequence[Row], source: str) -> list[Row]:
    """Check unpaired rows; return them with `prompt`, `completion`, a boolean `label` and all other columns.

    Raises: RlhfError, naming the row, if a value is neither text nor chat, a completion is empty, or a label is
        invalid.
    """
    checked = checked_rows(rows, ("prompt", "completion"), source)
    require_columns(rows, ["label"], source)
    for number, row in enumerate(checked, start=1):
        if is_blank(row["completion"]):
            raise RlhfError(f"{source}, row {number}, column completion is empty: remove the row or give an answer")
    return [
        row | {"label": _label(row["label"], f"{source}, row {number}")} for number, row in enumerate(checked, start=1)
    ]


def ranked_rows(rows: Sequence[Row], source: str) -> list[Row]:
    """Check ranked rows; return them with `prompt`, `completions` (two or more) and `scores`, sorted by score.

    Equal scores are ties. A table without scores lists the best completion first and gets descending ranks as scores.

    Raises: RlhfError, naming the row, if completions are not a list of texts or chats, or scores not one number each.
    """
    require_columns(rows, COLUMNS["ranked"], source)
    ranked_rows = []
    for number, row in enumerate(rows, start=1):
        where, completions = f"{source}, row {number}", row["completions"]
        if not isinstance(completions, list) or len(completions) < 2:
            raise RlhfError(f"{where}, column completions must be a list of at least two answers, best first")
        scores = row.get("scores", [*range(len(completions) - 1, -1, -1)])
        if not isinstance(scores, list) or len(scores) != len(completions) or not all(map(_is_number, scores)):
            raise RlhfError(f"{where}, column scores does not give a number for each of {len(completions)} completions")
        chat = isinstance(rows[0]["prompt"], list)
        columns = {f"completions[{i}]": completion for i, completion in enumerate(completions)}
        checked = _checked({"prompt": row["prompt"], **columns}, ("prompt", *columns), chat, where)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        ranked = {
            "completions": [checked[f"completions[{i}]"] for i in order],
            "scores": [float(scores[i]) for i in order],
        }
        ranked_rows.append(row | {"prompt": checked["prompt"]} | ranked)
    return ranked_rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_blank(value: str | list) -> bool:
    """Return whether a text is empty or whitespace, or a chat has no messages."""
    return not (value.strip() if isinstance(value, str) else value)


def _with_prompt(chosen: Any, rejected: Any, where: str) -> dict[str, Any]:
    end = _prompt_end(chosen, rejected) if isinstance(chosen, str) else _shared_messages(chosen, rejected, where)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _shared_messages(chosen: list, rejected: list, where: str) -> int:
    """Length of the longest common beginning of two chats that the assistant answers in both."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    for end in range(shared, 0, -1):
        if all(len(chat) > end and chat[end]["role"] == "assistant" for chat in (chosen, rejected)):
            return end
    raise RlhfError(
        f"{where}: chosen and rejected share no initial messages that the assistant answers in both: give the shared "
        "messages in a column prompt, or remove the row"
    )


def _prompt_end(chosen: str, rejected: str) -> int:
    """Length of the common prompt of two texts, such that neither answer is blank; 0 if there is none."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    turn = chosen.rfind(_TURN, 0, shared)
    turns = [turn + len(_TURN)] if turn >= 0 else []
    gaps = [gap.start() for gap in re.finditer(r"(?<!\s)\s", chosen[: shared + 1])]
    boundaries = [gap for gap in reversed(gaps) if rejected[gap : gap + 1].isspace()]
    ends = (end for end in turns + boundaries if chosen[end:].strip() and rejected[end:].strip())
    return next(ends, 0)


def _label(value: Any, where: str) -> bool:
    # A bool or number from JSON, Parquet or NumPy, or a string from CSV.
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise RlhfError(f"{where}, column label is {value!r}: give true for a good completion, false for a bad one")
    return known[str(value).lower()]


def _checked(row: Row, columns: tuple[str, ...], chat: bool, where: str) -> Row:
    check = _checked_chat if chat else _checked_text
    return row | {column: check(row[column], f"{where}, column {column}") for column in columns}


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        hint = " as in the first column, or chats in every column (without a column prompt if the answers include it)"
        raise RlhfError(f"{where} is {_kind(value)}, not text: give a string{hint if isinstance(value, list) else ''}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RlhfError(f"{where} contains a lone surrogate, which is not a character: write the text again in UTF-8")
    return value


def _checked_chat(value: Any, where: str) -> list[Row]:
    if not isinstance(value, list):
        raise RlhfError(f"{where} is {_kind(value)}, but others are chats: give a list of messages in every row")
    chat = []
    for number, message in enumerate(value, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise RlhfError(f"{place} is {_kind(message)}: write it as {{'role': ..., 'content': ...}}")
        known = {key: part for key, part in message.items() if part is not None}
        for key in ("role", "content"):
            if key in known:
                _checked_text(known[key], f"{place}, {key}")
            elif key == "role" or "tool_calls" not in known:
                raise RlhfError(f"{place} has no {key} (it has {', '.join(known) or 'nothing'}): add it")
        chat.append(known)
    return chat


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


@contextlib.contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RlhfError(
            f"{source} cannot be read: {error.strerror or error}. Check the path and its permissions"
        ) from error


def _files(path: Path) -> list[Path]:
    """Resolve a path to the files to read, in order."""
    if (path / "state.json").is_file():
        return _saved_files(path)
    if path.is_dir():
        return _parquet_files(path)
    shards = sorted(path.parent.glob(f"{glob.escape(path.name)}-*-of-*.parquet"))
    if not path.exists() and not shards:
        raise RlhfError(f"{path} does not exist: check the path")
    return [path] if path.exists() else shards


def _saved_files(directory: Path) -> list[Path]:
    state_file = directory / "state.json"
    try:
        state = json.loads(state_file.read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RlhfError(f"{state_file} is damaged: save the data set again with save_to_disk") from error
    if state.get("_indices_data_files"):  # datasets 1.x: a selection of rows, stored beside the Arrow files
        raise RlhfError(f"{directory} was saved by an old version of datasets: load and save it with a newer version")
    return [directory / name for name in names]


def _parquet_files(directory: Path) -> list[Path]:
    if splits := sorted(file.parent.name for file in directory.glob("*/state.json")):
        raise RlhfError(f"{directory} has the splits {', '.join(splits)}: choose one, as in {directory / splits[0]}")
    files = sorted(directory.glob("*.parquet")) or sorted(directory.glob("data/*.parquet"))
    if not files:
        raise RlhfError(f"{directory} has neither a save_to_disk data set nor Parquet files: name a file")
    tables = sorted({re.sub(r"\d+", "0", file.stem) for file in files})
    if len(tables) > 1:  # probably train and test, which must not be mixed
        raise RlhfError(
            f"{directory} has Parquet files of different tables ({', '.join(tables)}): name one file, or a split as in "
            f"{files[0].parent / 'train'}"
        )
    return files


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
