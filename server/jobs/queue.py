"""The queue in Postgres, as workers use it.

Every write about a job carries its lease token, and the worker's id, which only that process
knows: a lease that passed on, or was never the worker's, meets no row.
"""

import random
from collections.abc import Sequence
from typing import Final

from server.database import SystemDatabase
from server.enqueue import DOORBELL
from server.jobs.model import Beat, Completed, Failed, Held, Lease, Outcome
from server.jobs.retries import retry_seconds

_LAPSED: Final = "the worker stopped answering"
_RECLAIM_AT_ONCE = 1000


class Queue:
    """Leases jobs and takes outcomes. One method, one statement; the clock is Postgres's."""

    def __init__(self, database: SystemDatabase, lease_seconds: float) -> None:
        self._database = database
        self._lease_seconds = lease_seconds

    async def lease(self, worker_id: str, kinds: Sequence[str], limit: int) -> list[Lease]:
        """Lease up to `limit` jobs of these kinds that are due, the most urgent first.

        Two workers that lease at once get different jobs, and do not wait for each other.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                WITH due AS (
                    SELECT job.id
                      FROM unnest($2::text[]) AS wanted (kind)
                     CROSS JOIN LATERAL (
                           SELECT id, priority, run_at
                             FROM jobs
                            WHERE state = 'waiting' AND kind = wanted.kind AND run_at <= now()
                            ORDER BY priority DESC, run_at, id
                            LIMIT $3
                              FOR UPDATE SKIP LOCKED
                           ) AS job
                     ORDER BY job.priority DESC, job.run_at, job.id
                     LIMIT $3
                )
                UPDATE jobs
                   SET state = 'running', attempt = attempt + 1, progress = 0, worker_id = $1,
                       lease_token = nextval('lease_tokens'),
                       lease_expires_at = clock_timestamp() + make_interval(secs => $4)
                  FROM due
                 WHERE jobs.id = due.id
                RETURNING jobs.id, lease_token, kind, payload, attempt
                """,
                worker_id,
                list(kinds),
                limit,
                self._lease_seconds,
            )
        return [
            Lease(Held(row["id"], row["lease_token"]), row["kind"], row["payload"], row["attempt"])
            for row in rows
        ]

    async def extend(self, worker_id: str, beats: Sequence[Beat]) -> set[Held]:
        """Keep leases of a worker alive for another lease duration; return those that are lost.

        A lease whose time is over but whose job nobody took since is alive again.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                UPDATE jobs
                   SET lease_expires_at = clock_timestamp() + make_interval(secs => $4),
                       progress = beat.progress
                  FROM unnest($1::uuid[], $2::bigint[], $3::real[]) AS beat (id, token, progress)
                 WHERE jobs.id = beat.id AND lease_token = beat.token AND state = 'running'
                   AND worker_id = $5
                RETURNING jobs.id, lease_token
                """,
                [beat.held.job_id for beat in beats],
                [beat.held.token for beat in beats],
                [beat.progress for beat in beats],
                self._lease_seconds,
                worker_id,
            )
        return {beat.held for beat in beats} - {Held(*row) for row in rows}

    async def settle(self, worker_id: str, outcomes: Sequence[Outcome]) -> set[Held]:
        """Write how leases of a worker ended and return those for which that now stands.

        The others are lost, and nothing is written about them. A failed job waits to be tried
        again, or is dead after its last attempt.
        """
        completed = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
        standing = await self._complete(worker_id, completed) if completed else set()
        return standing | (await self._fail(worker_id, failed) if failed else set())

    async def release(self, worker_id: str, leases: Sequence[Held]) -> set[Held]:
        """Give back leases whose work was not done: their jobs wait again, no attempt is lost."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                UPDATE jobs
                   SET state = 'waiting', attempt = attempt - 1, progress = 0, worker_id = NULL,
                       lease_expires_at = NULL
                  FROM unnest($1::uuid[], $2::bigint[]) AS lease (id, token)
                 WHERE jobs.id = lease.id AND lease_token = lease.token AND state = 'running'
                   AND worker_id = $4
                RETURNING jobs.id, lease_token, pg_notify($3, '')
                """,
                [held.job_id for held in leases],
                [held.token for held in leases],
                DOORBELL,
                worker_id,
            )
        return {Held(row["id"], row["lease_token"]) for row in rows}

    async def reclaim(self) -> int:
        """Take back leases that lapsed and return how many jobs wait again because of it.

        A job that lost its worker at its last attempt is dead: it may well be what killed it.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                WITH lapsed AS (
                    SELECT id, lease_token
                      FROM jobs
                     WHERE state = 'running' AND lease_expires_at < clock_timestamp()
                     LIMIT $2
                       FOR UPDATE SKIP LOCKED
                )
                UPDATE jobs
                   SET state = CASE WHEN attempt < max_attempts THEN 'waiting' ELSE 'dead' END,
                       finished_at = CASE WHEN attempt < max_attempts THEN NULL ELSE now() END,
                       error = $1, worker_id = NULL, lease_expires_at = NULL
                  FROM lapsed
                 WHERE jobs.id = lapsed.id AND jobs.lease_token = lapsed.lease_token
                RETURNING state, pg_notify($3, '')
                """,
                _LAPSED,
                _RECLAIM_AT_ONCE,
                DOORBELL,
            )
        return sum(row["state"] == "waiting" for row in rows)

    async def _complete(self, worker_id: str, outcomes: Sequence[Completed]) -> set[Held]:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                UPDATE jobs
                   SET state = 'succeeded', result = outcome.result, progress = 1,
                       finished_at = now(), worker_id = NULL, lease_expires_at = NULL
                  FROM unnest($1::uuid[], $2::bigint[], $3::jsonb[]) AS outcome (id, token, result)
                 WHERE jobs.id = outcome.id AND lease_token = outcome.token AND state = 'running'
                   AND worker_id = $4
                RETURNING jobs.id, lease_token
                """,
                [outcome.held.job_id for outcome in outcomes],
                [outcome.held.token for outcome in outcomes],
                [outcome.result_json for outcome in outcomes],
                worker_id,
            )
        return {Held(*row) for row in rows}

    async def _fail(self, worker_id: str, outcomes: Sequence[Failed]) -> set[Held]:
        """Two statements in one transaction: how long a job waits depends on its attempt."""
        errors = {outcome.held: outcome.error for outcome in outcomes}
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT id, lease_token, attempt
                  FROM jobs
                  JOIN unnest($1::uuid[], $2::bigint[]) AS outcome (job_id, token)
                    ON id = job_id AND lease_token = token
                 WHERE state = 'running' AND worker_id = $3
                 ORDER BY id
                   FOR UPDATE OF jobs
                """,
                [held.job_id for held in errors],
                [held.token for held in errors],
                worker_id,
            )
            standing = [Held(row["id"], row["lease_token"]) for row in rows]
            await connection.execute(
                """
                UPDATE jobs
                   SET state = CASE WHEN attempt < max_attempts THEN 'waiting' ELSE 'dead' END,
                       finished_at = CASE WHEN attempt < max_attempts THEN NULL ELSE now() END,
                       run_at = now() + make_interval(secs => outcome.delay),
                       error = outcome.error, worker_id = NULL, lease_expires_at = NULL
                  FROM unnest($1::uuid[], $2::double precision[], $3::text[])
                       AS outcome (id, delay, error)
                 WHERE jobs.id = outcome.id
                """,
                [held.job_id for held in standing],
                [retry_seconds(row["attempt"], random.random()) for row in rows],  # noqa: S311
                [errors[held] for held in standing],
            )
        return set(standing)
