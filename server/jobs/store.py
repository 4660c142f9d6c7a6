"""Jobs in Postgres, as their user sees them."""

from collections.abc import Collection
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, ids
from server.caller import Caller
from server.database import Connection, Database, SystemDatabase
from server.enqueue import DOORBELL
from server.errors import NotFound, StateConflict
from server.jobs.asking import Kinds
from server.jobs.doorbell import CANCELLATIONS
from server.jobs.model import Job, JobState
from server.requests import claim, redirect

_COLUMNS: Final = """id, kind, state, attempt, max_attempts, progress, error, result, created_at,
                       run_at, cancelled_at, finished_at"""


class JobStore:
    """Shows the jobs of one user at a time, and changes them as their user asks."""

    def __init__(self, database: Database, system: SystemDatabase, kinds: Kinds) -> None:
        """Serve jobs.

        Args:
            database: Where users see their own, and ask for more.
            system: Says how jobs go on.
            kinds: What users may ask for.
        """
        self._database = database
        self._system = system
        self._kinds = kinds

    async def create(
        self, caller: Caller, kind: str, payload_json: str, request_id: str, contents: bytes
    ) -> Job:
        """Ask for a job, or return the unfinished one that does the same.

        Args:
            caller: Whose it is.
            kind: What is to be done.
            payload_json: What it is told.
            request_id: Chosen by the client; empty for none. What an earlier request of the same
                id asked for is returned, whatever has become of it.
            contents: The request, to recognise a retry by.

        Raises:
            RequestIdReused: The earlier request had other contents.
            NotFound: What the earlier one asked for ended so long ago that it is forgotten.
            InvalidArgument: Users may not ask for this kind, or not tell it that.
            StateConflict: The user's settings and consents rule it out.
            Problem: Whatever else the kind refuses for.
        """
        payload = self._kinds.payload(kind, payload_json)
        fresh = ids.new_id()
        async with self._database.transaction(caller) as connection:
            if request_id:
                named = (connection, caller, "CreateJob", request_id)
                if (claimed := await claim(*named, contents, fresh)) != fresh:
                    return await _get(connection, caller, claimed)
            job_id = await self._kinds.ask(connection, caller, kind, payload)
            if request_id:
                await redirect(*named, job_id)
            await audit.record(connection, caller, "job.create", ids.show(ids.JOB, job_id))
            return await _get(connection, caller, job_id)

    async def get(self, caller: Caller, job_id: UUID) -> Job:
        """Return a job.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            return await _get(connection, caller, job_id)

    async def page(
        self, caller: Caller, *, state: JobState | None, before: UUID | None, limit: int
    ) -> list[Job]:
        """Return jobs with ids below `before`, highest first, at most `limit`."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS}
                  FROM jobs
                 WHERE tenant_id = $1 AND user_id = $2 AND ($3::uuid IS NULL OR id < $3)
                   AND ($5::text IS NULL OR state = $5)
                 ORDER BY id DESC
                 LIMIT $4
                """,  # noqa: S608 - a constant
                caller.tenant_id,
                caller.user_id,
                before,
                limit,
                state and state.value,
            )
        return [_job(row) for row in rows]

    async def some(self, job_ids: Collection[UUID]) -> dict[UUID, Job]:
        """Return those of some jobs that are there, whosever they are."""
        rows = await self._system.fetch_alone(
            f"SELECT {_COLUMNS} FROM jobs WHERE id = ANY ($1)",  # noqa: S608 - a constant
            list(job_ids),
        )
        return {row["id"]: _job(row) for row in rows}

    async def retry(self, caller: Caller, job_id: UUID) -> Job:
        """Have a job done again that was given up or cancelled; leave one that is under way.

        Raises:
            NotFound: There is none, or it is not the caller's.
            StateConflict: It succeeded, or another job of its unique key is under way.
        """
        try:
            async with self._system.transaction() as connection:
                row = await connection.fetchrow(
                    f"""
                    UPDATE jobs
                       SET state = 'waiting', attempt = 0, progress = 0, run_at = now(),
                           due = true, result = NULL, cancelled_at = NULL, finished_at = NULL
                     WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                       AND state IN ('dead', 'cancelled')
                    RETURNING {_COLUMNS}, pg_notify($4, '')
                    """,  # noqa: S608 - a constant
                    caller.tenant_id,
                    caller.user_id,
                    job_id,
                    DOORBELL,
                )
                if row is not None:
                    await audit.record(connection, caller, "job.retry", ids.show(ids.JOB, job_id))
                    return _job(row)
        except asyncpg.UniqueViolationError as error:
            raise StateConflict("another job does the same by now") from error
        job = await self.get(caller, job_id)
        if job.state.is_final:
            raise StateConflict("the job succeeded: there is nothing to do again")
        return job

    async def cancel(self, caller: Caller, job_id: UUID) -> Job:
        """End a job that waits, or have the worker end it that does it.

        Its unique key stays taken until then.

        Raises:
            NotFound: There is none, or it is not the caller's.
            StateConflict: It has ended otherwise.
        """
        async with self._system.transaction() as connection:
            row = await connection.fetchrow(
                f"""
                UPDATE jobs
                   SET cancelled_at = coalesce(cancelled_at, now()),
                       state = CASE state WHEN 'waiting' THEN 'cancelled' ELSE state END,
                       finished_at = CASE state WHEN 'waiting' THEN now() END
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                   AND state IN ('waiting', 'running')
                RETURNING {_COLUMNS},
                          CASE state WHEN 'running' THEN pg_notify($4, id || '/' || lease_token) END
                """,  # noqa: S608 - a constant
                caller.tenant_id,
                caller.user_id,
                job_id,
                CANCELLATIONS,
            )
            if row is not None:
                await audit.record(connection, caller, "job.cancel", ids.show(ids.JOB, job_id))
                return _job(row)
        job = await self.get(caller, job_id)
        if job.state is not JobState.CANCELLED:
            raise StateConflict("the job has ended already")
        return job


async def _get(connection: Connection, caller: Caller, job_id: UUID) -> Job:
    row = await connection.fetchrow(
        f"""
        SELECT {_COLUMNS}
          FROM jobs
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        """,  # noqa: S608 - a constant
        caller.tenant_id,
        caller.user_id,
        job_id,
    )
    if row is None:
        raise NotFound("job")
    return _job(row)


def _job(row: asyncpg.Record) -> Job:
    return Job(
        id=row["id"],
        kind=row["kind"],
        state=JobState(row["state"]),
        attempt=row["attempt"],
        max_attempts=row["max_attempts"],
        progress=row["progress"],
        error=row["error"],
        result=row["result"],
        created_at=row["created_at"],
        run_at=row["run_at"],
        cancelled_at=row["cancelled_at"],
        finished_at=row["finished_at"],
    )
