"""Batches of memories to score: what is known of each, read by columns."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg
import numpy as np

from server.database import Connection
from server.memory.columns import Column, Floats, Rows, ScoreColumns
from server.memory.goal_store import goals_of_users
from server.memory.goals import NO_GOALS, Goals
from server.memory.shards import Cursor, Shard
from server.preferences import USUAL_WEIGHTS, weights_of_users

MOVED: Final = 0.005
"""By how much a score must differ to be stored anew unless something else is new: what is a month
old reaches that in a week by its age alone."""

_MOST_TEXTS: Final = 4096
_TEXT_BYTES: Final = 1024 * 1024
"""How much text a batch may hold: one gRPC message has 4 MiB, one worker patience."""
_USERS_AT_ONCE: Final = 1000
_MATCHED_AT_ONCE: Final = 256
"""Texts that are matched with goals before others have their turn: some milliseconds."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Memories to score, from after one position of the cursor up to another."""

    start: Cursor
    end: Cursor
    rows: Rows
    weights: Floats
    """float32[size][4]: each user's weights of the components of a score."""
    goals_keys: Column
    """int64: which goals each memory is matched with; NO_GOALS where its user has none."""
    goal_match: Floats
    """NaN where there are no goals."""
    texts: Sequence[str]
    """Where no sentiment is known yet."""
    text_index: Column
    """int32: which row each text belongs to."""

    def moved(self, scores: ScoreColumns) -> Column:
        """Return where the scores, or what they are made of, differ enough to be stored."""
        sentiment = self.rows.column("sentiment", "<f4")
        with np.errstate(invalid="ignore"):
            near = np.abs(scores.score - self.rows.column("score", "<f4")) < MOVED
        return np.flatnonzero(
            ~near
            | (self.rows.table["scorer_version"] != scores.scorer_version)
            | (self.rows.table["goals_key"] != self.goals_keys)
            | (np.isnan(sentiment) & ~np.isnan(scores.sentiment))
        )


async def read_batch(
    connection: Connection, shard: Shard, start: Cursor, limit: int
) -> Batch | None:
    """Return at most `limit` memories of the shard after a position, or None at its end.

    Memories of users who have withdrawn their consent are left out.
    """
    read = await _read_on(connection, shard, start, limit)
    if read is None:
        return None
    rows, users = read
    whose = _whose(rows, users)
    goals = await goals_of_users(connection, whose)
    keys = rows.by_user((NO_GOALS,), {user: (one.key,) for user, one in goals.items()}, "<i8")[:, 0]
    is_matched = (rows.table["goals_key"] == keys) | (keys == NO_GOALS)
    # Read after the version of the text: a text that is newer meets no row later.
    is_unknown = np.isnan(rows.table["sentiment"])
    bodies, size = await _bodies(connection, rows, np.flatnonzero(is_unknown | ~is_matched))
    rows, keys, is_matched = rows.head(size), keys[:size], is_matched[:size]
    match = np.where(keys == NO_GOALS, np.nan, rows.column("relevance_to_goals", "<f4"))
    unmatched = {index: body for index, body in bodies.items() if not is_matched[index]}
    await _match(rows, goals, unmatched, match)
    texts = {
        index: body["content"]
        for index, body in bodies.items()
        if is_unknown[index] and not body["is_sealed"]
    }
    return Batch(
        start,
        rows.key(-1),
        rows,
        rows.by_user(USUAL_WEIGHTS, await weights_of_users(connection, whose)),
        keys,
        match.astype(np.float32),
        list(texts.values()),
        np.fromiter(texts, np.int32, len(texts)),
    )


async def _read_on(
    connection: Connection, shard: Shard, start: Cursor, limit: int
) -> tuple[Rows, Sequence[asyncpg.Record]] | None:
    """Return the next memories and the users whose they may be, or None at the end.

    Users who have no memories are passed over.
    """
    first = start[0]
    while users := await _consenting(connection, shard, first):
        rows = await _copy(connection, users, start, limit)
        if len(rows):
            return rows, users
        first = UUID(int=users[-1]["user_id"].int + 1)
    return None


async def _consenting(connection: Connection, shard: Shard, first: UUID) -> list[asyncpg.Record]:
    """Return the next users of the shard, from `first` on, whose last word was yes."""
    users: list[asyncpg.Record] = await connection.fetch(
        """
        SELECT user_id, tenant_id
          FROM (
               SELECT DISTINCT ON (user_id, tenant_id) user_id, tenant_id, granted
                 FROM consents
                WHERE purpose = 'memory.store' AND user_id >= $1
                  AND ($3::uuid IS NULL OR (tenant_id = $2 AND user_id = $3))
                  AND (uuid_hash_extended(user_id, 0) & 2147483647) % $4 = $5::bigint
                ORDER BY user_id, tenant_id, version DESC
               ) AS consent
         WHERE granted
         ORDER BY user_id
         FETCH FIRST ($6::bigint) ROWS WITH TIES
        """,
        first,
        shard.tenant_id,
        shard.user_id,
        shard.shards,
        shard.number,
        _USERS_AT_ONCE,
    )
    return users


async def _copy(
    connection: Connection, users: Sequence[asyncpg.Record], start: Cursor, limit: int
) -> Rows:
    """Copy out what the scorer needs: COPY makes no Python object for a row.

    IS TRUE keeps the planner from making a join of the tenants, which would be sorted; the
    users' part of the primary key is read in its order and no further than the limit.
    """
    chunks: list[bytes] = []

    async def take(chunk: bytes) -> None:
        chunks.append(chunk)

    await connection.copy_from_query(
        """
        SELECT user_id, memory_id, text_version, last_seen_at, use_count, retrieved_count,
               useful_count, coalesce(feedback, 'NaN'), coalesce(sentiment, 'NaN'),
               coalesce(score, 'NaN'), coalesce(relevance_to_goals, 'NaN'),
               coalesce(goals_key, 0), coalesce(scorer_version, 0)
          FROM memory_scores
         WHERE user_id = ANY ($3::uuid[])
           AND (user_id, memory_id) > ($1::uuid, $2::uuid)
           AND ((user_id, tenant_id) IN (SELECT user_id, tenant_id
                                           FROM unnest($3::uuid[], $4::uuid[])
                                                AS consenting (user_id, tenant_id))) IS TRUE
         ORDER BY user_id, memory_id
         LIMIT $5::bigint
        """,
        *start,
        [user["user_id"] for user in users],
        [user["tenant_id"] for user in users],
        limit,
        output=take,
        format="binary",
    )
    return Rows.parse(b"".join(chunks))


def _whose(rows: Rows, users: Sequence[asyncpg.Record]) -> list[tuple[UUID, UUID]]:
    """Return tenant and user of those whose memories the rows may be."""
    (first, _), (last, _) = rows.key(0), rows.key(-1)
    return [
        (user["tenant_id"], user["user_id"]) for user in users if first <= user["user_id"] <= last
    ]


async def _bodies(
    connection: Connection, rows: Rows, wanted: Column
) -> tuple[dict[int, asyncpg.Record], int]:
    """Return what some memories say, by their index, and at which size the batch must be cut.

    A text that is sealed is empty; what was deleted meanwhile is missing.
    """
    size = len(rows)
    if len(wanted) > _MOST_TEXTS:
        size = int(wanted[_MOST_TEXTS])
        wanted = wanted[:_MOST_TEXTS]
    if not len(wanted):
        return {}, size
    found = await connection.fetch(
        """
        SELECT place, CASE WHEN total <= $3 THEN content END AS content, tags, is_sealed
          FROM (
               SELECT place, content, tags, sealed IS NOT NULL AS is_sealed,
                      sum(CASE WHEN sealed IS NULL THEN size_bytes ELSE 0 END)
                          OVER (ORDER BY place) AS total
                 FROM unnest($1::uuid[], $2::uuid[])
                      WITH ORDINALITY AS wanted (user_id, memory_id, place)
                 JOIN memories AS memory
                   ON memory.user_id = wanted.user_id AND memory.id = wanted.memory_id
               ) AS text
         ORDER BY place
        """,
        rows.user_ids(wanted),
        rows.memory_ids(wanted),
        _TEXT_BYTES,
    )
    bodies: dict[int, asyncpg.Record] = {}
    for row in found:
        index = int(wanted[row["place"] - 1])
        if row["content"] is None:
            return bodies, index
        bodies[index] = row
    return bodies, size


async def _match(
    rows: Rows, goals: Mapping[UUID, Goals], bodies: Mapping[int, asyncpg.Record], match: Column
) -> None:
    """Write into `match` how much some memories have to do with the goals of their users."""
    for done, (index, body) in enumerate(bodies.items(), start=1):
        whose = goals.get(rows.key(index)[0])
        if whose is not None:
            match[index] = whose.match(body["content"], body["tags"])
        if done % _MATCHED_AT_ONCE == 0:
            await asyncio.sleep(0)
