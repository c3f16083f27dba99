"""gold: fit a judge to human ratings or labels of the training split; it stands in for a human."""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from rlhf_jax import processes
from rlhf_jax.data import pipeline
from rlhf_jax.data.formats import require_columns
from rlhf_jax.loading.context import Context
from rlhf_jax.rewards import lexicon, tfidf
from rlhf_jax.rewards.gold_judges import JUDGE_FILE
from rlhf_jax.rewards.tfidf import TfidfLogisticConfig, TfidfRidgeConfig
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class GoldConfig:
    """The judge's model, and the column that it is fitted to."""

    kind: Literal["gold"]
    model: TfidfRidgeConfig | TfidfLogisticConfig  # regression on ratings, or classification of labels
    rating: str  # column with the mean human rating, or with one of two labels


def run(config: GoldConfig, context: Context) -> dict[str, Any]:
    """Write `judge.joblib`, and report its and VADER's correlation with the ratings of the validation split."""
    train, held_out = (pipeline.load_rows(context.data, split) for split in ("train", "eval"))
    for split, rows in (("train", train), ("eval", held_out)):
        require_columns(rows, ["text", config.rating], context.data.source(split))
    labels = isinstance(config.model, TfidfLogisticConfig)
    given, ratings = (
        _ratings(rows, config.rating, context.data.source(split), labels=labels)
        for split, rows in (("train", train), ("eval", held_out))
    )
    judge = tfidf.fit(config.model, [row["text"] for row in train], given)
    if processes.is_first():
        judge.save(context.directory / JUDGE_FILE)
    texts = [row["text"] for row in held_out]
    scores = judge.score(texts)
    figures: dict[str, float | None] = {
        "correlation": _correlation(scores, ratings),
        "vader_correlation": _correlation(lexicon.vader(texts), ratings),
    }
    if isinstance(config.model, TfidfLogisticConfig):
        figures["accuracy"] = float(np.mean((scores > 0) == (np.array(ratings) == max(given))))
    shown = {name: value for name, value in figures.items() if name != "vader_correlation" and value is not None}
    context.bar.update(1, 1, shown)
    return {"train_rows": len(train), "eval_rows": len(held_out), **figures}


def _ratings(rows: list[dict[str, Any]], column: str, source: str, *, labels: bool) -> list[float]:
    """Return the ratings of a table as numbers; a CSV file has them as texts, and True and False become 1 and 0.

    Raises RlhfError, naming the row, for a value that is not a finite number.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        value = row[column]
        try:
            rating = float(value)
        except (OverflowError, TypeError, ValueError):
            rating = math.nan
        if not math.isfinite(rating):
            kind = "one of two numbers that are the labels" if labels else "a finite number"
            raise RlhfError(
                f"{source}, row {number}, column {column} is {value!r:.100}: give {kind}, or remove the row"
            )
        found.append(rating)
    return found


def _correlation(scores: np.ndarray, ratings: list[float]) -> float | None:
    """Pearson's correlation; None if either side does not vary."""
    if np.ptp(scores) == 0 or np.ptp(ratings) == 0:
        return None
    return float(np.corrcoef(scores, ratings)[0, 1])
