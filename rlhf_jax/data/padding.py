"""Pad sequences of different lengths to one array and its mask."""

from collections.abc import Sequence

import numpy as np


def pad_right(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad with 0 on the right to int32[N, width]; also return the mask."""
    tokens, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), bool)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask


def pad_left(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad with 0 on the left to int32[N, width]; also return the mask."""
    tokens, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), bool)
    for row, ids in enumerate(sequences):
        tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
    return tokens, mask
