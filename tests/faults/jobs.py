"""Jobs that are done while everything is killed, and the count of every outcome that stood."""

import time
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg

from local.mesh import Mesh
from local.postgres import SYSTEM
from server.database import SystemDatabase, open_pool
from server.enqueue import NewJob, enqueue_all
from server.errors import StoreUnavailable
from tests.faults.reach import as_superuser, until

KIND: Final = "test.work"
POISON: Final = "test.poison"
"""Kills the process that does it."""
CONCURRENCY: Final = 32
MANY_ATTEMPTS: Final = 100
"""A job may meet many deaths, and is none the worse for it."""
_OUT_OF_REACH: Final = (
    OSError,
    StoreUnavailable,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # What asyncpg says of a connection whose end it has read but not yet understood.
    asyncpg.InternalClientError,
)
"""What a database that was just killed answers."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the jobs."""

    made: int
    done: int
    settled_twice: int
    by_old_lease: int
    """Jobs whose result is not that of their latest lease."""


class Work:
    """Jobs of one kind in a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def count(self) -> None:
        """Have the database count outcomes as they commit."""
        async with as_superuser(self._mesh) as superuser:
            await count_outcomes(superuser)

    async def make(self, jobs: int) -> None:
        """Enqueue jobs, as a service does."""
        url = self._mesh.stores.dsn(SYSTEM)
        job = NewJob(KIND, max_attempts=MANY_ATTEMPTS)
        async with (
            await open_pool(url, size=1, name="faults") as pool,
            SystemDatabase(pool).transaction() as connection,
        ):
            await enqueue_all(connection, [job] * jobs)

    async def makes_one(self) -> bool:
        """Enqueue one job, or more where an answer got lost; return False while that fails."""
        try:
            await self.make(1)
        except _OUT_OF_REACH:
            return False
        return True

    async def newest(self) -> UUID:
        """Return the id of the job that was made last."""
        async with as_superuser(self._mesh) as superuser:
            newest: UUID = await superuser.fetchval(
                "SELECT id FROM jobs WHERE kind = $1 ORDER BY id DESC LIMIT 1", KIND
            )
        return newest

    async def ends(self, newest: UUID, seconds: float) -> float:
        """Return when, by the monotonic clock, one job has ended."""
        return await self._none_left("id = $2", newest, seconds, pause=0.02)

    async def all_end(self, newest: UUID, seconds: float) -> float:
        """Return when a job and all that were made before it have ended."""
        return await self._none_left("id <= $2", newest, seconds, pause=0.2)

    async def _none_left(self, which: str, newest: UUID, seconds: float, pause: float) -> float:
        left = f"""
            SELECT NOT EXISTS (SELECT FROM jobs
                                WHERE kind = $1 AND state IN ('waiting', 'running') AND {which})
        """

        async def none_left() -> bool:
            try:
                async with as_superuser(self._mesh) as superuser:
                    return bool(await superuser.fetchval(left, KIND, newest))
            except _OUT_OF_REACH:
                return False

        await until(none_left, seconds, pause)
        return time.monotonic()

    async def tally(self) -> Tally:
        """Return what became of all jobs."""
        async with as_superuser(self._mesh) as superuser:
            return await tally_of(superuser)


async def count_outcomes(superuser: asyncpg.Connection) -> None:
    """Have a database count the outcomes of these jobs as they commit."""
    await superuser.execute(
        f"""
        CREATE TABLE outcomes (job_id uuid NOT NULL);
        CREATE FUNCTION count_outcome() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = public AS
            'BEGIN INSERT INTO outcomes VALUES (NEW.id); RETURN NULL; END';
        CREATE TRIGGER count_outcome AFTER UPDATE ON jobs
            FOR EACH ROW WHEN (NEW.kind = '{KIND}' AND NEW.state = 'succeeded')
            EXECUTE FUNCTION count_outcome();
        """
    )


async def count_no_more(superuser: asyncpg.Connection) -> None:
    """Take back what counts."""
    await superuser.execute("DROP FUNCTION count_outcome CASCADE; DROP TABLE outcomes")


async def tally_of(superuser: asyncpg.Connection) -> Tally:
    """Return what became of all these jobs in a database."""
    row = await superuser.fetchrow(
        """
        SELECT count(*) AS made,
               count(*) FILTER (WHERE state = 'succeeded') AS done,
               (SELECT count(*) FROM (SELECT FROM outcomes GROUP BY job_id
                                      HAVING count(*) > 1) AS twice) AS settled_twice,
               count(*) FILTER (WHERE state = 'succeeded' AND token <> lease_token)
                   AS by_old_lease
          FROM jobs
         CROSS JOIN LATERAL (
               SELECT coalesce((result ->> 'token')::bigint, 0) AS token) AS settled
         WHERE kind = $1
        """,
        KIND,
    )
    return Tally(**row)
