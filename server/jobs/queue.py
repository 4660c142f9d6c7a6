"""The queue in Postgres, as workers use it.

Every write about a job carries its lease token, and the worker's id, which only that process
knows: a lease that passed on, or was never the worker's, meets no row. Only running jobs have a
worker; no statement says so besides, lest the planner should read all running jobs to find one.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final, assert_never
from uuid import UUID

import asyncpg

from server.database import ACQUIRE_SECONDS, Connection, SystemDatabase
from server.enqueue import DOORBELL
from server.errors import StoreUnavailable
from server.jobs import metrics
from server.jobs.model import Beat, Completed, Extended, Failed, Held, Lease, Outcome, Stopped
from server.jobs.retries import LADDER, part_of_delay

_LAPSED: Final = "the worker stopped answering"
_AT_ONCE: Final = 1000
_REMEMBERED: Final = 10
"""Failures of a job that a worker may tell again."""
_NEVER_FULL: Final = 2**31 - 1
_ANYWHERE: Final = UUID(int=0)

PLANS_OF_QUEUE: Final = {"enable_seqscan": "off", "enable_bitmapscan": "off"}
"""Settings of the connections that the queue is used by: what was planned while there were few jobs
is also done when there are many."""


class Queue:
    """Leases jobs and takes outcomes. One method, one statement; the clock is Postgres's."""

    def __init__(
        self,
        database: SystemDatabase,
        lease_seconds: float,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        """Open the queue.

        Args:
            database: Where the jobs are.
            lease_seconds: How long a lease lives without a heartbeat.
            limits: How many jobs of a kind run at once, in the whole mesh; kinds that are not
                named have no limit.
        """
        self._database = database
        self._lease_seconds = lease_seconds
        self._limits = dict(limits or {})
        # However slow it is to lease, there is a connection left to settle with; however slow
        # both are, there is one for heartbeats and for what else a process asks of the database.
        self._leasing = asyncio.Semaphore(max(database.connections - 2, 1))
        self._changing = asyncio.Semaphore(max(database.connections - 1, 1))
        self._places: dict[str, UUID] = {}
        """The lane whose turn was the last, by kind. Each replica goes round by itself."""

    def is_limited(self, kinds: Iterable[str]) -> bool:
        """Tell whether one of these kinds has a limit."""
        return not self._limits.keys().isdisjoint(kinds)

    async def lease(self, worker_id: str, kinds: Sequence[str], limit: int) -> list[Lease]:
        """Lease up to `limit` jobs of these kinds that are due.

        The most urgent come first. Among these, kinds and users take turns: whoever has many
        waiting gets no more at a time than somebody with one. There may be more of them when
        fewer than `limit` come. Two workers that lease at once get different jobs, and wait for
        each other only at kinds that have a limit.
        """
        # By chance, so that no kind always comes first where there is room for few.
        kinds = random.sample(kinds, len(kinds))
        rooms = [self._limits.get(kind, _NEVER_FULL) for kind in kinds]
        limited = sorted(self._limits.keys() & set(kinds))
        places = [self._places.get(kind, _ANYWHERE) for kind in kinds]
        arguments = (worker_id, kinds, rooms, places, limit, self._lease_seconds)
        async with _place_in(self._leasing), _place_in(self._changing):
            rows = await self._lease(limited, arguments)
        self._move_on(rows)
        metrics.observe_delays((row["kind"], row["delay"]) for row in rows)
        return [
            Lease(Held(job_id, token), kind, payload, attempt, trace or "")
            for job_id, token, kind, payload, attempt, trace, _, _ in rows
        ]

    async def _lease(
        self, limited: Sequence[str], arguments: Sequence[object]
    ) -> list[asyncpg.Record]:
        if not limited:
            return await self._database.fetch_alone(LEASE, *arguments)
        async with self._database.transaction() as connection:
            await _take_turns(connection, limited)
            rows: list[asyncpg.Record] = await connection.fetch(LEASE, *arguments)
        return rows

    def _move_on(self, rows: Sequence[asyncpg.Record]) -> None:
        """Note, for each kind, how far round the ring of lanes this has come."""
        turns: dict[str, dict[UUID, int]] = {}
        for (kind, lane), jobs in Counter((row["kind"], row["lane"]) for row in rows).items():
            turns.setdefault(kind, {})[lane] = jobs
        for kind, lanes in turns.items():
            begin, rounds = self._places.get(kind, _ANYWHERE), max(lanes.values())
            last_round = (lane for lane, jobs in lanes.items() if jobs == rounds)
            _, self._places[kind] = max((lane <= begin, lane) for lane in last_round)

    async def extend(self, worker_id: str, beats: Sequence[Beat]) -> Extended:
        """Keep leases of a worker alive for another lease duration.

        A lease whose time is over but whose job nobody took since is alive again.
        """
        rows = await self._database.fetch_alone(
            """
            UPDATE jobs
               SET lease_expires_at = clock_timestamp() + make_interval(secs => $4),
                   progress = beat.progress
              FROM unnest($1::uuid[], $2::bigint[], $3::real[]) AS beat (id, token, progress)
             WHERE jobs.id = beat.id AND lease_token = beat.token
               AND worker_id = $5
            RETURNING jobs.id, lease_token, cancelled_at IS NOT NULL AS is_cancelled
            """,
            [beat.held.job_id for beat in beats],
            [beat.held.token for beat in beats],
            [beat.progress for beat in beats],
            self._lease_seconds,
            worker_id,
        )
        alive = {Held(row["id"], row["lease_token"]): row["is_cancelled"] for row in rows}
        return Extended(
            lost=frozenset(beat.held for beat in beats) - alive.keys(),
            cancelled=frozenset(held for held, is_cancelled in alive.items() if is_cancelled),
        )

    async def settle(self, worker_id: str, outcomes: Sequence[Outcome]) -> set[Held]:
        """Write how leases of a worker ended and return those for which that now stands.

        The others are lost, and nothing is written about them. A failed job waits to be tried
        again, or is dead after its last attempt. One whose end was asked for is cancelled, and
        no other outcome of it stands. A worker that did not hear that an outcome was written may
        tell it again, whatever has become of the job since: that stands already.
        """
        async with _place_in(self._changing):
            return await self._settle(worker_id, outcomes)

    async def _settle(self, worker_id: str, outcomes: Sequence[Outcome]) -> set[Held]:
        completed = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
        stopped = [outcome for outcome in outcomes if isinstance(outcome, Stopped)]
        standing = await self._complete(worker_id, completed) if completed else set()
        standing |= await self._fail(worker_id, failed) if failed else set()
        standing |= await self._stop(worker_id, stopped) if stopped else set()
        again = [outcome for outcome in outcomes if outcome.held not in standing]
        return standing | (await self._told_before(again) if again else set())

    async def release(self, worker_id: str, leases: Sequence[Held]) -> set[Held]:
        """Give back leases whose work was not done: their jobs wait again, no attempt is lost."""
        async with _place_in(self._changing):
            return await self._release(worker_id, leases)

    async def _release(self, worker_id: str, leases: Sequence[Held]) -> set[Held]:
        rows = await self._database.fetch_alone(
            """
            UPDATE jobs
               SET state = CASE WHEN cancelled_at IS NULL THEN 'waiting' ELSE 'cancelled' END,
                   finished_at = CASE WHEN cancelled_at IS NOT NULL THEN now() END,
                   attempt = attempt - 1, progress = 0, worker_id = NULL, lease_expires_at = NULL
              FROM unnest($1::uuid[], $2::bigint[]) AS lease (id, token)
             WHERE jobs.id = lease.id AND lease_token = lease.token
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

        A job that lost its worker at its last attempt is dead: it may well be what killed it. So
        may one that lost two: it waits by chance, longer each time. Those that were done beside
        it would otherwise always be leased with it again, and die with it.
        """
        rows = await self._database.fetch_alone(
            """
            WITH lapsed AS (
                SELECT id, lease_token,
                       CASE WHEN cancelled_at IS NOT NULL THEN 'cancelled'
                            WHEN attempt < max_attempts THEN 'waiting'
                            ELSE 'dead' END AS next,
                       CASE WHEN attempt > 1 AND attempt < max_attempts AND cancelled_at IS NULL
                            THEN random() * ($4::float8[])[least(attempt, cardinality($4))]
                       END AS pause
                  FROM jobs
                 WHERE state = 'running' AND lease_expires_at < clock_timestamp()
                 LIMIT $2
                   FOR UPDATE SKIP LOCKED
            )
            UPDATE jobs
               SET state = lapsed.next,
                   finished_at = CASE WHEN lapsed.next <> 'waiting' THEN now() END,
                   run_at = coalesce(now() + make_interval(secs => lapsed.pause), run_at),
                   due = lapsed.pause IS NULL,
                   error = $1, worker_id = NULL, lease_expires_at = NULL
              FROM lapsed
             WHERE jobs.id = lapsed.id AND jobs.lease_token = lapsed.lease_token
            RETURNING state, kind, pg_notify($3, '')
            """,
            _LAPSED,
            _AT_ONCE,
            DOORBELL,
            LADDER,
        )
        metrics.FAILURES.labels("lease_passed").inc(len(rows))
        ended = [(row["kind"], row["state"]) for row in rows if row["state"] != "waiting"]
        metrics.count_finished(ended)
        return sum(row["state"] == "waiting" for row in rows)

    async def admit(self) -> int:
        """Let jobs be leased whose time has come, and return how many these are, at most 1000."""
        rows = await self._database.fetch_alone(
            """
            WITH ripe AS (
                SELECT id
                  FROM jobs
                 WHERE state = 'waiting' AND NOT due AND run_at <= now()
                 ORDER BY run_at
                 LIMIT $1
                   FOR UPDATE SKIP LOCKED
            )
            UPDATE jobs SET due = true
              FROM ripe
             WHERE jobs.id = ripe.id
            RETURNING pg_notify($2, '')
            """,
            _AT_ONCE,
            DOORBELL,
        )
        return len(rows)

    async def forget(self, done_for: timedelta, given_up_for: timedelta) -> int:
        """Delete jobs that ended long ago and return how many these are, at most 1000.

        Args:
            done_for: How long jobs are kept that succeeded or were cancelled.
            given_up_for: How long dead ones are.
        """
        rows = await self._database.fetch_alone(
            """
            WITH old AS (
                SELECT id
                  FROM jobs
                 -- Asked for once: the ids are in the order of time, and so is the index.
                 WHERE id < (SELECT uuidv7(-least($1::interval, $2::interval)))
                   AND finished_at < now() - CASE state WHEN 'dead' THEN $2 ELSE $1 END
                 ORDER BY id
                 LIMIT $3
                   FOR UPDATE SKIP LOCKED
            )
            DELETE FROM jobs USING old WHERE jobs.id = old.id
            RETURNING 1
            """,
            done_for,
            given_up_for,
            _AT_ONCE,
        )
        return len(rows)

    async def _complete(self, worker_id: str, outcomes: Sequence[Completed]) -> set[Held]:
        results = [outcome.result_json for outcome in outcomes]
        rows = await self._database.fetch_alone(
            """
            WITH ended AS (
                UPDATE jobs
                   SET state = CASE WHEN cancelled_at IS NULL THEN 'succeeded'
                                    ELSE 'cancelled' END,
                       result = CASE WHEN cancelled_at IS NULL THEN outcome.result END,
                       progress = CASE WHEN cancelled_at IS NULL THEN 1 ELSE progress END,
                       finished_at = now(), worker_id = NULL, lease_expires_at = NULL
                  -- Where no job has a result, all are NULL: the array is empty.
                  FROM unnest($1::uuid[], $2::bigint[], $3::jsonb[])
                       WITH ORDINALITY AS outcome (id, token, result, place)
                 WHERE jobs.id = outcome.id AND lease_token = outcome.token
                   AND worker_id = $4
                RETURNING outcome.place, kind, state,
                          greatest(date_part('epoch', now() - run_at), 0) AS seconds
            )
            SELECT kind, state, array_agg(place) AS places, array_agg(seconds) AS seconds
              FROM ended
             GROUP BY kind, state
            """,
            [outcome.held.job_id for outcome in outcomes],
            [outcome.held.token for outcome in outcomes],
            results if any(results) else [],
            worker_id,
        )
        standing: set[Held] = set()
        for row in rows:
            metrics.FINISHED.labels(row["kind"], row["state"]).inc(len(row["places"]))
            if row["state"] == "succeeded":
                metrics.DURATION.labels(row["kind"]).observe_all(row["seconds"])
                standing.update([outcomes[place - 1].held for place in row["places"]])
        return standing

    async def _fail(self, worker_id: str, outcomes: Sequence[Failed]) -> set[Held]:
        rows = await self._database.fetch_alone(
            """
            WITH ended AS (
                SELECT outcome.*, jobs.cancelled_at IS NULL AS stands,
                       CASE WHEN jobs.cancelled_at IS NOT NULL THEN 'cancelled'
                            WHEN jobs.attempt < jobs.max_attempts THEN 'waiting'
                            ELSE 'dead' END AS next,
                       now() + make_interval(secs => outcome.part
                           * ($5::float8[])[least(jobs.attempt, cardinality($5))]) AS next_run_at
                  FROM jobs
                  JOIN unnest($1::uuid[], $2::bigint[], $3::text[], $6::float8[])
                       WITH ORDINALITY AS outcome (id, token, error, part, place)
                    ON jobs.id = outcome.id AND lease_token = outcome.token
                 WHERE jobs.worker_id = $4
                   FOR UPDATE OF jobs
            )
            UPDATE jobs
               SET state = ended.next, error = ended.error,
                   finished_at = CASE WHEN ended.next <> 'waiting' THEN now() END,
                   run_at = CASE ended.next WHEN 'waiting' THEN next_run_at ELSE run_at END,
                   due = ended.next <> 'waiting', worker_id = NULL, lease_expires_at = NULL,
                   failed_leases = CASE WHEN ended.stands
                                        THEN (lease_token || failed_leases)[:$7]
                                        ELSE failed_leases END
              FROM ended
             WHERE jobs.id = ended.id
            RETURNING ended.place, ended.stands, kind, state
            """,
            [outcome.held.job_id for outcome in outcomes],
            [outcome.held.token for outcome in outcomes],
            [outcome.error for outcome in outcomes],
            worker_id,
            LADDER,
            [part_of_delay(random.random()) for _ in outcomes],  # noqa: S311 - no secret
            _REMEMBERED,
        )
        metrics.count_finished(
            (row["kind"], "failed" if row["state"] == "waiting" else row["state"]) for row in rows
        )
        metrics.FAILURES.labels("handler").inc(sum(row["stands"] for row in rows))
        return {outcomes[row["place"] - 1].held for row in rows if row["stands"]}

    async def _stop(self, worker_id: str, outcomes: Sequence[Stopped]) -> set[Held]:
        rows = await self._database.fetch_alone(
            """
            UPDATE jobs
               SET state = 'cancelled', finished_at = now(), worker_id = NULL,
                   lease_expires_at = NULL
              FROM unnest($1::uuid[], $2::bigint[]) AS lease (id, token)
             WHERE jobs.id = lease.id AND lease_token = lease.token
               AND worker_id = $3 AND cancelled_at IS NOT NULL
            RETURNING jobs.id, lease_token, kind
            """,
            [outcome.held.job_id for outcome in outcomes],
            [outcome.held.token for outcome in outcomes],
            worker_id,
        )
        metrics.count_finished((row["kind"], "cancelled") for row in rows)
        return {Held(row["id"], row["lease_token"]) for row in rows}

    async def _told_before(self, outcomes: Sequence[Outcome]) -> set[Held]:
        rows = await self._database.fetch_alone(
            """
            SELECT id, told.token
              FROM jobs
              JOIN unnest($1::uuid[], $2::bigint[], $3::text[]) AS told (id, token, state)
             USING (id)
             WHERE CASE told.state WHEN 'failed' THEN told.token = ANY (failed_leases)
                        ELSE lease_token = told.token AND jobs.state = told.state END
            """,
            [outcome.held.job_id for outcome in outcomes],
            [outcome.held.token for outcome in outcomes],
            [_left_behind(outcome) for outcome in outcomes],
        )
        return {Held(row["id"], row["token"]) for row in rows}


@asynccontextmanager
async def _place_in(room: asyncio.Semaphore) -> AsyncIterator[None]:
    """Wait for a place and keep it.

    Raises:
        StoreUnavailable: There was none for as long as one waits for a connection.
    """
    try:
        async with asyncio.timeout(ACQUIRE_SECONDS):
            await room.acquire()
    except TimeoutError as error:
        raise StoreUnavailable("the database") from error
    try:
        yield
    finally:
        room.release()


def _left_behind(outcome: Outcome) -> str:
    """Return the state that a job is in which ended so; a failed one may be in any."""
    match outcome:
        case Completed():
            return "succeeded"
        case Failed():
            return "failed"
        case Stopped():
            return "cancelled"
    assert_never(outcome)


async def _take_turns(connection: Connection, kinds: Sequence[str]) -> None:
    """Count and take jobs of these kinds one after the other: two that count at once exceed."""
    await connection.execute(
        """
        SELECT pg_advisory_xact_lock(hashtextextended('jobs/' || kind, 0))
          FROM unnest($1::text[]) AS kind
        """,
        kinds,
    )


LEASE: Final = """
    WITH RECURSIVE asked AS (
        SELECT asked.kind, asked.begin, first.urgency,
               room - CASE room WHEN 2147483647 THEN 0 ELSE (
                   SELECT count(*) FROM jobs WHERE state = 'running' AND kind = asked.kind
               ) END AS room
          FROM unnest($2::text[], $3::integer[], $4::uuid[]) AS asked (kind, room, begin)
         CROSS JOIN LATERAL (
               SELECT urgency
                 FROM jobs
                WHERE state = 'waiting' AND due AND kind = asked.kind
                ORDER BY urgency
                LIMIT 1
               ) AS first
    ),
    open AS (
        SELECT kind, begin, urgency, room FROM asked WHERE room > 0
    ),
    -- Round the ring of lanes, from where the last turn ended.
    walk (kind, begin, urgency, room, lane, is_round, step) AS (
        SELECT kind, begin, urgency, room, begin, false, 0
          FROM open
         WHERE urgency = (SELECT min(urgency) FROM open)
         UNION ALL
        SELECT kind, begin, urgency, room, next.lane, next.is_round, step + 1
          FROM walk
         CROSS JOIN LATERAL (
               (SELECT lane, walk.is_round
                  FROM jobs
                 WHERE state = 'waiting' AND due AND kind = walk.kind
                   AND urgency = walk.urgency
                   AND lane > walk.lane AND (lane <= walk.begin OR NOT walk.is_round)
                 ORDER BY lane
                 LIMIT 1)
                 UNION ALL
               (SELECT lane, true
                  FROM jobs
                 WHERE state = 'waiting' AND due AND kind = walk.kind
                   AND urgency = walk.urgency
                   AND lane <= walk.begin AND NOT walk.is_round
                 ORDER BY lane
                 LIMIT 1)
                 -- The second is looked for where the first is not found.
                 LIMIT 1
               ) AS next (lane, is_round)
    ),
    lanes AS MATERIALIZED (
        SELECT kind, urgency, room, lane, step FROM walk WHERE step > 0 LIMIT $5
    ),
    taken AS MATERIALIZED (
        SELECT job.row, job.id, job.run_at, lanes.kind, lanes.room, lanes.step
          FROM lanes
         CROSS JOIN LATERAL (
               SELECT ctid AS row, id, run_at
                 FROM jobs
                WHERE state = 'waiting' AND due AND kind = lanes.kind
                  AND jobs.urgency = lanes.urgency AND jobs.lane = lanes.lane AND run_at <= now()
                ORDER BY run_at, id
                LIMIT (SELECT ceil($5::float8 / count(*)) FROM lanes)
                  FOR UPDATE SKIP LOCKED
               ) AS job
    ),
    ranked AS (
        SELECT row, kind, room, step,
               row_number() OVER (PARTITION BY kind, step ORDER BY run_at, id) AS round
          FROM taken
    ),
    fitting AS (
        SELECT row, room, round, step,
               row_number() OVER (PARTITION BY kind ORDER BY round, step) AS place
          FROM ranked
    )
    UPDATE jobs
       SET state = 'running', attempt = attempt + 1, progress = 0, worker_id = $1,
           lease_token = nextval('lease_tokens'),
           lease_expires_at = clock_timestamp() + make_interval(secs => $6)
     -- By where they lie: they are locked, and so they lie still. Whatever the planner expects,
     -- there is no other way to look them up.
     WHERE ctid = ANY (ARRAY(
               SELECT row FROM fitting WHERE place <= room ORDER BY round, step LIMIT $5))
    RETURNING id, lease_token, kind, payload, attempt, trace, lane,
              greatest(date_part('epoch', clock_timestamp() - run_at), 0) AS delay
"""
"""Worker; kinds, how many jobs of each may run, the lane of its last turn; how many; seconds."""
