"""Sentiment score of VADER's lexicon and rules (Hutto & Gilbert 2014), independent of all trained models."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def vader(texts: Sequence[str]) -> Float[np.ndarray, "N"]:
    """Compute VADER's compound score of each text, -1 (most negative) .. 1 (most positive)."""
    analyzer = SentimentIntensityAnalyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts])
