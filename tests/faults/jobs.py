"""Jobs that are done while everything is killed, and the count of every outcome that stood."""

import time
from dataclasses import dataclass
from typing import Final

import asyncpg

from local.mesh import Mesh
from local.postgres import SYSTEM
from server.database import SystemDatabase, open_pool
from server.enqueue import NewJob, enqueue_all
from server.errors import StoreUnavailable
from tests.faults.reach import as_superuser, until

KIND: Final = "test.work"
CONCURRENCY: Final = 32
MANY_ATTEMPTS: Final = 100
"""A job may meet many deaths, and is none the worse for it."""


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
        except (OSError, StoreUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        return True

    async def ends(self, seconds: float, *, all_of_them: bool = True) -> float:
        """Return when, by the monotonic clock, all jobs have ended, or the newest one has."""
        newest = "(SELECT id FROM jobs WHERE kind = $1 ORDER BY id DESC LIMIT 1)"
        which = "true" if all_of_them else f"id = {newest}"
        left = f"""
            SELECT NOT EXISTS (SELECT FROM jobs
                                WHERE kind = $1 AND state IN ('waiting', 'running') AND {which})
        """
        async with as_superuser(self._mesh) as superuser:
            await until(lambda: superuser.fetchval(left, KIND), seconds)
        return time.monotonic()

    async def tally(self) -> Tally:
        """Return what became of all jobs."""
        async with as_superuser(self._mesh) as superuser:
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
