"""Rows of memories as the model has them."""

from collections.abc import Mapping
from typing import Any, Final

from server.memory.model import Author, Candidate, Memory, Scope, Score, Source, Tier

MEMORY_COLUMNS: Final = """
    id, tier, content, tags, channels, source, session_id, session_position, speaker, occurred_at,
    size_bytes, content_hash, version, created_at, updated_at, scope, protected, created_by,
    consent_version, archived_at, delete_after, sensitive, sealed
"""
"""What `memory_from` reads of the table memories."""

SCORE_COLUMNS: Final = """
    last_seen_at, use_count, feedback, score, relevance_to_goals, emotional_weight,
    predictive_value, recency_frequency, scorer_version, scored_at
"""
"""What `memory_from` reads of the table memory_scores."""

CANDIDATE_COLUMNS: Final = """
    id, speaker, session_id, date_part('epoch', occurred_at) AS occurred_at,
    size_bytes - octet_length(array_to_string(tags, '')) AS text_bytes
"""
"""What `CANDIDATE_ARRAYS` are made of, with `amount` and `score`: of the table memories."""

_ARRAY_OF: Final = {
    "id": "ids",
    "amount": "amounts",
    "speaker": "speakers",
    "session_id": "session_ids",
    "occurred_at": "instants",
    "score": "scores",
    "text_bytes": "text_sizes",
}
CANDIDATE_ARRAYS: Final = ", ".join(
    f"array_agg({one}) AS {many}" for one, many in _ARRAY_OF.items()
)
"""What `candidates_from` reads: one row of columns. As rows, so many cost several times that."""
CANDIDATE_NAMES: Final = tuple(_ARRAY_OF.values())
"""The names of these arrays, in the order of `Candidate`."""


def memory_from(row: Mapping[str, Any]) -> Memory:
    """Return the memory of a row that has the columns of both tables."""
    return Memory(
        id=row["id"],
        tier=Tier(row["tier"]),
        content=row["content"],
        tags=tuple(row["tags"]),
        channels=tuple(row["channels"]),
        source=Source(row["source"]),
        session_id=row["session_id"],
        session_position=row["session_position"],
        speaker=row["speaker"],
        occurred_at=row["occurred_at"],
        size_bytes=row["size_bytes"],
        content_hash=row["content_hash"],
        version=row["version"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        last_seen_at=row["last_seen_at"],
        use_count=row["use_count"],
        scope=Scope(row["scope"]),
        is_protected=row["protected"],
        created_by=Author(row["created_by"]),
        consent_version=row["consent_version"],
        archived_at=row["archived_at"],
        delete_after=row["delete_after"],
        is_sensitive=row["sensitive"],
        sealed=row["sealed"],
        feedback=row["feedback"],
        score=_score(row),
    )


def candidates_from(row: Mapping[str, Any]) -> list[Candidate]:
    """Return the candidates of a row that has their columns as arrays; NULL: there are none."""
    if row["ids"] is None:
        return []
    columns = (row[name] for name in CANDIDATE_NAMES)
    return list(map(Candidate._make, zip(*columns, strict=True)))


def _score(row: Mapping[str, Any]) -> Score | None:
    if row["scored_at"] is None:
        return None
    return Score(
        value=row["score"],
        relevance_to_goals=row["relevance_to_goals"],
        emotional_weight=row["emotional_weight"],
        predictive_value=row["predictive_value"],
        recency_frequency=row["recency_frequency"],
        scorer_version=row["scorer_version"],
        scored_at=row["scored_at"],
    )
