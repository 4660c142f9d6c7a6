"""How good rankings are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

DEPTH = 20
"""How many turns of a ranking are looked at."""
_SESSIONS = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question."""

    ranking: Sequence[str]
    """Ids of turns, best first."""
    seconds: float
    """How long the call took."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Figures of one ranking, or their means over many; E is the evidence of the question.

    recall@k      |E ∩ first k turns| / |E|
    hit@1         1 if the first turn is in E
    MRR           1 / the rank of the first turn in E; 0 if the first 20 hold none
    session hit@5 1 if a session of E is among the first 5 sessions that the first 20 turns name
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    recall_at_20: float
    hit_at_1: float
    mean_reciprocal_rank: float
    session_hit_at_5: float


def judge(
    ranking: Sequence[str], evidence: frozenset[str], sessions: Mapping[str, str]
) -> Judgement:
    """Return the figures of one ranking of turn ids, best first.

    Args:
        ranking: Ids of turns.
        evidence: Ids of the turns that answer the question; not empty.
        sessions: The session of each turn.
    """
    ranks = [rank for rank, turn in enumerate(ranking[:DEPTH], start=1) if turn in evidence]

    def recall(depth: int) -> float:
        return sum(rank <= depth for rank in ranks) / len(evidence)

    named = list(dict.fromkeys(sessions[turn] for turn in ranking[:DEPTH]))[:_SESSIONS]
    wanted = {sessions[turn] for turn in evidence}
    return Judgement(
        recall_at_1=recall(1),
        recall_at_5=recall(5),
        recall_at_10=recall(10),
        recall_at_20=recall(20),
        hit_at_1=float(1 in ranks),
        mean_reciprocal_rank=1 / ranks[0] if ranks else 0.0,
        session_hit_at_5=float(not wanted.isdisjoint(named)),
    )


def mean(judgements: Iterable[Judgement]) -> Judgement:
    """Return the mean of every figure."""
    names = [field.name for field in fields(Judgement)]
    rows = [[getattr(one, name) for name in names] for one in judgements]
    return Judgement(*map(float, np.mean(rows, axis=0)))
