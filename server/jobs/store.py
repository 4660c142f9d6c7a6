"""Jobs in Postgres, as their user sees them."""

from uuid import UUID

import asyncpg

from server.caller import Caller
from server.database import Database
from server.errors import NotFound
from server.jobs.model import Job, JobState


class JobStore:
    """Shows the jobs of one user at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, caller: Caller, job_id: UUID) -> Job:
        """Return a job.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            row = await connection.fetchrow(
                """
                SELECT id, kind, state, attempt, max_attempts, progress, error, created_at,
                       finished_at
                  FROM jobs
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                job_id,
            )
        if row is None:
            raise NotFound("job")
        return _job(row)

    async def page(self, caller: Caller, *, before: UUID | None, limit: int) -> list[Job]:
        """Return jobs with ids below `before`, highest first, at most `limit`."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT id, kind, state, attempt, max_attempts, progress, error, created_at,
                       finished_at
                  FROM jobs
                 WHERE tenant_id = $1 AND user_id = $2 AND ($3::uuid IS NULL OR id < $3)
                 ORDER BY id DESC
                 LIMIT $4
                """,
                caller.tenant_id,
                caller.user_id,
                before,
                limit,
            )
        return [_job(row) for row in rows]


def _job(row: asyncpg.Record) -> Job:
    return Job(**{**row, "state": JobState(row["state"])})
