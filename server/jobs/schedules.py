"""Cron schedules: each tick makes one job, whatever the number of replicas."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog

from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.errors import Problem, StoreUnavailable
from server.jobs.own_schedules import enqueue_tick
from server.jobs.schedule_store import Due, ScheduleStore
from server.jobs.ticks import Missed, is_to_run, next_ticks

log = structlog.get_logger()

_LONGEST_SLEEP_SECONDS: Final = 10.0
_AGAIN_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """A kind of system job and when it is due."""

    name: str
    cron: str
    """Cron expression, such as "0 2 * * *"."""
    kind: str
    time_zone: str = "UTC"
    missed: Missed = Missed.RUN_ONCE


class Planner:
    """Enqueues a job at every tick."""

    def __init__(
        self,
        database: SystemDatabase,
        schedules: Sequence[Schedule],
        users: ScheduleStore,
        count: Callable[[Caller], None] | None = None,
    ) -> None:
        """Serve schedules.

        Args:
            database: Where those of the mesh are.
            schedules: The mesh's own.
            users: Those of users.
            count: Is told of each job that a user's schedule has asked for.
        """
        self._database = database
        self._schedules = tuple(schedules)
        self._users = users
        self._count = count

    async def run(self) -> None:
        """Store the schedules, then tick until cancelled."""
        stored = False
        while True:
            try:
                if not stored:
                    await self.store()
                    stored = True
                pause = min(await self.tick(), await self.tick_for_users())
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("schedules out of reach", error=repr(error))
                pause = _AGAIN_SECONDS
            await asyncio.sleep(pause)

    async def store(self) -> None:
        """Store the schedules; one whose ticks are as they were keeps its next tick."""
        async with self._database.transaction() as connection:
            now: datetime = await connection.fetchval("SELECT now()")
            for schedule in self._schedules:
                await connection.execute(
                    """
                    INSERT INTO schedules (name, cron, kind, next_run_at, time_zone, missed)
                    VALUES ($1, $2, $3, $4, $5, $6)
                        ON CONFLICT (name) DO UPDATE
                       SET cron = $2, kind = $3, next_run_at = $4, time_zone = $5, missed = $6
                     WHERE (schedules.cron, schedules.kind, schedules.time_zone, schedules.missed)
                           <> ($2, $3, $5, $6)
                    """,
                    schedule.name,
                    schedule.cron,
                    schedule.kind,
                    next_ticks(schedule.cron, schedule.time_zone, now)[0],
                    schedule.time_zone,
                    schedule.missed.value,
                )

    async def tick(self) -> float:
        """Enqueue a job for each schedule that is due and return for how many seconds to sleep."""
        async with self._database.transaction() as connection:
            # Another replica that holds the row is enqueueing its job: there is nothing to do.
            due = await connection.fetch(
                """
                SELECT name, cron, kind, time_zone, missed, next_run_at, now() AS now
                  FROM schedules
                 WHERE next_run_at <= now() AND NOT paused
                   FOR UPDATE SKIP LOCKED
                """
            )
            for row in due:
                schedule = Schedule(
                    *(row["name"], row["cron"], row["kind"], row["time_zone"]),
                    Missed(row["missed"]),
                )
                await _run(connection, schedule, row["next_run_at"], row["now"])
            seconds = await connection.fetchval(
                """
                SELECT extract(epoch FROM min(next_run_at) - now())::float8
                  FROM schedules
                 WHERE NOT paused
                """
            )
        return _pause(seconds)

    async def tick_for_users(self) -> float:
        """Do the same for the schedules of users."""
        due, seconds = await self._users.due()
        for each in due:
            await self._tick_for(each)
        return _pause(seconds)

    async def _tick_for(self, due: Due) -> None:
        try:
            if job_id := await self._users.tick(due):
                if self._count:
                    self._count(due.caller)
                log.info("schedule ticked", schedule=str(due.id), job=str(job_id))
        except (StoreUnavailable, TimeoutError):
            raise
        except Problem as problem:
            # One whose user is being erased holds up nobody else's.
            log.warning("schedule did not tick", schedule=str(due.id), reason=problem.reason)
        except Exception as error:
            # Nor does one that cannot be read any more, or whose user keeps something locked.
            log.exception("schedule did not tick", schedule=str(due.id), exc_info=error)


def _pause(seconds: float | None) -> float:
    return min(max(seconds or _LONGEST_SLEEP_SECONDS, _AGAIN_SECONDS), _LONGEST_SLEEP_SECONDS)


async def _run(connection: Connection, schedule: Schedule, due_at: datetime, now: datetime) -> None:
    await connection.execute(
        "UPDATE schedules SET next_run_at = $2, last_run_at = now() WHERE name = $1",
        schedule.name,
        next_ticks(schedule.cron, schedule.time_zone, now)[0],
    )
    if not is_to_run(schedule.missed, due_at, now):
        log.info("schedule missed a tick", schedule=schedule.name)
        return
    job_id = await enqueue_tick(connection, schedule.name, schedule.kind)
    log.info("schedule ticked", schedule=schedule.name, job=str(job_id))
