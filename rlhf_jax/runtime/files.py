"""Files that are whole or absent, and row files that can be cut back to a step."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from rlhf_jax.types import RlhfError


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: into a temporary neighbour, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises RlhfError naming the file where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RlhfError(f"{path} cannot be read ({error}): delete its stage's directory and run again") from error


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSONL file, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that this package wrote; a last line without its end (a killed process) is left out."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


class RowWriter:
    """Appends rows, each with a `step`, to a JSONL file; on opening, cuts off what is later than a step."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Keeps the rows up to `after_step`, and an empty file where there are none."""
        kept = [row for row in read_rows(path) if row["step"] <= after_step]
        write_rows(path, kept)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows to the buffer."""
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Puts all rows so far on disk, before the checkpoint that follows them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._file.close()
