"""Atomic file writes, and row files that can be truncated to a step. The first of several processes writes alone."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from rlhf_jax.processes import is_first
from rlhf_jax.types import Json, RlhfError, Row


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, by renaming a temporary file."""
    if not is_first():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def measured(value: float) -> float | None:
    """Convert NaN, such as the standard error of a single row, to None, which JSON can represent."""
    return None if math.isnan(value) else value


def write_json(path: Path, value: Json) -> None:
    """Write indented JSON atomically. Raises RlhfError for a number that is not finite."""
    write_text(path, _encode(value, path, indent=2) + "\n")


def read_json(path: Path) -> Json:
    """Read JSON. Raises RlhfError naming the file if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RlhfError(f"{path} cannot be read ({error}): delete its stage's directory and run again") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a JSONL file atomically. Raises RlhfError for a number that is not finite."""
    write_text(path, "".join(_encode(row, path) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a JSONL file; a last line that a killed process left incomplete is ignored."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _encode(value: Json, path: Path, indent: int | None = None) -> str:
    """Encode as standard JSON. Raises RlhfError for NaN and infinities, which JSON cannot represent."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        places = [f"{place} = {number}" for place, number in _not_finite(value, "")]
        if not places:
            raise
        raise RlhfError(
            f"{path.name}: {', '.join(places[:3])} is not finite and cannot be written as JSON. Either "
            "training diverged or a reward is not finite"
        ) from error


def _not_finite(value: Json, place: str) -> Iterator[tuple[str, float]]:
    """Yield every NaN or infinite number in a JSON value, with its path."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from _not_finite(inner, f"{place}.{key}" if place else str(key))


class RowWriter:
    """Writer that appends rows with a `step` to a JSONL file, after removing rows beyond a given step."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Open a file, keeping only rows up to `after_step`."""
        self._path = path
        kept = [row for row in read_rows(path) if row["step"] <= after_step]
        write_rows(path, kept)
        self._file: TextIO = (path if is_first() else Path(os.devnull)).open("a", encoding="utf-8")

    def write(self, rows: Iterable[Row]) -> None:
        """Add rows to the buffer. Raises RlhfError for a number that is not finite."""
        for row in rows:
            self._file.write(_encode(row, self._path) + "\n")

    def flush(self) -> None:
        """Write all buffered rows to disk."""
        self._file.flush()
        if is_first():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self._file.close()
