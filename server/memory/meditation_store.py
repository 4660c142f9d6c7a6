"""Meditations of one user in Postgres: asked for, and looked at."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from server import audit, consent, ids, requests
from server.caller import Caller
from server.database import Connection, Database
from server.enqueue import NewJob, enqueue_all
from server.errors import NotFound
from server.memory.shards import SHARD_JOB

_ATTEMPTS: Final = 10


class MeditationState(enum.Enum):
    """Where a meditation stands."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"


@dataclass(frozen=True, slots=True)
class Meditation:
    """A scoring run over memories, and what it has done so far."""

    id: UUID
    state: MeditationState
    as_of: datetime
    shards: int
    shards_done: int
    scored: int
    mean_score: float | None
    """None while nothing is processed."""
    scorer_version: int
    """0 while nothing is scored."""
    created_at: datetime
    finished_at: datetime | None
    duration: timedelta
    """From asked to ended, or until now."""
    full_run: bool
    """Every score is stored, not only those that moved."""
    dry_run: bool
    """It tells what it would do, and changes nothing."""
    nightly: bool
    """It is of all users; what was archived, promoted and deleted is the user's own."""
    total: int
    processed: int
    archived: int
    promoted: int
    deleted: int
    undone_at: datetime | None


class MeditationStore:
    """Starts and shows the runs of one user at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def start(
        self, caller: Caller, request_id: str, *, full_run: bool = False, dry_run: bool = False
    ) -> Meditation:
        """Start a run over the user's memories, or return the one that is still running.

        Args:
            caller: Whose memories are scored.
            request_id: A retry under the same id returns the same run; empty for none.
            full_run: Whether every score is stored, not only those that moved.
            dry_run: Whether it only tells what it would do. One that is running is another than
                one that is not dry.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            InvalidArgument: The request id is too long.
            RequestIdReused: The request id stands for a run of another kind.
        """
        requests.check_request_id(request_id)
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            await take_turns(connection, caller.user_id)
            running = await _running(connection, caller, dry_run=dry_run)
            meditation_id = chosen = running or ids.new_id()
            if request_id:
                contents = repr((full_run, dry_run)).encode() if full_run or dry_run else b""
                meditation_id = await requests.claim(
                    connection, caller, "Meditate", request_id, contents, chosen
                )
            if meditation_id == chosen:
                if running is None:
                    await _insert(connection, caller, chosen, full_run=full_run, dry_run=dry_run)
                # Of one that is running, too: a shard whose job was given up would never end it.
                await enqueue_shards(connection, chosen, caller)
            return await meditation_of(connection, caller, meditation_id)

    async def get(self, caller: Caller, meditation_id: UUID) -> Meditation:
        """Return a run.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            return await meditation_of(connection, caller, meditation_id)

    async def page(
        self, caller: Caller, *, before: UUID | None, limit: int
    ) -> Sequence[Meditation]:
        """Return the newest runs, or the newest before one of them.

        Nightly runs are among them that did something to the caller's memories.
        """
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT id
                  FROM (SELECT id FROM meditations WHERE tenant_id = $1 AND user_id = $2
                         UNION
                        SELECT meditation_id FROM meditation_users
                         WHERE tenant_id = $1 AND user_id = $2) AS run
                 WHERE id < coalesce($3::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
                 ORDER BY id DESC
                 LIMIT $4
                """,
                caller.tenant_id,
                caller.user_id,
                before,
                limit,
            )
            return await _runs(connection, caller, [row["id"] for row in rows])


async def ask_for_meditation(
    connection: Connection, caller: Caller, *, full_run: bool = False, dry_run: bool = False
) -> UUID | None:
    """Start a run in the caller's transaction and return the id of the job that scores it.

    That is the one that is under way, if a run is; None if that has been scored just now.

    Raises:
        ConsentMissing: The user has not consented to memory.store.
    """
    await consent.require(connection, consent.MEMORY_STORE)
    await take_turns(connection, caller.user_id)
    run = await _running(connection, caller, dry_run=dry_run)
    if run is None:
        run = ids.new_id()
        await _insert(connection, caller, run, full_run=full_run, dry_run=dry_run)
    job_ids = await enqueue_shards(connection, run, caller)
    return job_ids[0] if job_ids else None


async def take_turns(connection: Connection, whose: UUID | None) -> None:
    """Wait until no other transaction is starting a run of the same user, or of all users."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"meditation/{whose}"
    )


async def enqueue_shards(
    connection: Connection, meditation_id: UUID, caller: Caller | None
) -> list[UUID]:
    """Enqueue a job for every shard that is not done and has none; return all of theirs."""
    rows = await connection.fetch(
        """
        SELECT shard
          FROM meditation_shards
         WHERE meditation_id = $1 AND NOT done
         ORDER BY shard
        """,
        meditation_id,
    )
    name = ids.show(ids.MEDITATION, meditation_id)
    jobs = [
        NewJob(
            SHARD_JOB,
            {"meditation_id": name, "shard": row["shard"]},
            unique_key=f"{SHARD_JOB}/{name}/{row['shard']}",
            max_attempts=_ATTEMPTS,
        )
        for row in rows
    ]
    return await enqueue_all(connection, jobs, caller=caller)


async def meditation_of(connection: Connection, caller: Caller, meditation_id: UUID) -> Meditation:
    """Return a run: the caller's own, or a nightly one that did something to theirs.

    Raises:
        NotFound: There is no such run.
    """
    found = await _runs(connection, caller, [meditation_id])
    if not found:
        raise NotFound("meditation")
    return found[0]


async def _running(connection: Connection, caller: Caller, *, dry_run: bool) -> UUID | None:
    running: UUID | None = await connection.fetchval(
        """
        SELECT id
          FROM meditations
         WHERE tenant_id = $1 AND user_id = $2 AND dry_run = $3 AND state = 'running'
        """,
        caller.tenant_id,
        caller.user_id,
        dry_run,
    )
    return running


async def _insert(
    connection: Connection, caller: Caller, meditation_id: UUID, *, full_run: bool, dry_run: bool
) -> None:
    await connection.execute(
        """
        INSERT INTO meditations (id, tenant_id, user_id, shards, full_run, dry_run, total)
        SELECT $1, $2, $3, 1, $4, $5,
               coalesce((SELECT long_term_count + permanent_count + archived_count
                           FROM memory_usage
                          WHERE tenant_id = $2 AND user_id = $3), 0)
        """,
        meditation_id,
        caller.tenant_id,
        caller.user_id,
        full_run,
        dry_run,
    )
    await connection.execute(
        "INSERT INTO meditation_shards (meditation_id, shard) VALUES ($1, 0)", meditation_id
    )
    await audit.record(
        connection, caller, "meditation.start", ids.show(ids.MEDITATION, meditation_id)
    )


async def _runs(
    connection: Connection, caller: Caller, meditation_ids: Sequence[UUID]
) -> list[Meditation]:
    """Return runs as their user may see them, newest first: of others' memories nothing."""
    rows = await connection.fetch(
        """
        SELECT run.id, run.state, run.as_of, run.full_run, run.dry_run,
               run.created_at, run.finished_at,
               coalesce(run.finished_at, now()) - run.created_at AS duration,
               run.user_id IS NULL AS nightly,
               CASE WHEN run.user_id IS NULL THEN 0 ELSE run.shards END AS shards,
               CASE WHEN run.user_id IS NULL THEN 0 ELSE run.total END AS total,
               part.shards_done, part.processed, part.scored,
               coalesce(part.promoted, mine.promoted, 0) AS promoted,
               coalesce(part.deleted, mine.deleted, 0) AS deleted,
               part.score_sum / nullif(part.processed, 0) AS mean_score, part.scorer_version,
               coalesce(part.archived, mine.archived, 0) AS archived, mine.undone_at
          FROM meditations AS run
          LEFT JOIN meditation_users AS mine
            ON mine.tenant_id = $1 AND mine.user_id = $2 AND mine.meditation_id = run.id
         CROSS JOIN LATERAL (
               SELECT count(*) FILTER (WHERE done) AS shards_done,
                      coalesce(sum(processed), 0)::bigint AS processed,
                      coalesce(sum(scored), 0)::bigint    AS scored,
                      sum(archived)::bigint               AS archived,
                      sum(promoted)::bigint               AS promoted,
                      sum(deleted)::bigint                AS deleted,
                      coalesce(sum(score_sum), 0)         AS score_sum,
                      coalesce(max(scorer_version), 0)    AS scorer_version
                 FROM meditation_shards
                WHERE meditation_id = run.id AND run.user_id IS NOT NULL
               ) AS part
         WHERE run.id = ANY ($3)
           AND ((run.tenant_id = $1 AND run.user_id = $2)
                OR (run.user_id IS NULL AND mine.meditation_id IS NOT NULL))
         ORDER BY run.id DESC
        """,
        caller.tenant_id,
        caller.user_id,
        meditation_ids,
    )
    return [Meditation(**{**row, "state": MeditationState(row["state"])}) for row in rows]
