"""VADER's lexicon and rules as a judge of sentiment that no stage here was fitted to (Hutto & Gilbert 2014)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def vader(texts: Sequence[str]) -> Float[np.ndarray, "N"]:
    """VADER's compound score of each text, in -1 (most negative) .. 1 (most positive)."""
    analyzer = SentimentIntensityAnalyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts])
