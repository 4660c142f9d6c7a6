"""Rows of memories as the model has them."""

import asyncpg

from server.memory.model import Memory, Score, Source, Tier


def memory_from(row: asyncpg.Record) -> Memory:
    """Return the memory of a row that joins memories with memory_scores."""
    return Memory(
        id=row["id"],
        tier=Tier(row["tier"]),
        content=row["content"],
        tags=tuple(row["tags"]),
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
        score=_score(row),
    )


def _score(row: asyncpg.Record) -> Score | None:
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
