"""Preferences and demonstrations that one stage writes and a later stage trains on."""

from typing import NamedTuple

import numpy as np

from rlhf_jax.data import formats, pipeline
from rlhf_jax.loading.context import Context
from rlhf_jax.types import RlhfError, Row


class Files(NamedTuple):
    """Names of a table's training and evaluation files in a stage's directory."""

    train: str
    eval: str


PREFERENCES = Files("preferences.jsonl", "preferences_eval.jsonl")
DEMONSTRATIONS = Files("demonstrations.jsonl", "demonstrations_eval.jsonl")

READING = "reading and encoding the data"
"""Activity that the progress display shows."""


def load_preferences(context: Context, stage: str | None) -> tuple[list[dict], list[dict]]:
    """Load training and held-out pairs from an earlier stage, or from the experiment's data if stage is None."""
    context.bar.now(READING)
    if stage is not None:
        directory = context.workdir.find(stage)
        rows = [formats.read_table(str(directory / name)) for name in PREFERENCES]
    else:
        rows = [pipeline.load_rows(context.data, split) for split in ("train", "eval")]
        for split, table in zip(("train", "eval"), rows, strict=True):
            formats.require_columns(table, ["prompt", "chosen", "rejected"], context.data.source(split))
    return rows[0], rows[1]


def evaluation_rows(rows: list[Row], most: int | None) -> list[Row]:
    """Draw at most so many rows for evaluations during training: the same for all runs, in their order."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[place] for place in np.sort(np.random.default_rng(0).permutation(len(rows))[:most])]


def load_demonstrations(context: Context, stage: str | None) -> tuple[list[dict], list[dict]]:
    """Load training and held-out rows for SFT from an earlier stage, or from the experiment's data if stage is None.

    If the stage wrote preferences, SFT trains on the chosen responses ("Preferred-FT", the baseline of Rafailov et al.
    2023, arXiv:2305.18290). Raises RlhfError if it wrote neither preferences nor demonstrations.
    """
    context.bar.now(READING)
    if stage is None:
        return pipeline.load_rows(context.data, "train"), pipeline.load_rows(context.data, "eval")
    directory = context.workdir.find(stage)
    if (directory / PREFERENCES.train).exists():
        return load_preferences(context, stage)
    if not (directory / DEMONSTRATIONS.train).exists():
        raise RlhfError(
            f"config.{context.name}.demonstrations = {stage!r}, a stage that wrote no demonstrations or preferences: "
            "name a stage of kind rejection_sampling or preferences, or None for the experiment's data"
        )
    train, held_out = (formats.read_table(str(directory / name)) for name in DEMONSTRATIONS)
    return train, held_out
