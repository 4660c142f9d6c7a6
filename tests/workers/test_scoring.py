"""The scorer against a slow one that says the same in plain Python."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers import scoring

NAN = math.nan


@dataclass(frozen=True)
class Memory:
    days: float
    use_count: int
    retrieved: int
    useful: int
    feedback: float
    sentiment: float
    goal_match: float
    weights: tuple[float, float, float, float]


def reference(memory: Memory) -> tuple[float, float, float, float, float]:
    """Score one memory by the formulas as they are written, a number at a time."""
    relevance = 0.5 if math.isnan(memory.goal_match) else memory.goal_match
    known = [x for x in (memory.feedback, memory.sentiment) if not math.isnan(x)]
    emotional = sum(known) / len(known) if known else 0.5
    helped = (memory.useful + 1) / (memory.retrieved + 2)
    predictive = min(helped * 1 / (1 + memory.days), 1)
    recency = (math.exp(-memory.days / 30) + min(memory.use_count / 10, 1)) / 2
    parts = (relevance, emotional, predictive, recency)
    total = sum(weight * part for weight, part in zip(memory.weights, parts, strict=True))
    return (min(max(total, 0), 1), *parts)


def as_signals(memories: list[Memory]) -> scoring.Signals:
    return scoring.Signals(
        days_since_last_seen=np.array([m.days for m in memories], np.float32),
        use_count=np.array([m.use_count for m in memories], np.int32),
        retrieved_count=np.array([m.retrieved for m in memories], np.int32),
        useful_count=np.array([m.useful for m in memories], np.int32),
        feedback=np.array([m.feedback for m in memories], np.float32),
        sentiment=np.array([m.sentiment for m in memories], np.float32),
        goal_match=np.array([m.goal_match for m in memories], np.float32),
        weights=np.array([m.weights for m in memories], np.float32).reshape(len(memories), 4),
    )


def columns(components: scoring.Components) -> list[np.ndarray]:
    return [
        components.score,
        components.relevance_to_goals,
        components.emotional_weight,
        components.predictive_value,
        components.recency_frequency,
    ]


share = st.floats(0, 1, width=32)
maybe = st.one_of(st.just(NAN), share)
memory = st.builds(
    Memory,
    days=st.floats(0, 5000, width=32),
    use_count=st.integers(0, 2**31 - 1),
    retrieved=st.integers(0, 1000),
    useful=st.integers(0, 1000),
    feedback=maybe,
    sentiment=maybe,
    goal_match=maybe,
    weights=st.tuples(share, share, share, share),
)


@given(st.lists(memory, max_size=40))
def test_vectorised_scorer_agrees_with_the_plain_one(memories: list[Memory]) -> None:
    found = np.array(columns(scoring.score(as_signals(memories))), np.float64)
    expected = np.array([reference(m) for m in memories], np.float64).reshape(len(memories), 5)
    assert np.allclose(found.T, expected, rtol=0, atol=1e-6)
    assert np.all((found >= 0) & (found <= 1))


@given(st.lists(memory, min_size=2, max_size=40), st.data())
def test_scores_are_bit_equal_however_the_batch_is_cut(
    memories: list[Memory], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(memories) - 1))
    whole = columns(scoring.score(as_signals(memories)))
    head = columns(scoring.score(as_signals(memories[:cut])))
    tail = columns(scoring.score(as_signals(memories[cut:])))
    for all_, first, rest in zip(whole, head, tail, strict=True):
        assert all_.tobytes() == first.tobytes() + rest.tobytes()


def score_of(memory: Memory) -> tuple[float, ...]:
    return tuple(float(column[0]) for column in columns(scoring.score(as_signals([memory]))))


USUAL = (0.4, 0.3, 0.2, 0.1)


def test_memory_of_which_nothing_is_known() -> None:
    new = Memory(0, 0, 0, 0, NAN, NAN, NAN, USUAL)
    assert np.allclose(score_of(new), (0.4 * 0.5 + 0.3 * 0.5 + 0.2 * 0.5 + 0.1 * 0.5, *[0.5] * 4))


def test_emotional_weight_is_the_mean_of_what_is_known() -> None:
    nan = np.float32(NAN)
    feedback = np.array([0.8, 0.8, nan, nan], np.float32)
    sentiment = np.array([0.4, nan, 0.4, nan], np.float32)
    assert np.allclose(scoring.emotional_weight(feedback, sentiment), [0.6, 0.8, 0.4, 0.5])


def test_old_unhelpful_memories_fade() -> None:
    fresh = Memory(0, 10, 10, 9, NAN, 0.5, NAN, USUAL)
    stale = Memory(365, 0, 10, 0, NAN, 0.5, NAN, USUAL)
    assert score_of(fresh)[0] > 0.6 > 0.4 > score_of(stale)[0]


def test_weights_above_one_are_clamped() -> None:
    assert score_of(Memory(0, 99, 0, 0, 1, 1, 1, (1, 1, 1, 1)))[0] == 1


def test_reference_is_not_the_thing_it_checks() -> None:
    """Every field of a memory moves the reference: none is forgotten in both."""
    base = Memory(10, 3, 4, 2, 0.7, 0.2, 0.3, USUAL)
    changed = [5.0, 4, 9, 3, 0.9, 0.9, 0.9, (0.1, 0.2, 0.3, 0.4)]
    for place, value in enumerate(changed):
        values = list(astuple(base))
        values[place] = value
        assert reference(Memory(*values)) != reference(base)
