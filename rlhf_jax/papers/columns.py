"""Values of a paper's table of results, for statistics and nulls."""

from collections.abc import Callable

import numpy as np
import pandas as pd


def per_seed(table: pd.DataFrame, column: str, **where: object) -> np.ndarray:
    """Select a column's values, one per seed, in the rows where other columns have the given values."""
    rows = np.logical_and.reduce([table[name] == value for name, value in where.items()])
    return table[rows].sort_values("seed")[column].to_numpy()


def exchanged(column: str, one: str, other: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Make a null that exchanges two values of a column, such as two methods."""
    return lambda table: table.assign(**{column: table[column].replace({one: other, other: one})})
