"""Tables of text or chat in TRL's column conventions, read from the files and directories people keep them in.

A table is a list of rows, a row a dict from column to value. Errors count rows from 1, without a CSV's header. A value
is a text, or a chat: a list of messages, each with `role` and `content`.
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

from rlhf_jax.data.readers import Row, read_file
from rlhf_jax.types import RlhfError

Kind = Literal[
    "preference", "implicit_prompt_preference", "unpaired", "prompt_completion", "messages", "text", "ranked", "prompt"
]

# In this order, because a table may have more columns than its kind needs.
KINDS: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "implicit_prompt_preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "ranked": ("prompt", "completions"),
    "prompt": ("prompt",),
}

_TFDS = "tfds:"
_TURN = "\n\nAssistant:"  # Anthropic's HH-RLHF, the best known table of implicit prompts


def read_table(source: str) -> list[Row]:
    """Reads every row and column of a table.

    Sources: `tfds:NAME/SPLIT`; a `.jsonl`, `.jsonl.gz`, `.jsonl.xz`, `.json` (a list of objects), `.parquet` or `.csv`
    file in UTF-8 (a CSV's values are all strings); a directory written by Hugging Face's `save_to_disk`, or one of
    Parquet files, where `DIR/train` also means the files `DIR/train-00000-of-00002.parquet` and so on.

    Raises: RlhfError, with file and row, if the source is missing, unreadable, cut short, ragged or empty.
    """
    if source.startswith(_TFDS):
        rows = _read_tfds(source)
    else:
        with _readable(source):
            rows = [row for file in _files(Path(source)) for row in read_file(file)]
    if not rows:
        raise RlhfError(f"{source} holds no rows: give a table with at least one")
    return rows


def file_hash(source: str) -> str:
    """SHA-256 in hex of what `read_table` would read, so that a changed input is noticed.

    A file's bytes; a directory's file names and bytes in the order of reading; a TFDS data set's name, version and
    split.

    Raises: RlhfError if the source is missing or cannot be read.
    """
    if source.startswith(_TFDS):
        # Imported here: TFDS takes half a second, which a JSONL file need not wait for.
        from rlhf_jax.data import builders

        name, split = _tfds_name(source)
        return hashlib.sha256(f"{builders.full_name(name)}/{split}".encode()).hexdigest()
    with _readable(source):
        files = _files(Path(source))
        if files == [Path(source)]:
            return _digest(files[0])
        return hashlib.sha256("".join(f"{file.name} {_digest(file)}\n" for file in files).encode()).hexdigest()


def kind_of(rows: Sequence[Row], source: str = "the table") -> Kind:
    """Which of TRL's conventions a table follows, by the columns of its first row.

    Raises: RlhfError if it follows none.
    """
    columns = rows[0].keys()
    for kind, needed in KINDS.items():
        if columns >= set(needed):
            return kind
    known = "; ".join(", ".join(needed) for needed in KINDS.values())
    raise RlhfError(
        f"{source} has the columns {', '.join(columns)}, of which nothing can be learned: name them {known}"
    )


def require_columns(rows: Sequence[Row], columns: Iterable[str], source: str) -> None:
    """Raises RlhfError, naming the row, unless every row has every one of `columns`."""
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                raise RlhfError(f"{source}, row {number} has no column {column} (it has {', '.join(row)}): add it")


def checked_rows(rows: Sequence[Row], columns: Iterable[str], source: str) -> list[Row]:
    """Rows whose `columns` all hold texts (perhaps empty), or all hold chats, as the first row's do.

    Keys of messages that are null, as Parquet and Arrow write those that only other messages have, are left out.

    Raises: RlhfError, naming row and column, if a value is missing or is neither.
    """
    columns = tuple(columns)
    require_columns(rows, columns, source)
    chat = isinstance(rows[0][columns[0]], list)
    return [_checked(row, columns, chat, f"{source}, row {number}") for number, row in enumerate(rows, start=1)]


def checked_row(row: Row, columns: Iterable[str], where: str) -> Row:
    """One row as `checked_rows` gives it, whatever its neighbours are. Raises RlhfError that begins with `where`."""
    columns = tuple(columns)
    for column in columns:
        if column not in row:
            raise RlhfError(f"{where} has no column {column} (it has {', '.join(row) or 'none'}): add it")
    return _checked(row, columns, isinstance(row[columns[0]], list), where)


def preference_rows(rows: Sequence[Row], source: str) -> list[Row]:
    """Checked rows with `prompt`, `chosen` and `rejected`, and other columns as they are.

    An implicit prompt is taken out of the two answers. Of chats it is the messages that both begin with, up to the last
    after which the assistant answers in both. Of texts it is what both begin with, cut after the last shared
    "Assistant:" turn of HH-RLHF, else before the last shared word boundary, so that answers keep their leading space.
    TRL's `extract_prompt` cuts at the first differing character, which can be inside a word.

    Raises: RlhfError, naming the row, if a value is neither text nor chat, an answer is empty, or chats begin
        differently.
    """
    kind = kind_of(rows, source)
    if kind not in ("preference", "implicit_prompt_preference"):
        raise RlhfError(f"{source} is no preference data: it needs the columns chosen and rejected (and prompt)")
    checked = checked_rows(rows, KINDS[kind], source)
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
    """Checked rows with `prompt`, `completion` and `label`, which becomes a bool, and other columns as they are.

    Raises: RlhfError, naming the row, if a value is neither text nor chat, a completion is empty, or a label is none.
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
    """Checked rows with `prompt`, `completions` (at least two, the best first) and `scores`, in the order of scores.

    Where a table has scores they decide, equal ones being ties; without them `scores` are the places, counted down.

    Raises: RlhfError, naming the row, if completions are no list of texts or chats, or scores not a number for each.
    """
    require_columns(rows, KINDS["ranked"], source)
    found = []
    for number, row in enumerate(rows, start=1):
        where, completions = f"{source}, row {number}", row["completions"]
        if not isinstance(completions, list) or len(completions) < 2:
            raise RlhfError(f"{where}, column completions is no list of at least two answers: give one, the best first")
        scores = row.get("scores", [*range(len(completions) - 1, -1, -1)])
        if not isinstance(scores, list) or len(scores) != len(completions) or not all(map(_is_number, scores)):
            raise RlhfError(f"{where}, column scores does not give a number for each of {len(completions)} completions")
        chat = isinstance(rows[0]["prompt"], list)
        named = {f"completions[{place}]": completion for place, completion in enumerate(completions)}
        checked = _checked({"prompt": row["prompt"], **named}, ("prompt", *named), chat, where)
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        ranked = {
            "completions": [checked[f"completions[{place}]"] for place in order],
            "scores": [float(scores[place]) for place in order],
        }
        found.append(row | {"prompt": checked["prompt"]} | ranked)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_blank(value: str | list) -> bool:
    """Whether a text has nothing but spaces, or a chat no message."""
    return not (value.strip() if isinstance(value, str) else value)


def _with_prompt(chosen: Any, rejected: Any, where: str) -> dict[str, Any]:
    end = _prompt_end(chosen, rejected) if isinstance(chosen, str) else _shared_messages(chosen, rejected, where)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _shared_messages(chosen: list, rejected: list, where: str) -> int:
    """The number of messages both begin with, such that the assistant answers them in both."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    for end in range(shared, 0, -1):
        if all(len(chat) > end and chat[end]["role"] == "assistant" for chat in (chosen, rejected)):
            return end
    raise RlhfError(
        f"{where}: chosen and rejected begin with no message in common that the assistant answers in both: give the "
        "shared messages in a column prompt, or remove the row"
    )


def _prompt_end(chosen: str, rejected: str) -> int:
    """The length of the prompt that both begin with, such that neither answer is blank."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    turn = chosen.rfind(_TURN, 0, shared)
    turns = [turn + len(_TURN)] if turn >= 0 else []
    gaps = [gap.start() for gap in re.finditer(r"(?<!\s)\s", chosen[: shared + 1])]
    boundaries = [gap for gap in reversed(gaps) if rejected[gap : gap + 1].isspace()]
    ends = (end for end in turns + boundaries if chosen[end:].strip() and rejected[end:].strip())
    return next(ends, 0)


def _label(value: Any, where: str) -> bool:
    # As JSON, Parquet or NumPy have it, and as a CSV file writes it.
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise RlhfError(f"{where}, column label is {value!r}: give true for a good completion, false for a bad one")
    return known[str(value).lower()]


def _checked(row: Row, columns: tuple[str, ...], chat: bool, where: str) -> Row:
    check = _checked_chat if chat else _checked_text
    return row | {column: check(row[column], f"{where}, column {column}") for column in columns}


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        hint = ", as elsewhere; or lists of messages everywhere, in no column prompt if answers begin with it"
        raise RlhfError(f"{where} is {_kind(value)}, not text: give a string{hint if isinstance(value, list) else ''}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RlhfError(f"{where} holds half of a surrogate pair, which is no character: write the text anew in UTF-8")
    return value


def _checked_chat(value: Any, where: str) -> list[Row]:
    if not isinstance(value, list):
        raise RlhfError(
            f"{where} is {_kind(value)}, where others are lists of messages: give lists of messages everywhere"
        )
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


def _tfds_name(source: str) -> tuple[str, str]:
    name, _, split = source.removeprefix(_TFDS).rpartition("/")
    if not name or not split:
        raise RlhfError(f"{source} names no split: write {_TFDS}NAME/SPLIT, as in {_TFDS}movie_reviews/train")
    return name, split


def _read_tfds(source: str) -> list[Row]:
    # Imported here: TFDS takes half a second, which a JSONL file need not wait for.
    from rlhf_jax.data import builders

    return builders.load_split(*_tfds_name(source))


def _files(path: Path) -> list[Path]:
    """The files that a path stands for, in the order of reading."""
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
    if state.get("_indices_data_files"):  # of datasets 1.x: a selection of rows that the Arrow files do not show
        raise RlhfError(f"{directory} was saved by an old version of datasets: load and save it again with a new one")
    return [directory / name for name in names]


def _parquet_files(directory: Path) -> list[Path]:
    if splits := sorted(file.parent.name for file in directory.glob("*/state.json")):
        raise RlhfError(f"{directory} holds the splits {', '.join(splits)}: name one, as in {directory / splits[0]}")
    files = sorted(directory.glob("*.parquet")) or sorted(directory.glob("data/*.parquet"))
    if not files:
        raise RlhfError(f"{directory} holds neither a data set of save_to_disk nor Parquet files: name a file")
    tables = sorted({re.sub(r"\d+", "0", file.stem) for file in files})
    if len(tables) > 1:  # train and test, most likely, which must not be mixed
        raise RlhfError(
            f"{directory} holds Parquet files of different tables ({', '.join(tables)}): name one file, or a split as "
            f"in {files[0].parent / 'train'}"
        )
    return files


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
