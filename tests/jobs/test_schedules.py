"""Schedules: one job a tick."""

from __future__ import annotations

import asyncio
import datetime as dt

import asyncpg
import pytest
from cronsim import CronSimError

from server.database import SystemDatabase
from server.jobs.queue import Queue
from server.jobs.schedules import Planner, Schedule, next_tick

NIGHTLY = Schedule("test.nightly", "0 2 * * *", "test")


async def make_due(owner: asyncpg.Connection) -> None:
    await owner.execute("UPDATE schedules SET next_run_at = now() - interval '3 days'")


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 2 * * *", "2026-05-05T02:00:00+00:00"),
        ("*/15 * * * *", "2026-05-04T12:15:00+00:00"),
        ("0 0 29 2 *", "2028-02-29T00:00:00+00:00"),
    ],
)
def test_next_tick_comes_after_now(cron: str, expected: str) -> None:
    now = dt.datetime(2026, 5, 4, 12, tzinfo=dt.UTC)
    assert next_tick(cron, now).isoformat() == expected


def test_nonsense_is_no_schedule() -> None:
    with pytest.raises(CronSimError):
        next_tick("every night", dt.datetime(2026, 5, 4, tzinfo=dt.UTC))


async def test_nothing_happens_before_the_tick(
    system_database: SystemDatabase, queue: Queue
) -> None:
    planner = Planner(system_database, [NIGHTLY])
    await planner.store()
    assert 0 < await planner.tick() <= 10
    assert await queue.lease("w", ["test"], 10) == []


async def test_missed_ticks_make_one_job(
    system_database: SystemDatabase, queue: Queue, owner: asyncpg.Connection
) -> None:
    planner = Planner(system_database, [NIGHTLY])
    await planner.store()
    await make_due(owner)
    await planner.tick()
    await planner.tick()
    assert len(await queue.lease("w", ["test"], 10)) == 1
    assert await owner.fetchval("SELECT next_run_at > now() FROM schedules")


async def test_many_planners_make_one_job_a_tick(
    system_database: SystemDatabase, queue: Queue, owner: asyncpg.Connection
) -> None:
    planners = [Planner(system_database, [NIGHTLY]) for _ in range(4)]
    await asyncio.gather(*(planner.store() for planner in planners))
    for expected in (1, 2, 3):
        await make_due(owner)
        start = asyncio.Barrier(len(planners))

        async def tick(planner: Planner, start: asyncio.Barrier = start) -> None:
            await start.wait()
            await planner.tick()

        await asyncio.gather(*(tick(planner) for planner in planners))
        assert len(await queue.lease("w", ["test"], 10)) == 1
        await owner.execute(
            "UPDATE jobs SET state = 'succeeded', finished_at = now(), worker_id = NULL, "
            "lease_expires_at = NULL"
        )
        assert await owner.fetchval("SELECT count(*) FROM jobs") == expected


async def test_tick_waits_for_the_job_of_the_tick_before(
    system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    planner = Planner(system_database, [NIGHTLY])
    await planner.store()
    for _ in range(2):
        await make_due(owner)
        await planner.tick()
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 1


async def test_restart_keeps_the_next_tick_and_a_new_expression_moves_it(
    system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await Planner(system_database, [NIGHTLY]).store()
    await make_due(owner)
    await Planner(system_database, [NIGHTLY]).store()
    assert await owner.fetchval("SELECT next_run_at < now() FROM schedules")
    await Planner(system_database, [Schedule("test.nightly", "0 3 * * *", "test")]).store()
    assert await owner.fetchval(
        "SELECT next_run_at > now() AND extract(hour FROM next_run_at AT TIME ZONE 'UTC') = 3 "
        "FROM schedules"
    )
