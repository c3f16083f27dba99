"""Judges of texts fitted to people's ratings or labels: linear models on TF-IDF unigrams and bigrams.

They stand in for the person, as the gold reward model does in Gao et al. 2022 (arXiv:2210.10760), or the sentiment
classifier in Rafailov et al. 2023 (arXiv:2305.18290, section 6.1).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
from jaxtyping import Float
from sklearn.base import is_classifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline

from rlhf_jax.config import Count, NonNegative, Positive
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class TfidfRidgeConfig:
    """Ridge regression on ratings: the penalty, and the least number of texts that a word or a pair must occur in."""

    alpha: NonNegative  # L2 penalty
    min_df: Count  # fewest texts that a word or pair of words must occur in


@dataclasses.dataclass(frozen=True)
class TfidfLogisticConfig:
    """Logistic regression on two labels: the inverse penalty, and the least number of texts, as for ratings."""

    inverse_penalty: Positive  # inverse of the L2 penalty (scikit-learn's C)
    min_df: Count  # fewest texts that a word or pair of words must occur in


class TfidfJudge:
    """A fitted judge."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Wraps a fitted scikit-learn pipeline."""
        self._pipeline = pipeline

    def score(self, texts: Sequence[str]) -> Float[np.ndarray, "N"]:
        """The rating expected for each text, on the scale of the ratings, or the log-odds of the higher label."""
        classifier = is_classifier(self._pipeline)
        function = self._pipeline.decision_function if classifier else self._pipeline.predict
        return np.asarray(function(list(texts)), np.float64)

    def save(self, path: Path) -> None:
        """Writes the judge, whole or not at all."""
        temporary = path.with_suffix(".tmp")
        joblib.dump(self._pipeline, temporary)
        temporary.replace(path)


def fit(config: TfidfRidgeConfig | TfidfLogisticConfig, texts: Sequence[str], ratings: Sequence[float]) -> TfidfJudge:
    """A judge fitted to rated texts: sublinear term frequencies, lower case, words of any length and their pairs.

    Raises RlhfError where labels are wanted and there are not two.
    """
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=config.min_df, token_pattern=r"(?u)\b\w[\w']*\b"
    )
    if isinstance(config, TfidfRidgeConfig):
        return TfidfJudge(make_pipeline(vectorizer, Ridge(alpha=config.alpha)).fit(texts, ratings))
    labels = sorted(set(ratings))
    if len(labels) != 2:
        shown = ", ".join(map(str, labels[:5]))
        raise RlhfError(
            f"a logistic judge needs two labels, and the data has {len(labels)} ({shown}): use a regression"
        )
    classifier = LogisticRegression(C=config.inverse_penalty, max_iter=1000)
    return TfidfJudge(make_pipeline(vectorizer, classifier).fit(texts, ratings))


def load(path: Path) -> TfidfJudge:
    """A judge that `save` wrote. Raises RlhfError naming the file where it cannot be read."""
    try:
        return TfidfJudge(joblib.load(path))
    except Exception as error:  # unpickling raises anything
        raise RlhfError(f"{path} is not a readable judge ({error}): delete its stage's directory, run again") from error
