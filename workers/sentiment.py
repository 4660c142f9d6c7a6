"""Sentiment of texts by VADER (Hutto & Gilbert, 2014): a lexicon and rules, no model."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_READ_CHARACTERS = 4000
"""VADER is made for short texts and its time grows with the square of their length."""


def sentiments(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return (compound + 1) / 2 of each text: 0 is bad, 0.5 neutral, 1 good."""
    analyzer = _analyzer()
    compounds = [analyzer.polarity_scores(text[:_READ_CHARACTERS])["compound"] for text in texts]
    return ((np.array(compounds, np.float64) + 1) / 2).astype(np.float32)


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()
