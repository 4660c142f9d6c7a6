"""Cron schedules: each tick makes one job, whatever the number of replicas."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from cronsim import CronSim

from server.database import Connection, SystemDatabase
from server.enqueue import enqueue
from server.errors import StoreUnavailable

log = structlog.get_logger()

_LONGEST_SLEEP_SECONDS = 10.0
_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """A kind of system job and when it is due."""

    name: str
    cron: str
    """Cron expression in UTC, such as "0 2 * * *"."""
    kind: str


def next_tick(cron: str, after: datetime) -> datetime:
    """Return the first tick after an instant.

    Args:
        cron: Five fields, as crontab(5) has them.
        after: With time zone; the expression is read in it.

    Raises:
        cronsim.CronSimError: It is no cron expression.
    """
    return next(CronSim(cron, after))


class Planner:
    """Enqueues a job at every tick. Ticks that were missed make one job together."""

    def __init__(self, database: SystemDatabase, schedules: Sequence[Schedule]) -> None:
        self._database = database
        self._schedules = tuple(schedules)

    async def run(self) -> None:
        """Store the schedules, then tick until cancelled."""
        stored = False
        while True:
            try:
                if not stored:
                    await self.store()
                    stored = True
                pause = await self.tick()
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("schedules out of reach", error=repr(error))
                pause = _AGAIN_SECONDS
            await asyncio.sleep(pause)

    async def store(self) -> None:
        """Store the schedules; one whose expression is as it was keeps its next tick."""
        async with self._database.transaction() as connection:
            now: datetime = await connection.fetchval("SELECT now()")
            for schedule in self._schedules:
                await connection.execute(
                    """
                    INSERT INTO schedules (name, cron, kind, next_run_at)
                    VALUES ($1, $2, $3, $4)
                        ON CONFLICT (name) DO UPDATE
                       SET cron = $2, kind = $3, next_run_at = $4
                     WHERE schedules.cron <> $2 OR schedules.kind <> $3
                    """,
                    schedule.name,
                    schedule.cron,
                    schedule.kind,
                    next_tick(schedule.cron, now),
                )

    async def tick(self) -> float:
        """Enqueue a job for each schedule that is due and return for how many seconds to sleep."""
        async with self._database.transaction() as connection:
            # Another replica that holds the row is enqueueing its job: there is nothing to do.
            due = await connection.fetch(
                """
                SELECT name, cron, kind, now() AS ticked_at
                  FROM schedules
                 WHERE next_run_at <= now()
                   FOR UPDATE SKIP LOCKED
                """
            )
            for row in due:
                schedule = Schedule(row["name"], row["cron"], row["kind"])
                await _run(connection, schedule, row["ticked_at"])
            seconds = await connection.fetchval(
                "SELECT extract(epoch FROM min(next_run_at) - now())::float8 FROM schedules"
            )
        return min(max(seconds or _LONGEST_SLEEP_SECONDS, _AGAIN_SECONDS), _LONGEST_SLEEP_SECONDS)


async def _run(connection: Connection, schedule: Schedule, now: datetime) -> None:
    await connection.execute(
        "UPDATE schedules SET next_run_at = $2, last_run_at = now() WHERE name = $1",
        schedule.name,
        next_tick(schedule.cron, now),
    )
    # A job of an earlier tick that nobody has done yet does for this tick as well.
    job_id = await enqueue(
        connection, kind=schedule.kind, payload={}, unique_key=f"schedule/{schedule.name}"
    )
    log.info("schedule ticked", schedule=schedule.name, job=str(job_id))
