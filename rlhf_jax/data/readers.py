"""Readers for JSON lines (optionally compressed), JSON, Parquet, CSV and Arrow files. Errors name the damaged row."""

import codecs
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from rlhf_jax.types import RlhfError

Row: TypeAlias = dict[str, Any]

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; pyarrow also reads truncated ones


def read_file(file: Path) -> list[Row]:
    """Read every row of a file, by its suffix. Raises RlhfError, with file and row, if it is damaged."""
    for suffix, read in _READERS.items():
        if file.name.lower().endswith(suffix):
            return read(file)
    raise RlhfError(f"{file} has an unknown file type: give one of {', '.join(_READERS)}")


def _read_jsonl(file: Path) -> list[Row]:
    open_file = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix.lower(), open)
    rows = []
    try:
        with open_file(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    rows.append(_parse_object(line, f"{file}, row {len(rows) + 1}"))
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise RlhfError(
            f"{file}, row {len(rows) + 1}: truncated or damaged from here on ({error}): copy the file again"
        ) from error
    return rows


def _parse_object(line: bytes, where: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RlhfError(
            f"{where} is not JSON ({error}): correct it, or copy the file again if it is truncated"
        ) from error
    return _object(value, where)


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise RlhfError(f"{where} is not a JSON object of columns and values: write {{...}}")
    return value


def _read_json(file: Path) -> list[Row]:
    content = file.read_bytes()
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _read_jsonl(file)
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RlhfError(f"{file} is not JSON ({error}): correct it, or copy it again if it is truncated") from error
    return [_object(value, f"{file}, row {number}") for number, value in enumerate(values, start=1)]


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(file).read().to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RlhfError(_damaged(file, "Parquet", error)) from error


def _read_arrow(file: Path) -> list[Row]:
    import pyarrow as pa

    content = file.read_bytes()
    try:
        rows = pa.ipc.open_stream(content).read_all().to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RlhfError(_damaged(file, "Arrow", error)) from error
    if not content.endswith(_END_OF_STREAM):
        raise RlhfError(f"{file} is truncated after row {len(rows)}: copy it again")
    return rows


def _damaged(file: Path, format: str, error: Exception) -> str:
    return f"{file} cannot be read as {format} (" + str(error).partition("\n")[0] + "): copy or write it again"


def _read_csv(file: Path) -> list[Row]:
    limit = csv.field_size_limit(sys.maxsize)  # the default rejects texts of more than 131,072 characters
    try:
        with open(file, "rb") as lines:
            if lines.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                lines.seek(0)
            return _parse_csv(lines, file)
    finally:
        csv.field_size_limit(limit)


def _parse_csv(lines: Iterable[bytes], file: Path) -> list[Row]:
    # Decoded line by line, so that the error names the row of an invalid byte.
    reader = csv.reader((line.decode("utf-8") for line in lines), strict=True)
    rows: list[Row] = []
    try:
        header = _header(next(reader, []), file)
        for values in filter(None, reader):
            if len(values) != len(header):
                raise RlhfError(
                    f"{file}, row {len(rows) + 1} (line {reader.line_num}) has {len(values)} values for {len(header)} "
                    "columns: quote values that contain commas, or copy the file again if it is truncated"
                )
            rows.append(dict(zip(header, values, strict=True)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise RlhfError(
            f"{file}, row {len(rows) + 1} (line {reader.line_num}) is not CSV in UTF-8 ({error}): correct it, or copy "
            "the file again if it is truncated"
        ) from error
    return rows


def _header(names: list[str], file: Path) -> list[str]:
    if len(set(names)) < len(names) or "" in names:
        raise RlhfError(f"{file}: the header ({', '.join(names)}) must give every column a distinct name")
    return names


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.xz": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
