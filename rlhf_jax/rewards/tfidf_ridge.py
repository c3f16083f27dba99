"""A judge of texts fitted to people's ratings: ridge regression on TF-IDF unigrams and bigrams.

It stands in for the person, as the gold reward model does in Gao et al. 2022 (arXiv:2210.10760).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline

from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class TfidfRidgeConfig:
    """Ridge penalty, and the least number of texts that a unigram or bigram must occur in."""

    alpha: float
    min_df: int


class TfidfRidge:
    """A fitted judge."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Wraps a fitted scikit-learn pipeline."""
        self._pipeline = pipeline

    def score(self, texts: Sequence[str]) -> Float[np.ndarray, "N"]:
        """The rating expected for each text, on the scale of the ratings it was fitted to."""
        return np.asarray(self._pipeline.predict(list(texts)), np.float64)

    def save(self, path: Path) -> None:
        """Writes the judge, whole or not at all."""
        temporary = path.with_suffix(".tmp")
        joblib.dump(self._pipeline, temporary)
        temporary.replace(path)


def fit(config: TfidfRidgeConfig, texts: Sequence[str], ratings: Sequence[float]) -> TfidfRidge:
    """A judge fitted to rated texts: sublinear term frequencies, lower case, words of any length and their pairs."""
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=config.min_df, token_pattern=r"(?u)\b\w[\w']*\b"
    )
    return TfidfRidge(make_pipeline(vectorizer, Ridge(alpha=config.alpha)).fit(texts, ratings))


def load(path: Path) -> TfidfRidge:
    """A judge that `save` wrote. Raises RlhfError naming the file where it cannot be read."""
    try:
        return TfidfRidge(joblib.load(path))
    except Exception as error:  # unpickling raises anything
        raise RlhfError(f"{path} is not a readable judge ({error}): delete its stage's directory, run again") from error
