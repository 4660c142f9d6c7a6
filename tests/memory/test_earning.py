"""What a short-term memory must have to earn its place in the long term."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from server.memory.earning import fresh_score, has_earned
from server.memory.model import Memory, Source, Tier
from server.memory.short_term_bodies import Kept
from server.preferences import PRESETS, USUAL_WEIGHTS, ScoringPreset
from tests.conftest import FakeClock
from workers import scoring


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("feedback", [None, 0.2, 0.6, 0.8, 1.0])
@pytest.mark.parametrize(("use_count", "useful_count"), [(0, 0), (3, 0), (25, 0), (0, 1), (0, 4)])
def test_score_is_the_scorer_s_of_a_memory_seen_just_now(
    clock: FakeClock,
    preset: ScoringPreset,
    feedback: float | None,
    use_count: int,
    useful_count: int,
) -> None:
    kept = of(clock, feedback=feedback, use_count=use_count, useful_count=useful_count)
    nan = np.array([np.nan])
    signals = scoring.Signals(
        days_since_last_seen=np.array([0.0]),
        use_count=np.array([use_count]),
        retrieved_count=np.array([0]),
        useful_count=np.array([useful_count]),
        feedback=nan if feedback is None else np.array([feedback]),
        sentiment=nan,
        goal_match=nan,
        weights=np.array([PRESETS[preset]]),
    )
    expected = float(scoring.score(signals).score[0])
    assert fresh_score(kept, PRESETS[preset]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("known", "earned"),
    [
        ({}, False),
        ({"feedback": 0.8}, True),
        ({"feedback": 0.6}, False),
        ({"useful_count": 1}, True),
        ({"use_count": 9}, False),
        ({"use_count": 10}, True),
        ({"feedback": 0.2, "use_count": 10}, False),
        ({"is_protected": True}, True),
    ],
)
def test_what_earns_it_by_the_usual_weights(
    clock: FakeClock, known: dict[str, Any], earned: bool
) -> None:
    assert has_earned(of(clock, **known), USUAL_WEIGHTS) is earned


def of(clock: FakeClock, useful_count: int = 0, **known: Any) -> Kept:
    memory = Memory(
        id=UUID(int=0),
        tier=Tier.SHORT_TERM,
        content="tea",
        tags=(),
        source=Source.CHAT,
        session_id="",
        session_position=None,
        speaker="",
        occurred_at=clock.now,
        size_bytes=3,
        content_hash=b"",
        version=1,
        created_at=clock.now,
        updated_at=clock.now,
        last_seen_at=clock.now,
        use_count=0,
    )
    return Kept(replace(memory, **known), useful_count)
