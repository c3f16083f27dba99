"""gold: fits the judge that stands in for the person to people's ratings of the training split."""

import dataclasses
from typing import Any, Literal

import numpy as np

from rlhf_jax.data import pipeline
from rlhf_jax.data.formats import require_columns
from rlhf_jax.rewards import lexicon, tfidf_ridge
from rlhf_jax.rewards.tfidf_ridge import TfidfRidge, TfidfRidgeConfig
from rlhf_jax.stages.context import Context


@dataclasses.dataclass(frozen=True)
class GoldConfig:
    """The judge, and the column with the mean human rating."""

    kind: Literal["gold"]
    model: TfidfRidgeConfig
    rating: str


def run(config: GoldConfig, context: Context) -> dict[str, Any]:
    """Writes `judge.joblib`; reports its correlation with people on the evaluation split, beside VADER's."""
    train, held_out = (pipeline.load_rows(context.data, split) for split in ("train", "eval"))
    for split, rows in (("train", train), ("eval", held_out)):
        require_columns(rows, ["text", config.rating], context.data.source(split))
    judge = tfidf_ridge.fit(config.model, [row["text"] for row in train], [row[config.rating] for row in train])
    judge.save(context.directory / "judge.joblib")
    texts, ratings = [row["text"] for row in held_out], [row[config.rating] for row in held_out]
    summary = {
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "correlation": _correlation(judge.score(texts), ratings),
        "vader_correlation": _correlation(lexicon.vader(texts), ratings),
    }
    context.bar.update(1, 1, {"correlation": summary["correlation"]})
    return summary


def load_judge(context: Context, stage: str) -> TfidfRidge:
    """The judge that an earlier gold stage fitted."""
    return tfidf_ridge.load(context.workdir.find(stage) / "judge.joblib")


def _correlation(scores: np.ndarray, ratings: list[float]) -> float:
    return float(np.corrcoef(scores, ratings)[0, 1])
