"""JSON lines that commands read and write: one object per line, numbered from 1, and output files that resume."""

import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.types import RlhfError

Row = dict[str, Any]


def read_objects(lines: Iterable[bytes], example: str) -> Iterator[tuple[int, Row]]:
    """Yield every row with its line number; empty lines are skipped.

    Args: example shows the expected row in the error message. Raises RlhfError naming the line that is not an object.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RlhfError(f"row {number} is not JSON ({error}): write one object per line, in UTF-8") from error
        if not isinstance(row, dict):
            raise RlhfError(f"row {number} is not a JSON object: write {example}")
        yield number, row


class StandardOutput:
    """Rows written to standard output; never resumed."""

    done = 0

    def check(self, number: int, columns: Row) -> None:
        """Unreachable: there are no earlier rows to compare with."""
        raise AssertionError(number, columns)

    def write(self, rows: Iterable[Row]) -> None:
        """Print rows and flush."""
        for row in rows:
            print(_line(row))
        sys.stdout.flush()

    def close(self) -> None:
        """Leave standard output open."""


class RowFile:
    """Output file that resumes when the same command runs again after an interruption.

    The settings that determine the rows are stored in `NAME.settings.json`, so that a different command does not resume
    the file.

    Attributes:
        done: number of complete rows when the file was opened; an incomplete last row is cut off.
    """

    def __init__(self, path: Path, settings: Row, added: Collection[str]) -> None:
        """Open or create the file.

        Args: added are the output columns that the input rows do not have.
        Raises RlhfError if the file was made with other or unknown settings.
        """
        self._path, self._added, self.done = path, added, 0
        settings_path = path.with_name(f"{path.name}.settings.json")
        if path.exists() and path.stat().st_size:
            _require_same(path, settings_path, settings)
        else:
            write_json(settings_path, settings)
        self._file = path.open("a+b")
        self._file.seek(0)
        length = 0
        for line in self._file:
            if line.endswith(b"\n"):
                self.done, length = self.done + 1, length + len(line)
        self._file.truncate(length)
        self._earlier = path.open("rb")

    def check(self, number: int, columns: Row) -> None:
        """Compare the next finished row with the input row that it should come from.

        Raises RlhfError, naming the row, if it came from another.
        """
        try:
            row = json.loads(self._earlier.readline())
            earlier = {name: value for name, value in row.items() if name not in self._added}
        except (ValueError, AttributeError) as error:
            raise RlhfError(f"{self._path} is damaged at row {number}: remove it and start again") from error
        if json.dumps(earlier) != json.dumps(columns):
            raise RlhfError(
                f"{self._path} was made from another input: row {number} differs. Give the same input to resume, or "
                "another --out"
            )

    def write(self, rows: Iterable[Row]) -> None:
        """Append rows and wait until they are on disk."""
        self._file.write("".join(f"{_line(row)}\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._earlier.close()


def _line(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False)
    # A lone surrogate, which a column may contain as an escape, can only be written as an escape.
    return text if text.isascii() or not _has_surrogates(text) else json.dumps(row)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _require_same(path: Path, settings_path: Path, settings: Row) -> None:
    if not settings_path.exists():
        raise RlhfError(f"--out={path} exists, but {settings_path.name} with its settings does not: use another file")
    before, now = read_json(settings_path), json.loads(json.dumps(settings))
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise RlhfError(
            f"--out={path} was made with other settings: "
            + "; ".join(f"{name} was {before.get(name)!r} and is now {now[name]!r}" for name in differing)
            + ". Use another file or the earlier settings"
        )
