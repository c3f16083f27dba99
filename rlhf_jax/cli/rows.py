"""Rows of JSON that verbs read and write: one object a line, numbered from 1, and files that go on where they ended."""

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
    """Every row with the number of its line; empty lines are left out.

    Args: example is a row as it should be. Raises RlhfError naming the line that holds none.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RlhfError(f"row {number} is not JSON ({error}): write one object a line, in UTF-8") from error
        if not isinstance(row, dict):
            raise RlhfError(f"row {number} is no JSON object: write {example}")
        yield number, row


class StandardOutput:
    """Rows on standard output, where nothing stands before them."""

    done = 0

    def check(self, number: int, columns: Row) -> None:
        """Has no row to compare with."""
        raise AssertionError(number, columns)

    def write(self, rows: Iterable[Row]) -> None:
        """Hands rows on at once."""
        for row in rows:
            print(_line(row))
        sys.stdout.flush()

    def close(self) -> None:
        """Leaves standard output open."""


class RowFile:
    """A file of rows that the same command goes on with, whatever ended the one before.

    Beside it, in `NAME.settings.json`, stands what the rows depend on, so that another command does not go on with it.

    Attributes:
        done: how many whole rows it held when it was opened; half a row after them is cut off.
    """

    def __init__(self, path: Path, settings: Row, gained: Collection[str]) -> None:
        """Opens, or makes, the file.

        Args: gained are the columns that rows have here and did not have where they were read.
        Raises RlhfError where other settings made the file, or none that are known.
        """
        self._path, self._gained, self.done = path, gained, 0
        beside = path.with_name(f"{path.name}.settings.json")
        if path.exists() and path.stat().st_size:
            _require_same(path, beside, settings)
        else:
            write_json(beside, settings)
        self._file = path.open("a+b")
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if line.endswith(b"\n"):
                self.done, whole = self.done + 1, whole + len(line)
        self._file.truncate(whole)
        self._earlier = path.open("rb")

    def check(self, number: int, columns: Row) -> None:
        """Compares the next of the rows that are done with what it should be made from.

        Raises RlhfError, naming the row by its number, where it was made from another.
        """
        try:
            found = json.loads(self._earlier.readline())
            columns_there = {name: value for name, value in found.items() if name not in self._gained}
        except (ValueError, AttributeError) as error:
            raise RlhfError(
                f"{self._path} is damaged where row {number} should be: remove it, and begin anew"
            ) from error
        if json.dumps(columns_there) != json.dumps(columns):
            raise RlhfError(
                f"{self._path} was made from other rows: row {number} of the input is not what it holds there. Give "
                "the same input to go on, or another --out"
            )

    def write(self, rows: Iterable[Row]) -> None:
        """Appends rows, and does not return before they are on disk."""
        self._file.write("".join(f"{_line(row)}\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        self._earlier.close()


def _line(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False)
    # Half of a surrogate pair, which a column may hold as an escape, can only be written as one.
    return text if text.isascii() or not _has_surrogates(text) else json.dumps(row)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _require_same(path: Path, beside: Path, settings: Row) -> None:
    if not beside.exists():
        raise RlhfError(f"--out={path} is there, and {beside.name}, which says what made it, is not: name another file")
    there, now = read_json(beside), json.loads(json.dumps(settings))
    differing = [name for name in now if there.get(name) != now[name]]
    if differing:
        raise RlhfError(
            f"--out={path} was made otherwise: "
            + "; ".join(f"{name} {there.get(name)!r} there, {now[name]!r} now" for name in differing)
            + ". Name another file, or say what was said then"
        )
