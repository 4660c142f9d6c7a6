"""Schedules of users in Postgres."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg
import structlog

from server import audit, ids
from server.caller import Caller
from server.database import Connection, Database, SystemDatabase
from server.errors import NotFound, Problem, QuotaExceeded
from server.jobs.asking import Kinds
from server.jobs.model import UserSchedule
from server.jobs.ticks import Missed, is_to_run, next_ticks
from server.requests import claim

MOST: Final = 20
"""Schedules of one user."""
_AT_ONCE: Final = 100
_COLUMNS: Final = """id, kind, cron, time_zone, missed, payload, next_run_at, last_run_at,
                   last_job_id, created_at"""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Due:
    """A schedule of somebody that is due."""

    id: UUID
    caller: Caller


class ScheduleStore:
    """Keeps schedules of users, and makes their jobs as these users."""

    def __init__(self, database: Database, system: SystemDatabase, kinds: Kinds) -> None:
        """Serve schedules.

        Args:
            database: Where users see and change their own.
            system: Tells whose are due.
            kinds: What users may ask for.
        """
        self._database = database
        self._system = system
        self._kinds = kinds

    async def create(
        self, caller: Caller, wanted: UserSchedule, request_id: str, contents: bytes
    ) -> UserSchedule:
        """Keep a new schedule, or return the one that an earlier request of the same id made.

        Args:
            caller: Whose it is.
            wanted: The schedule; its times are not looked at.
            request_id: Chosen by the client; empty for none.
            contents: The request, to recognise a retry by.

        Raises:
            RequestIdReused: The earlier request had other contents.
            QuotaExceeded: The user has as many as one may have.
        """
        async with self._database.transaction(caller) as connection:
            if request_id:
                claimed = await claim(
                    connection, caller, "CreateSchedule", request_id, contents, wanted.id
                )
                if claimed != wanted.id:
                    return await _get(connection, caller, claimed)
            await _check_room(connection, caller)
            now: datetime = await connection.fetchval("SELECT now()")
            row = await connection.fetchrow(
                f"""
                INSERT INTO user_schedules (id, tenant_id, user_id, kind, cron, time_zone, missed,
                                            next_run_at, payload)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
                RETURNING {_COLUMNS}
                """,  # noqa: S608 - a constant
                wanted.id,
                caller.tenant_id,
                caller.user_id,
                wanted.kind,
                wanted.cron,
                wanted.time_zone,
                wanted.missed.value,
                next_ticks(wanted.cron, wanted.time_zone, now)[0],
                json.dumps(wanted.payload),
            )
            await _record(connection, caller, "schedule.create", wanted.id)
        return _schedule(row)

    async def get(self, caller: Caller, schedule_id: UUID) -> UserSchedule:
        """Return a schedule.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            return await _get(connection, caller, schedule_id)

    async def page(self, caller: Caller, *, before: UUID | None, limit: int) -> list[UserSchedule]:
        """Return schedules with ids below `before`, highest first, at most `limit`."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS}
                  FROM user_schedules
                 WHERE tenant_id = $1 AND user_id = $2 AND ($3::uuid IS NULL OR id < $3)
                 ORDER BY id DESC
                 LIMIT $4
                """,  # noqa: S608 - a constant
                caller.tenant_id,
                caller.user_id,
                before,
                limit,
            )
        return [_schedule(row) for row in rows]

    async def pause(self, caller: Caller, schedule_id: UUID) -> UserSchedule:
        """Make no jobs until the schedule is resumed.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            schedule = await _get(connection, caller, schedule_id, lock=True)
            if schedule.next_run_at is None:
                return schedule
            await _record(connection, caller, "schedule.pause", schedule_id)
            return await _move(connection, caller, schedule_id, None)

    async def resume(self, caller: Caller, schedule_id: UUID) -> UserSchedule:
        """Make jobs again, from the next tick on.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            schedule = await _get(connection, caller, schedule_id, lock=True)
            if schedule.next_run_at is not None:
                return schedule
            await _record(connection, caller, "schedule.resume", schedule_id)
            now: datetime = await connection.fetchval("SELECT now()")
            upcoming = next_ticks(schedule.cron, schedule.time_zone, now)[0]
            return await _move(connection, caller, schedule_id, upcoming)

    async def delete(self, caller: Caller, schedule_id: UUID) -> None:
        """Delete a schedule.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            deleted = await connection.fetchval(
                """
                DELETE FROM user_schedules
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                RETURNING true
                """,
                caller.tenant_id,
                caller.user_id,
                schedule_id,
            )
            if not deleted:
                raise NotFound("schedule")
            await _record(connection, caller, "schedule.delete", schedule_id)

    async def due(self) -> tuple[list[Due], float | None]:
        """Return schedules whose tick has come, at most 100, and seconds until the next one.

        That is None if nobody has any.
        """
        rows = await self._system.fetch_alone(
            """
            SELECT id, tenant_id, user_id, next_run_at <= now() AS is_due,
                   extract(epoch FROM next_run_at - now())::float8 AS seconds
              FROM user_schedules
             WHERE next_run_at IS NOT NULL
             ORDER BY next_run_at
             LIMIT $1
            """,
            _AT_ONCE,
        )
        due = [
            Due(row["id"], Caller(row["tenant_id"], row["user_id"]))
            for row in rows
            if row["is_due"]
        ]
        upcoming = [row["seconds"] for row in rows if not row["is_due"]]
        return due, 0.0 if len(due) == _AT_ONCE else min(upcoming, default=None)

    async def tick(self, due: Due) -> UUID | None:
        """Make the job of a tick as its user, and return its id.

        Returns None, too, if there is nothing to make any more: the schedule was changed, another
        replica made it, the user may not have it, or the tick was missed and is to be skipped.
        """
        async with self._database.transaction(due.caller) as connection:
            row = await connection.fetchrow(
                f"""
                SELECT {_COLUMNS}, now() AS now
                  FROM user_schedules
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3 AND next_run_at <= now()
                   FOR UPDATE SKIP LOCKED
                """,  # noqa: S608 - a constant
                due.caller.tenant_id,
                due.caller.user_id,
                due.id,
            )
            if row is None:
                return None
            schedule, now = _schedule(row), row["now"]
            job_id = None
            if schedule.next_run_at and is_to_run(schedule.missed, schedule.next_run_at, now):
                job_id = await self._ask(connection, due.caller, schedule)
            await connection.execute(
                """
                UPDATE user_schedules
                   SET next_run_at = $4, last_run_at = now(), last_job_id = $5
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                due.caller.tenant_id,
                due.caller.user_id,
                due.id,
                next_ticks(schedule.cron, schedule.time_zone, now)[0],
                job_id,
            )
            return job_id

    async def _ask(
        self, connection: Connection, caller: Caller, schedule: UserSchedule
    ) -> UUID | None:
        """Make a job, unless it is refused: then the schedule goes on with its next tick."""
        await connection.execute("SAVEPOINT asking")
        try:
            return await self._kinds.ask(connection, caller, schedule.kind, schedule.payload)
        except Problem as problem:
            await connection.execute("ROLLBACK TO SAVEPOINT asking")
            log.info("schedule refused", schedule=str(schedule.id), reason=problem.reason)
            return None


async def _check_room(connection: Connection, caller: Caller) -> None:
    # One after the other: two that count at once would exceed.
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('schedules/' || $1, 0))",
        str(caller.user_id),
    )
    own = await connection.fetchval(
        "SELECT count(*) FROM user_schedules WHERE tenant_id = $1 AND user_id = $2",
        caller.tenant_id,
        caller.user_id,
    )
    if own >= MOST:
        raise QuotaExceeded("schedules", own, MOST, "delete one of them", "schedules")


async def _get(
    connection: Connection, caller: Caller, schedule_id: UUID, *, lock: bool = False
) -> UserSchedule:
    row = await connection.fetchrow(
        f"""
        SELECT {_COLUMNS}
          FROM user_schedules
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        {"FOR UPDATE" if lock else ""}
        """,  # noqa: S608 - constants
        caller.tenant_id,
        caller.user_id,
        schedule_id,
    )
    if row is None:
        raise NotFound("schedule")
    return _schedule(row)


async def _move(
    connection: Connection, caller: Caller, schedule_id: UUID, upcoming: datetime | None
) -> UserSchedule:
    row = await connection.fetchrow(
        f"""
        UPDATE user_schedules
           SET next_run_at = $4
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        RETURNING {_COLUMNS}
        """,  # noqa: S608 - a constant
        caller.tenant_id,
        caller.user_id,
        schedule_id,
        upcoming,
    )
    return _schedule(row)


async def _record(connection: Connection, caller: Caller, action: str, schedule_id: UUID) -> None:
    await audit.record(connection, caller, action, ids.show(ids.SCHEDULE, schedule_id))


def _schedule(row: asyncpg.Record) -> UserSchedule:
    return UserSchedule(
        id=row["id"],
        kind=row["kind"],
        cron=row["cron"],
        time_zone=row["time_zone"],
        missed=Missed(row["missed"]),
        payload=json.loads(row["payload"]),
        next_run_at=row["next_run_at"],
        last_run_at=row["last_run_at"],
        last_job_id=row["last_job_id"],
        created_at=row["created_at"],
    )
