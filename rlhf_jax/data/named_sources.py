"""Tables that are named instead of stored in a file: `tfds:`, `hub:` and `arithmetic:`.

The libraries behind them are imported when a source needs them: TFDS takes half a second, and `datasets` is optional.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf_jax.data import arithmetic
from rlhf_jax.data.readers import Row
from rlhf_jax.types import RlhfError

TFDS, HUB = "tfds:", "hub:"


class NamedSource(NamedTuple):
    """A kind of named table: the beginning of its names, and functions of a name."""

    prefix: str
    read: Callable[[str], list[Row]]
    content_hash: Callable[[str], str]  # identifies the content


def named_source(source: str) -> NamedSource | None:
    """Return the kind of a named table; None for a file or directory."""
    return next((kind for kind in SOURCES if source.startswith(kind.prefix)), None)


def _tfds_name(source: str) -> tuple[str, str]:
    name, _, split = source.removeprefix(TFDS).rpartition("/")
    if not name or not split:
        raise RlhfError(f"{source} has no split: write {TFDS}NAME/SPLIT, as in {TFDS}movie_reviews/train")
    return name, split


def _read_tfds(source: str) -> list[Row]:
    from rlhf_jax.data import builders

    return builders.load_split(*_tfds_name(source))


def _hash_tfds(source: str) -> str:
    from rlhf_jax.data import builders

    name, split = _tfds_name(source)
    return hashlib.sha256(f"{builders.full_name(name)}/{split}".encode()).hexdigest()


def _hub_name(source: str) -> tuple[str, str | None, str]:
    """Split `hub:NAME[:CONFIG]/SPLIT` into name, config and split."""
    place, _, split = source.removeprefix(HUB).rpartition("/")
    name, _, config = place.partition(":")
    if not name or not split:
        raise RlhfError(
            f"{source} has no split: write {HUB}OWNER/NAME/SPLIT, or {HUB}OWNER/NAME:CONFIG/SPLIT, as in "
            f"{HUB}openai/gsm8k:main/train"
        )
    return name, config or None, split


@functools.lru_cache(maxsize=8)
def _load_hub(source: str) -> list[Row]:
    """Load a split of a data set on the Hub, or of a directory with the layout of one. Raises RlhfError if it fails."""
    name, config, split = _hub_name(source)
    try:
        import datasets  # pyrefly: ignore[missing-import] - optional
    except ImportError as error:
        raise RlhfError(f"{source} needs the library datasets: pip install 'rlhf-jax[datasets]'") from error
    try:
        return datasets.load_dataset(name, config, split=split).to_list()
    except Exception as error:  # from datasets, the hub client, or the network
        reason = str(error).strip().partition("\n")[0]
        raise RlhfError(f"{source} cannot be loaded: {type(error).__name__}: {reason}") from error


def _rows_hash(rows: list[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, default=_as_text).encode()).hexdigest()


def _as_text(value: Any) -> str:
    """Write a value that JSON lacks, such as a date."""
    return str(value)


@functools.lru_cache(maxsize=8)
def _hash_hub(source: str) -> str:
    return _rows_hash(_load_hub(source))


def _generate(source: str) -> list[Row]:
    return arithmetic.generate(arithmetic.parse(source))


SOURCES = (
    NamedSource(TFDS, _read_tfds, _hash_tfds),
    NamedSource(HUB, lambda source: [dict(row) for row in _load_hub(source)], _hash_hub),
    NamedSource(arithmetic.PREFIX, _generate, lambda source: _rows_hash(_generate(source))),
)
"""Kinds of named tables."""
