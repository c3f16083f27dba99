"""Numbered rows of a DataFrame or list, and float32 values in decimal."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd


def numbered(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its number, counted from 1, for error messages."""
    records = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    for number, row in enumerate(records, start=1):
        yield number, {str(name): value for name, value in row.items()}


def shortest(values: Iterable[np.floating]) -> list[float]:
    """Convert float32 values to the shortest decimals that round-trip."""
    return [float(str(value)) for value in values]
