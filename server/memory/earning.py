"""Which short-term memories are worth keeping: the scorer's formula for a memory as it is new.

A memory that lives for a day at most is scored without its age: it would only tell how late the
question is asked. Sentiment and goals are the meditation's to find, and count as unknown here.
"""

from typing import Final

from server.memory.short_term_bodies import Kept
from server.preferences import ScoringWeights

PROMOTION_SCORE: Final = 0.55
"""A memory that nobody said anything about has 0.5 by the usual weights; a thumb up makes it
0.59, a helpful answer 0.60, ten repetitions 0.55."""

_UNKNOWN: Final = 0.5
_OFTEN: Final = 10
_ROUNDING: Final = 1e-6


def fresh_score(kept: Kept, weights: ScoringWeights) -> float:
    """Return what the scorer would find of a memory that was seen just now, 0 to 1."""
    memory = kept.memory
    emotional_weight = _UNKNOWN if memory.feedback is None else memory.feedback
    # The contract promises that what helped once earns it. How often queries returned it counts
    # from its first meditation on.
    predictive_value = min((kept.useful_count + 1) / 2, 1)
    recency_frequency = (1 + min(memory.use_count / _OFTEN, 1)) / 2
    total = (
        weights.relevance_to_goals * _UNKNOWN
        + weights.emotional_weight * emotional_weight
        + weights.predictive_value * predictive_value
        + weights.recency_frequency * recency_frequency
    )
    return min(max(total, 0), 1)


def has_earned(kept: Kept, weights: ScoringWeights) -> bool:
    """Tell whether a memory is worth keeping: by its score, or because its user said so."""
    return kept.memory.is_protected or fresh_score(kept, weights) >= PROMOTION_SCORE - _ROUNDING
