"""The mesh's own schedules, as its operator sees them."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from server.database import Connection, SystemDatabase
from server.enqueue import enqueue
from server.errors import NotFound
from server.jobs.ticks import next_ticks


@dataclass(frozen=True, slots=True)
class OwnSchedule:
    """When the mesh does something of its own accord."""

    name: str
    kind: str
    cron: str
    time_zone: str
    next_run_at: datetime
    last_run_at: datetime | None
    paused: bool


class OwnSchedules:
    """Shows, pauses and resumes them, and has their jobs made at once."""

    def __init__(self, system: SystemDatabase) -> None:
        self._system = system

    async def all(self) -> list[OwnSchedule]:
        """Return all that the jobs process stored, by name."""
        rows = await self._system.fetch_alone(
            """
            SELECT name, kind, cron, time_zone, next_run_at, last_run_at, paused
              FROM schedules
             ORDER BY name
            """
        )
        return [OwnSchedule(**row) for row in rows]

    async def pause(self, name: str) -> None:
        """Make no jobs until the schedule is resumed, restarts and new settings included.

        Raises:
            NotFound: There is none of this name.
        """
        async with self._system.transaction() as connection:
            await _locked(connection, name)
            await connection.execute("UPDATE schedules SET paused = true WHERE name = $1", name)

    async def resume(self, name: str) -> datetime:
        """Make jobs again from the next tick on, and return when that is.

        Those in the pause were not missed.

        Raises:
            NotFound: There is none of this name.
        """
        async with self._system.transaction() as connection:
            schedule = await _locked(connection, name)
            if not schedule.paused:
                return schedule.next_run_at
            now: datetime = await connection.fetchval("SELECT now()")
            upcoming = next_ticks(schedule.cron, schedule.time_zone, now)[0]
            await connection.execute(
                "UPDATE schedules SET paused = false, next_run_at = $2 WHERE name = $1",
                name,
                upcoming,
            )
        return upcoming

    async def run(self, name: str) -> UUID:
        """Make the job of a tick now, whether the schedule is paused or not; return its id.

        That is the one of an earlier tick while that is not done. The next tick stays as it is.

        Raises:
            NotFound: There is none of this name.
        """
        async with self._system.transaction() as connection:
            schedule = await _locked(connection, name)
            await connection.execute(
                "UPDATE schedules SET last_run_at = now() WHERE name = $1", name
            )
            return await enqueue_tick(connection, name, schedule.kind)


async def enqueue_tick(connection: Connection, name: str, kind: str) -> UUID:
    """Enqueue the job of a tick; one that nobody has done yet does for this tick as well."""
    return await enqueue(connection, kind=kind, payload={}, unique_key=f"schedule/{name}")


async def _locked(connection: Connection, name: str) -> OwnSchedule:
    row = await connection.fetchrow(
        """
        SELECT name, kind, cron, time_zone, next_run_at, last_run_at, paused
          FROM schedules
         WHERE name = $1
           FOR UPDATE
        """,
        name,
    )
    if row is None:
        raise NotFound("schedule")
    return OwnSchedule(**row)
