"""Scoring in Postgres: runs of all users, shards under a fence, batches applied once."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar
from uuid import UUID

import asyncpg
import numpy as np
import structlog

from server import ids
from server.database import Connection, SystemDatabase
from server.errors import LeaseLost, NotFound
from server.memory.columns import Column, Floats, Rows, ScoreColumns
from server.memory.meditation_store import enqueue_shards, take_turns
from server.preferences import USUAL_WEIGHTS, weights_of_users

log = structlog.get_logger()

T = TypeVar("T")
Cursor = tuple[UUID, UUID]
"""User and memory, in whose order a shard is scored."""

_MOST_TEXTS: Final = 4096
_TEXT_BYTES: Final = 1024 * 1024
"""How much text a batch may hold: one gRPC message has 4 MiB, one worker patience."""
_USERS_AT_ONCE: Final = 1000
_DEADLOCK_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a run, opened by the worker whose lease token is its fence."""

    meditation_id: UUID
    number: int
    fence: int
    as_of: datetime
    shards: int
    tenant_id: UUID | None
    user_id: UUID | None
    """Both None: a run of all users."""
    cursor: Cursor
    done: bool
    scored: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Memories to score, from after one position of the cursor up to another."""

    start: Cursor
    end: Cursor
    rows: Rows
    weights: Floats
    """float32[size][4]: each user's weights of the components of a score."""
    texts: Sequence[str]
    """Where no sentiment is known yet."""
    text_index: Column
    """int32: which row each text belongs to."""


class ScoringStore:
    """Sees the memories of all users, as the system role."""

    def __init__(self, database: SystemDatabase, shards: int) -> None:
        """Score by a database; runs of all users are cut into this many shards."""
        self._database = database
        self._shards = shards

    async def plan_all(self, job_id: UUID) -> tuple[UUID, int]:
        """Start a run of all users and enqueue its shards.

        A run that is still running is taken up again instead: a second one would only do the
        same work beside it.

        Args:
            job_id: The job that asks. Asked again, it gets the same run.

        Returns:
            Id of the run and its number of shards.
        """
        async with self._database.transaction() as connection:
            await take_turns(connection, None)
            row = await connection.fetchrow(
                """
                SELECT id, shards
                  FROM meditations
                 WHERE job_id = $1 OR (user_id IS NULL AND state = 'running')
                 ORDER BY job_id = $1 DESC NULLS LAST
                 LIMIT 1
                """,
                job_id,
            ) or await self._insert(connection, job_id)
            await enqueue_shards(connection, row["id"], None)
            return row["id"], row["shards"]

    async def open_shard(self, meditation_id: UUID, number: int, fence: int) -> Shard:
        """Claim a shard for a lease: from now on nothing is stored under an earlier one.

        Raises:
            NotFound: There is no such shard.
            LeaseLost: A later lease has claimed it.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                UPDATE meditation_shards AS shard
                   SET fence = greatest(fence, $3)
                  FROM meditations AS run
                 WHERE run.id = meditation_id AND meditation_id = $1 AND shard = $2
                RETURNING fence, as_of, shards, tenant_id, user_id, cursor_user_id,
                          cursor_memory_id, done, scored
                """,
                meditation_id,
                number,
                fence,
            )
        if row is None:
            raise NotFound("shard")
        if row["fence"] != fence:
            raise LeaseLost
        cursor = row["cursor_user_id"], row["cursor_memory_id"]
        named = {name: row[name] for name in _SHARD_COLUMNS}
        return Shard(meditation_id, number, cursor=cursor, **named)

    async def read(self, shard: Shard, start: Cursor, limit: int) -> Batch | None:
        """Return at most `limit` memories of the shard after a position, or None at its end.

        Memories of users who have withdrawn their consent are left out.
        """
        async with self._database.transaction() as connection:
            read = await _read_on(connection, shard, start, limit)
            if read is None:
                return None
            rows, users = read
            # Read after the version of the text: a text that is newer meets no row later.
            unknown = np.flatnonzero(np.isnan(rows.table["sentiment"]))
            contents, size = await _texts(connection, rows, unknown)
            rows = rows.head(size)
            weights = await _weights(connection, rows, users)
        index = np.fromiter(contents, np.int32, len(contents))
        return Batch(start, rows.key(-1), rows, weights, list(contents.values()), index)

    async def apply(self, shard: Shard, batch: Batch, scores: ScoreColumns) -> None:
        """Store the scores of a batch and move the cursor to its end, both or neither.

        A memory that was removed since, whose text has changed, or whose user has withdrawn
        their consent is left as it is.

        Raises:
            LeaseLost: A later lease has claimed the shard, or the batch is stored already.
        """

        async def attempt() -> None:
            async with self._database.transaction() as connection:
                await _hold(connection, shard, batch.start)
                scored, score_sum = await _store(connection, shard, batch, scores)
                await connection.execute(
                    """
                    UPDATE meditation_shards
                       SET cursor_user_id = $3, cursor_memory_id = $4, scored = scored + $5,
                           score_sum = score_sum + $6, scorer_version = $7
                     WHERE meditation_id = $1 AND shard = $2
                    """,
                    shard.meditation_id,
                    shard.number,
                    *batch.end,
                    scored,
                    score_sum,
                    scores.scorer_version,
                )

        await _despite_deadlocks(attempt)

    async def finish(self, shard: Shard, cursor: Cursor) -> int:
        """Mark a shard as done, and with the last one its run as succeeded.

        Returns:
            How many memories the shard scored, over all attempts.

        Raises:
            LeaseLost: A later lease has claimed the shard.
        """
        async with self._database.transaction() as connection:
            # Two shards that end at once must see each other.
            await connection.execute(
                "SELECT FROM meditations WHERE id = $1 FOR UPDATE", shard.meditation_id
            )
            await _hold(connection, shard, cursor)
            scored: int = await connection.fetchval(
                """
                UPDATE meditation_shards SET done = true
                 WHERE meditation_id = $1 AND shard = $2
                RETURNING scored
                """,
                shard.meditation_id,
                shard.number,
            )
            await connection.execute(
                """
                UPDATE meditations SET state = 'succeeded', finished_at = now()
                 WHERE id = $1 AND state = 'running'
                   AND NOT EXISTS (SELECT FROM meditation_shards
                                    WHERE meditation_id = $1 AND NOT done)
                """,
                shard.meditation_id,
            )
        return scored

    async def _insert(self, connection: Connection, job_id: UUID) -> asyncpg.Record:
        run = await connection.fetchrow(
            "INSERT INTO meditations (id, job_id, shards) VALUES ($1, $2, $3) RETURNING id, shards",
            ids.new_id(),
            job_id,
            self._shards,
        )
        await connection.execute(
            """
            INSERT INTO meditation_shards (meditation_id, shard)
            SELECT $1, shard FROM generate_series(0, $2::integer - 1) AS shard
            """,
            run["id"],
            run["shards"],
        )
        return run


_SHARD_COLUMNS = ("fence", "as_of", "shards", "tenant_id", "user_id", "done", "scored")


async def _hold(connection: Connection, shard: Shard, cursor: Cursor) -> None:
    """Compare fence and cursor with what they were, and keep them so until the commit."""
    held = await connection.fetchval(
        """
        SELECT true
          FROM meditation_shards
         WHERE meditation_id = $1 AND shard = $2 AND fence = $3
           AND cursor_user_id = $4 AND cursor_memory_id = $5
           FOR UPDATE
        """,
        shard.meditation_id,
        shard.number,
        shard.fence,
        *cursor,
    )
    if not held:
        raise LeaseLost


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
               useful_count, coalesce(feedback, 'NaN'), coalesce(sentiment, 'NaN')
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


async def _weights(connection: Connection, rows: Rows, users: Sequence[asyncpg.Record]) -> Floats:
    """Return the scoring weights of each memory's user."""
    (first, _), (last, _) = rows.key(0), rows.key(-1)
    whose = [
        (user["tenant_id"], user["user_id"]) for user in users if first <= user["user_id"] <= last
    ]
    return rows.by_user(USUAL_WEIGHTS, await weights_of_users(connection, whose))


async def _texts(connection: Connection, rows: Rows, unknown: Column) -> tuple[dict[int, str], int]:
    """Return the texts of some rows, by their index, and at which size the batch must be cut."""
    size = len(rows)
    if len(unknown) > _MOST_TEXTS:
        size = int(unknown[_MOST_TEXTS])
        unknown = unknown[:_MOST_TEXTS]
    if not len(unknown):
        return {}, size
    found = await connection.fetch(
        """
        SELECT place, CASE WHEN total <= $3 THEN content END AS content
          FROM (
               SELECT place, content, sum(size_bytes) OVER (ORDER BY place) AS total
                 FROM unnest($1::uuid[], $2::uuid[])
                      WITH ORDINALITY AS wanted (user_id, memory_id, place)
                 JOIN memories AS memory
                   ON memory.user_id = wanted.user_id AND memory.id = wanted.memory_id
                  AND memory.sealed IS NULL
               ) AS text
         ORDER BY place
        """,
        rows.user_ids(unknown),
        rows.memory_ids(unknown),
        _TEXT_BYTES,
    )
    texts: dict[int, str] = {}
    for row in found:
        index = int(unknown[row["place"] - 1])
        if row["content"] is None:
            return texts, index
        texts[index] = row["content"]
    return texts, size


async def _store(
    connection: Connection, shard: Shard, batch: Batch, scores: ScoreColumns
) -> tuple[int, float]:
    """Write scores where they still fit and return how many those were, and their sum.

    The update checks the version of the text in the very row that it changes: having waited for
    a change of the text to commit, it looks at the row anew.
    """
    # Row by row through the primary key: the planner would rather read the whole table.
    await connection.execute("SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off")
    row = await connection.fetchrow(
        """
        WITH consenting AS MATERIALIZED (
            SELECT tenant_id, user_id
              FROM (SELECT DISTINCT ON (user_id, tenant_id) user_id, tenant_id, granted
                      FROM consents
                     WHERE purpose = 'memory.store' AND user_id = ANY ($10::uuid[])
                     ORDER BY user_id, tenant_id, version DESC) AS consent
             WHERE granted
        ), stored AS (
            UPDATE memory_scores AS memory
               SET score = batch.score, relevance_to_goals = batch.relevance_to_goals,
                   emotional_weight = batch.emotional_weight,
                   predictive_value = batch.predictive_value,
                   recency_frequency = batch.recency_frequency,
                   sentiment = nullif(batch.sentiment, 'NaN'),
                   scorer_version = $11, scored_at = $12
              FROM unnest($1::uuid[], $2::uuid[], $3::integer[], $4::real[], $5::real[],
                          $6::real[], $7::real[], $8::real[], $9::real[])
                   AS batch (user_id, memory_id, text_version, score, relevance_to_goals,
                             emotional_weight, predictive_value, recency_frequency, sentiment)
             WHERE memory.user_id = batch.user_id AND memory.memory_id = batch.memory_id
               AND memory.text_version = batch.text_version
               AND ((memory.tenant_id, memory.user_id) IN (SELECT tenant_id, user_id
                                                             FROM consenting)) IS TRUE
            RETURNING memory.score
        )
        SELECT count(*) AS scored, coalesce(sum(score::double precision), 0) AS score_sum
          FROM stored
        """,
        batch.rows.user_ids(),
        batch.rows.memory_ids(),
        batch.rows.table["text_version"].tolist(),
        *(column.tolist() for column in (*scores.components(), scores.sentiment)),
        batch.rows.users(),
        scores.scorer_version,
        shard.as_of,
    )
    return row["scored"], row["score_sum"]


async def _despite_deadlocks(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try a transaction again when a user's own write met it crosswise."""
    for _ in range(_DEADLOCK_TRIES - 1):
        try:
            return await attempt()
        except asyncpg.DeadlockDetectedError:
            log.info("scoring met a user's write crosswise")
    return await attempt()
