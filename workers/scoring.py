"""Scorer version 1: how much a memory is worth keeping, from 0 to 1.

Every function takes and returns arrays of one element a memory. Sums are taken in float64 and
rounded once, so that equal inputs give equal bits however they are cut into batches.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

VERSION: Final = 1

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_NEUTRAL = 0.5
_FADING_DAYS = 30.0
_OFTEN = 10.0


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known about n memories. A number that is not known is NaN."""

    days_since_last_seen: Array
    """0 or more."""
    use_count: Array
    retrieved_count: Array
    """How often a query returned the memory."""
    useful_count: Array
    """How often that helped."""
    feedback: Array
    """0 to 1."""
    sentiment: Array
    """0 (bad) to 1 (good)."""
    goal_match: Array
    """0 to 1; NaN where the user has no goals."""
    weights: Array
    """n by 4: of the components, in the order in which `Components` has them."""


@dataclass(frozen=True, slots=True)
class Components:
    """What a score is made of. Everything is float32, 0 to 1."""

    score: Array
    relevance_to_goals: Array
    emotional_weight: Array
    predictive_value: Array
    recency_frequency: Array


def score(signals: Signals) -> Components:
    """Return clamp(w₁·relevance + w₂·emotion + w₃·prediction + w₄·recency, 0, 1) and its parts."""
    days = signals.days_since_last_seen.astype(np.float64)
    parts = (
        relevance_to_goals(signals.goal_match),
        emotional_weight(signals.feedback, signals.sentiment),
        predictive_value(signals.useful_count, signals.retrieved_count, days),
        recency_frequency(days, signals.use_count),
    )
    weights = signals.weights.astype(np.float64)
    # Added one by one in a fixed order: a dot product may choose another for another size.
    total = np.zeros(len(days))
    for place, part in enumerate(parts):
        total += weights[:, place] * part
    return Components(_rounded(np.clip(total, 0, 1)), *map(_rounded, parts))


def relevance_to_goals(goal_match: Array) -> Floats:
    """Return the match with the user's goals, 0.5 where there are none."""
    match = goal_match.astype(np.float64)
    return np.where(np.isnan(match), _NEUTRAL, match)


def emotional_weight(feedback: Array, sentiment: Array) -> Floats:
    """Return the mean of feedback and sentiment, the one that is known, or 0.5."""
    said, felt = feedback.astype(np.float64), sentiment.astype(np.float64)
    # Each stands in for the other where that is unknown.
    said, felt = np.where(np.isnan(said), felt, said), np.where(np.isnan(felt), said, felt)
    mean = (said + felt) / 2
    return np.where(np.isnan(mean), _NEUTRAL, mean)


def predictive_value(useful: Array, retrieved: Array, days: Array) -> Floats:
    """Return min((useful + 1) / (retrieved + 2) · 1 / (1 + days), 1): does retrieving it help?

    Laplace's rule of succession: a memory that was never retrieved counts as one that helped
    half of the times.
    """
    helped: Floats = (useful.astype(np.float64) + 1) / (retrieved.astype(np.float64) + 2)
    # Counts that make no sense, more useful than retrieved, must not leave 0 to 1.
    damped: Floats = np.minimum(helped / (1 + days), 1)
    return damped


def recency_frequency(days: Array, use_count: Array) -> Floats:
    """Return the mean of exp(-days / 30) and min(uses / 10, 1)."""
    often = np.minimum(use_count.astype(np.float64) / _OFTEN, 1)
    mean: Floats = (np.exp(-days / _FADING_DAYS) + often) / 2
    return mean


def _rounded(part: Floats) -> Array:
    return part.astype(np.float32)
