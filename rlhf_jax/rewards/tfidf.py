"""Judges of texts fitted to human ratings or labels: linear models on TF-IDF unigrams and bigrams.

scikit-learn takes more than a second to import, so it is imported only when a judge is fitted or loaded. The judges
stand in for human judges, like the gold reward model in Gao et al. 2022 (arXiv:2210.10760) and the sentiment
classifier in Rafailov et al. 2023 (arXiv:2305.18290, section 6.1).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from rlhf_jax.config import Count, NonNegative, Positive
from rlhf_jax.types import RlhfError

if TYPE_CHECKING:
    import sklearn.pipeline


@dataclasses.dataclass(frozen=True)
class TfidfRidgeConfig:
    """Ridge regression on ratings: penalty, and minimum document frequency of unigrams and bigrams."""

    alpha: NonNegative  # L2 penalty
    min_df: Count  # minimum number of texts that contain a unigram or bigram


@dataclasses.dataclass(frozen=True)
class TfidfLogisticConfig:
    """Logistic regression on two labels: inverse penalty, and minimum document frequency."""

    inverse_penalty: Positive  # inverse of the L2 penalty (scikit-learn's C)
    min_df: Count  # minimum number of texts that contain a unigram or bigram


class TfidfJudge:
    """Judge that scores single texts with a fitted scikit-learn pipeline."""

    def __init__(self, pipeline: "sklearn.pipeline.Pipeline") -> None:
        """Wrap a fitted scikit-learn pipeline."""
        self._pipeline = pipeline

    def score(self, texts: Sequence[str]) -> Float[np.ndarray, "N"]:
        """Predict the rating of each text, or the log-odds of the higher label."""
        function = getattr(self._pipeline, "decision_function", self._pipeline.predict)
        return np.asarray(function(list(texts)), np.float64)

    def save(self, path: Path) -> None:
        """Write the judge atomically."""
        import joblib

        temporary = path.with_suffix(".tmp")
        joblib.dump(self._pipeline, temporary)
        temporary.replace(path)


def fit(config: TfidfRidgeConfig | TfidfLogisticConfig, texts: Sequence[str], ratings: Sequence[float]) -> TfidfJudge:
    """Fit a judge on sublinear TF-IDF features of lower-cased words of any length and their bigrams.

    Raises RlhfError if a logistic judge's data does not have exactly two labels.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=config.min_df, token_pattern=r"(?u)\b\w[\w']*\b"
    )
    if isinstance(config, TfidfRidgeConfig):
        return TfidfJudge(make_pipeline(vectorizer, Ridge(alpha=config.alpha)).fit(texts, ratings))
    labels = sorted(set(ratings))
    if len(labels) != 2:
        shown = ", ".join(map(str, labels[:5]))
        raise RlhfError(
            f"a logistic judge needs two labels, but the data has {len(labels)} ({shown}): use ridge regression"
        )
    classifier = LogisticRegression(C=config.inverse_penalty, max_iter=1000)
    return TfidfJudge(make_pipeline(vectorizer, classifier).fit(texts, ratings))


def load(path: Path) -> TfidfJudge:
    """Load a judge that `save` wrote. Raises RlhfError, naming the file, if it cannot be read."""
    import joblib

    try:
        return TfidfJudge(joblib.load(path))
    except Exception as error:  # unpickling can raise any exception
        raise RlhfError(f"{path} is not a readable judge ({error}): delete its stage's directory, run again") from error
