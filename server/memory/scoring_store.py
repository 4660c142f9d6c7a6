"""Scoring in Postgres: runs of all users, shards under a fence, batches applied once."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar
from uuid import UUID

import asyncpg
import structlog

from server import ids
from server.database import Connection, SystemDatabase
from server.memory.columns import SCORED_COLUMNS, Column, Rows, ScoreColumns
from server.memory.meditation_store import enqueue_shards, take_turns
from server.memory.metrics import MEDITATION_ITEMS, MEDITATION_RUNS
from server.memory.score_batches import Batch, read_batch
from server.memory.shards import Cursor, Shard, claim, hold_at
from server.memory.tallies import Tally

log = structlog.get_logger()

T = TypeVar("T")

_DEADLOCK_TRIES: Final = 5

# Arrays as parameters cost the event loop an object and a check for each element; a temporary table
# takes columns as they lie in memory, and writes no log. Row by row through the primary key: the
# planner would rather read the whole table of scores.
_TABLE_OF_A_BATCH: Final = """
    SET LOCAL client_min_messages = warning;
    SET LOCAL enable_hashjoin = off;
    SET LOCAL enable_mergejoin = off;
    CREATE TEMPORARY TABLE IF NOT EXISTS scored (
        user_id            uuid    NOT NULL,
        memory_id          uuid    NOT NULL,
        text_version       integer NOT NULL,
        goals_key          bigint  NOT NULL,
        score              real    NOT NULL,
        relevance_to_goals real    NOT NULL,
        emotional_weight   real    NOT NULL,
        predictive_value   real    NOT NULL,
        recency_frequency  real    NOT NULL,
        sentiment          real    NOT NULL
    ) ON COMMIT DELETE ROWS
"""


class ScoringStore:
    """Sees the memories of all users, as the system role."""

    def __init__(self, database: SystemDatabase, shards: int, *, writers: int = 1) -> None:
        """Score by a database.

        Args:
            database: Where the memories are.
            shards: Into how many a run of all users is cut.
            writers: How many batches are stored at the same time. Each keeps a core of the database
                busy, which whoever asks a question meanwhile would like to have.
        """
        self._database = database
        self._shards = shards
        self._turn = asyncio.Semaphore(writers)

    async def plan_all(self, job_id: UUID, *, full_run: bool = False) -> tuple[UUID, int]:
        """Start a run of all users and enqueue its shards.

        A run that is still running is taken up again instead: a second one would only do the
        same work beside it.

        Args:
            job_id: The job that asks. Asked again, it gets the same run.
            full_run: Whether every score is stored, not only those that moved.

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
            ) or await self._insert(connection, job_id, full_run=full_run)
            await enqueue_shards(connection, row["id"], None)
            return row["id"], row["shards"]

    async def open_shard(self, meditation_id: UUID, number: int, fence: int) -> Shard:
        """Claim a shard for a lease: from now on nothing is stored under an earlier one.

        Raises:
            NotFound: There is no such shard.
            LeaseLost: A later lease has claimed it.
        """
        async with self._database.transaction() as connection:
            return await claim(connection, meditation_id, number, fence)

    async def read(self, shard: Shard, start: Cursor, limit: int) -> Batch | None:
        """Return at most `limit` memories of the shard after a position, or None at its end.

        Memories of users who have withdrawn their consent are left out.
        """
        async with self._database.transaction() as connection:
            return await read_batch(connection, shard, start, limit)

    async def apply(self, shard: Shard, batch: Batch, scores: ScoreColumns) -> None:
        """Store the scores of a batch and move the cursor to its end, both or neither.

        Unless the run is a full one, only those are stored that moved. A memory that was removed
        since, whose text has changed, or whose user has withdrawn their consent is left as it is.

        Raises:
            LeaseLost: A later lease has claimed the shard, or the batch is stored already.
        """
        which = slice(None) if shard.full_run else batch.moved(scores)
        rows, keys, new = batch.rows.only(which), batch.goals_keys[which], scores.only(which)

        async def attempt() -> None:
            async with self._database.transaction() as connection:
                await hold_at(connection, shard, batch.start)
                scored = await _store(connection, shard, rows, keys, new)
                await connection.execute(
                    """
                    UPDATE meditation_shards
                       SET cursor_user_id = $3, cursor_memory_id = $4, scored = scored + $5,
                           processed = processed + $6, score_sum = score_sum + $7,
                           scorer_version = $8
                     WHERE meditation_id = $1 AND shard = $2
                    """,
                    shard.meditation_id,
                    shard.number,
                    *batch.end,
                    scored,
                    len(batch.rows),
                    scores.sum(),
                    scores.scorer_version,
                )

        async with self._turn:
            await _despite_deadlocks(attempt)

    async def finish(self, shard: Shard, cursor: Cursor, tally: Tally | None = None) -> Shard:
        """Mark a shard as done, and with the last one its run as succeeded.

        Args:
            shard: Which.
            cursor: How far it is stored.
            tally: What a dry run found and did not store.

        Returns:
            The shard, with what was done in it over all attempts.

        Raises:
            LeaseLost: A later lease has claimed the shard.
        """
        async with self._database.transaction() as connection:
            # Two shards that end at once must see each other.
            await connection.execute(
                "SELECT FROM meditations WHERE id = $1 FOR UPDATE", shard.meditation_id
            )
            await hold_at(connection, shard, cursor)
            if tally is not None:
                await _keep_tally(connection, shard, tally)
            done = await connection.fetchrow(
                """
                UPDATE meditation_shards SET done = true
                 WHERE meditation_id = $1 AND shard = $2
                RETURNING scored, archived, promoted, deleted
                """,
                shard.meditation_id,
                shard.number,
            )
            is_last = await connection.fetchval(
                """
                UPDATE meditations SET state = 'succeeded', finished_at = now()
                 WHERE id = $1 AND state = 'running'
                   AND NOT EXISTS (SELECT FROM meditation_shards
                                    WHERE meditation_id = $1 AND NOT done)
                RETURNING true
                """,
                shard.meditation_id,
            )
            finished = await claim(connection, shard.meditation_id, shard.number, shard.fence)
        if tally is None:
            for action, number in done.items():
                MEDITATION_ITEMS.labels(action).inc(number)
        if is_last:
            MEDITATION_RUNS.labels("done").inc()
        return finished

    async def _insert(
        self, connection: Connection, job_id: UUID, *, full_run: bool
    ) -> asyncpg.Record:
        run = await connection.fetchrow(
            """
            INSERT INTO meditations (id, job_id, shards, full_run, total)
            SELECT $1, $2, $3, $4,
                   coalesce(sum(long_term_count + permanent_count + archived_count), 0)
              FROM memory_usage
            RETURNING id, shards
            """,
            ids.new_id(),
            job_id,
            self._shards,
            full_run,
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


async def _store(
    connection: Connection, shard: Shard, rows: Rows, goals_keys: Column, scores: ScoreColumns
) -> int:
    """Write scores where they still fit and return how many those were.

    The update checks the version of the text in the very row that it changes: having waited for
    a change of the text to commit, it looks at the row anew.
    """
    if not len(rows):
        return 0
    await connection.execute(_TABLE_OF_A_BATCH)
    await connection.copy_to_table(
        "scored",
        schema_name="pg_temp",
        source=scores.to_copy(rows, goals_keys),
        columns=SCORED_COLUMNS,
        format="binary",
    )
    status = await connection.execute(
        """
        WITH consenting AS MATERIALIZED (
            SELECT tenant_id, user_id
              FROM (SELECT DISTINCT ON (user_id, tenant_id) user_id, tenant_id, granted
                      FROM consents
                     WHERE purpose = 'memory.store' AND user_id = ANY ($1::uuid[])
                     ORDER BY user_id, tenant_id, version DESC) AS consent
             WHERE granted
        )
        UPDATE memory_scores AS memory
           SET score = scored.score, relevance_to_goals = scored.relevance_to_goals,
               emotional_weight = scored.emotional_weight,
               predictive_value = scored.predictive_value,
               recency_frequency = scored.recency_frequency,
               sentiment = nullif(scored.sentiment, 'NaN'),
               goals_key = nullif(scored.goals_key, 0), scorer_version = $2, scored_at = $3
          FROM pg_temp.scored
         WHERE memory.user_id = scored.user_id AND memory.memory_id = scored.memory_id
           AND memory.text_version = scored.text_version
           AND ((memory.tenant_id, memory.user_id) IN (SELECT tenant_id, user_id
                                                         FROM consenting)) IS TRUE
        """,
        rows.users(),
        scores.scorer_version,
        shard.as_of,
    )
    return int(status.removeprefix("UPDATE "))


async def _keep_tally(connection: Connection, shard: Shard, tally: Tally) -> None:
    await connection.execute(
        """
        UPDATE meditation_shards
           SET processed = $3, scored = $4, score_sum = $5, scorer_version = $6, archived = $7,
               promoted = $8, deleted = $9
         WHERE meditation_id = $1 AND shard = $2
        """,
        shard.meditation_id,
        shard.number,
        tally.processed,
        tally.scored,
        tally.score_sum,
        tally.scorer_version or None,
        tally.archived,
        tally.promoted,
        tally.deleted,
    )


async def _despite_deadlocks(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try a transaction again when a user's own write met it crosswise."""
    for _ in range(_DEADLOCK_TRIES - 1):
        try:
            return await attempt()
        except asyncpg.DeadlockDetectedError:
            log.info("scoring met a user's write crosswise")
    return await attempt()
