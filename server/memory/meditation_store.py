"""Meditations of one user in Postgres: asked for, and looked at."""

import enum
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, consent, ids, requests
from server.caller import Caller
from server.database import Connection, Database
from server.enqueue import NewJob, enqueue_all
from server.errors import NotFound

SHARD_JOB: Final = "meditation.shard"
"""Kind of the job that scores one shard."""

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
    """None while nothing is scored."""
    scorer_version: int
    """0 while nothing is scored."""
    created_at: datetime
    finished_at: datetime | None
    duration: timedelta
    """From asked to ended, or until now."""


class MeditationStore:
    """Starts and shows the runs of one user at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def start(self, caller: Caller, request_id: str) -> Meditation:
        """Start a run over the user's memories, or return the one that is still running.

        Args:
            caller: Whose memories are scored.
            request_id: A retry under the same id returns the same run; empty for none.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            InvalidArgument: The request id is too long.
        """
        requests.check_request_id(request_id)
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            await take_turns(connection, caller.user_id)
            running = await _running(connection, caller)
            meditation_id = chosen = running or ids.new_id()
            if request_id:
                meditation_id = await requests.claim(
                    connection, caller, "Meditate", request_id, b"", chosen
                )
            if meditation_id == running:
                # A shard whose job was given up would never end the run.
                await enqueue_shards(connection, running, caller)
            elif meditation_id == chosen:
                await _insert(connection, caller, meditation_id)
            return await _get(connection, caller, meditation_id)

    async def get(self, caller: Caller, meditation_id: UUID) -> Meditation:
        """Return a run.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            return await _get(connection, caller, meditation_id)


async def take_turns(connection: Connection, whose: UUID | None) -> None:
    """Wait until no other transaction is starting a run of the same user, or of all users."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"meditation/{whose}"
    )


async def enqueue_shards(
    connection: Connection, meditation_id: UUID, caller: Caller | None
) -> None:
    """Enqueue a job for every shard that is not done and has none."""
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
    await enqueue_all(connection, jobs, caller=caller)


async def _running(connection: Connection, caller: Caller) -> UUID | None:
    running: UUID | None = await connection.fetchval(
        """
        SELECT id
          FROM meditations
         WHERE tenant_id = $1 AND user_id = $2 AND state = 'running'
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return running


async def _insert(connection: Connection, caller: Caller, meditation_id: UUID) -> None:
    await connection.execute(
        "INSERT INTO meditations (id, tenant_id, user_id, shards) VALUES ($1, $2, $3, 1)",
        meditation_id,
        caller.tenant_id,
        caller.user_id,
    )
    await connection.execute(
        "INSERT INTO meditation_shards (meditation_id, shard) VALUES ($1, 0)", meditation_id
    )
    await enqueue_shards(connection, meditation_id, caller)
    await audit.record(
        connection, caller, "meditation.start", ids.show(ids.MEDITATION, meditation_id)
    )


async def _get(connection: Connection, caller: Caller, meditation_id: UUID) -> Meditation:
    row = await connection.fetchrow(
        """
        SELECT meditations.id, state, as_of, shards,
               count(*) FILTER (WHERE done)            AS shards_done,
               sum(scored)::bigint                     AS scored,
               sum(score_sum) / nullif(sum(scored), 0) AS mean_score,
               coalesce(max(scorer_version), 0)        AS scorer_version,
               created_at, finished_at,
               coalesce(finished_at, now()) - created_at AS duration
          FROM meditations
          JOIN meditation_shards ON meditation_id = meditations.id
         WHERE tenant_id = $1 AND user_id = $2 AND meditations.id = $3
         GROUP BY meditations.id
        """,
        caller.tenant_id,
        caller.user_id,
        meditation_id,
    )
    if row is None:
        raise NotFound("meditation")
    return _meditation(row)


def _meditation(row: asyncpg.Record) -> Meditation:
    return Meditation(**{**row, "state": MeditationState(row["state"])})
