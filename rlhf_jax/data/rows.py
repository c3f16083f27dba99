"""Rows of data from Python code, and their encoding for your own training loops."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlhf_jax.data import pipeline
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.data.ragged import pair_table
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import PreferenceBatch

NO_TRUNCATION = DataConfig(
    train="", eval="", test=None, limit=None, text_prompt_tokens=(1, 1), max_prompt_tokens=2**30,
    max_response_tokens=2**30,
)  # fmt: skip
"""Lengths that no text exceeds."""


def load_rows(source: str | Path) -> list[dict[str, Any]]:
    """Read and check the rows of a table.

        rows = load_rows("runs/smoke/preferences/preferences.jsonl")

    Args: source is a JSONL (also .gz, .xz), Parquet or CSV file, a Hugging Face dataset directory, or
        `tfds:NAME/SPLIT`.

    Returns: a dict a row. Preferences come out as `prompt, chosen, rejected`, where the prompt was implicit too; other
    columns are kept.

    Raises RlhfError naming file and row where a value is missing or is neither text nor chat.
    """
    return pipeline.load_rows(dataclasses.replace(NO_TRUNCATION, train=str(source)), "train")


def encode_preferences(
    rows: pd.DataFrame | Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> PreferenceBatch[np.ndarray]:
    """Encode pairs as arrays: `chosen` and `rejected`, each a `Sequences` of N rows padded to the longest.

        batch = encode_preferences(rows, policy.tokenizer, max_prompt_tokens=64, max_response_tokens=64)

    Args: rows have `prompt`, `chosen` and `rejected`, texts or chats. Lengths are in tokens, BOS and EOS included;
        longer prompts are cut at their start and longer responses at their end.
    """
    pairs = pipeline.preferences(
        [row for _, row in numbered(rows)], tokenizer, limited(max_prompt_tokens, max_response_tokens)
    )
    return pair_table(pairs).all()


def limited(max_prompt_tokens: int, max_response_tokens: int) -> DataConfig:
    """Make the data section of given lengths that names no files."""
    return dataclasses.replace(
        NO_TRUNCATION, max_prompt_tokens=max_prompt_tokens, max_response_tokens=max_response_tokens
    )


def numbered(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its number, counted from 1, for error messages."""
    records = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    for number, row in enumerate(records, start=1):
        yield number, {str(name): value for name, value in row.items()}


def shortest(values: Iterable[np.floating]) -> list[float]:
    """Convert float32 values to the shortest decimals that round-trip."""
    return [float(str(value)) for value in values]
