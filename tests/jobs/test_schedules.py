"""Schedules: one job a tick."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable
from itertools import pairwise

import asyncpg
import pytest
import pytest_asyncio
from cronsim import CronSimError

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.errors import NotFound
from server.jobs.model import UserSchedule
from server.jobs.own_schedules import OwnSchedules
from server.jobs.queue import Queue
from server.jobs.schedule_store import ScheduleStore
from server.jobs.schedules import Planner, Schedule
from server.jobs.ticks import Missed, at_least_every, next_ticks
from server.processes.kinds import KINDS
from tests.conftest import new_caller
from tests.jobs.conftest import want_vectors

NIGHTLY = Schedule("test.nightly", "0 2 * * *", "test")


Plan = Callable[..., Planner]


@pytest.fixture
def schedules(database: Database, system_database: SystemDatabase) -> ScheduleStore:
    return ScheduleStore(database, system_database, KINDS)


@pytest.fixture
def planner_of(system_database: SystemDatabase, schedules: ScheduleStore) -> Plan:
    return lambda *own: Planner(system_database, own, schedules)


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
    assert next_ticks(cron, "UTC", now)[0].isoformat() == expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        # In winter, and over the night in which clocks are put forward: 02:30 is not.
        ("2026-01-10T12:00", "2026-01-11T02:30+01:00"),
        ("2026-03-28T12:00", "2026-03-29T03:00+02:00"),
        ("2026-03-29T12:00", "2026-03-30T02:30+02:00"),
        # Clocks are put back: 02:30 is twice, and ticks once.
        ("2026-10-24T12:00", "2026-10-25T02:30+02:00"),
        ("2026-10-25T01:00", "2026-10-26T02:30+01:00"),
    ],
)
def test_tick_is_read_in_its_time_zone(after: str, expected: str) -> None:
    instant = dt.datetime.fromisoformat(f"{after}+00:00")
    (tick,) = next_ticks("30 2 * * *", "Europe/Berlin", instant)
    assert tick == dt.datetime.fromisoformat(expected)


def test_nonsense_is_no_schedule() -> None:
    with pytest.raises(CronSimError):
        next_ticks("every night", "UTC", dt.datetime(2026, 5, 4, tzinfo=dt.UTC))


@pytest.mark.parametrize(
    "seconds", [1, 5, 7.5, 45, 59.9, 60, 90, 300, 420, 3599, 3600, 5400, 7200, 25_000, 86_400]
)
def test_turns_are_never_further_apart_than_promised(seconds: float) -> None:
    now = dt.datetime(2026, 5, 4, 12, tzinfo=dt.UTC)
    ticks = next_ticks(at_least_every(seconds), "UTC", now, count=200)
    gaps = [(late - early).total_seconds() for early, late in pairwise([now, *ticks])]
    assert seconds / 2 < max(gaps) <= seconds


@pytest.mark.parametrize(("seconds", "gap"), [(0.2, 1), (1_000_000, 86_400)])
def test_turns_come_each_second_at_most_and_each_day_at_least(seconds: float, gap: float) -> None:
    first, second = next_ticks(at_least_every(seconds), "UTC", dt.datetime.now(dt.UTC), count=2)
    assert (second - first).total_seconds() == gap


async def test_nothing_happens_before_the_tick(planner_of: Plan, queue: Queue) -> None:
    planner = planner_of(NIGHTLY)
    await planner.store()
    assert 0 < await planner.tick() <= 10
    assert await queue.lease("w", ["test"], 10) == []


async def test_missed_ticks_make_one_job(
    planner_of: Plan, queue: Queue, owner: asyncpg.Connection
) -> None:
    planner = planner_of(NIGHTLY)
    await planner.store()
    await make_due(owner)
    await planner.tick()
    await planner.tick()
    assert len(await queue.lease("w", ["test"], 10)) == 1
    assert await owner.fetchval("SELECT next_run_at > now() FROM schedules")


async def test_many_planners_make_one_job_a_tick(
    planner_of: Plan, queue: Queue, owner: asyncpg.Connection
) -> None:
    planners = [planner_of(NIGHTLY) for _ in range(4)]
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
    planner_of: Plan, owner: asyncpg.Connection
) -> None:
    planner = planner_of(NIGHTLY)
    await planner.store()
    for _ in range(2):
        await make_due(owner)
        await planner.tick()
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 1


async def test_restart_keeps_the_next_tick_and_a_new_expression_moves_it(
    planner_of: Plan, owner: asyncpg.Connection
) -> None:
    await planner_of(NIGHTLY).store()
    await make_due(owner)
    await planner_of(NIGHTLY).store()
    assert await owner.fetchval("SELECT next_run_at < now() FROM schedules")
    await planner_of(Schedule("test.nightly", "0 3 * * *", "test")).store()
    assert await owner.fetchval(
        "SELECT next_run_at > now() AND extract(hour FROM next_run_at AT TIME ZONE 'UTC') = 3 "
        "FROM schedules"
    )


async def test_missed_tick_is_skipped_if_that_is_wanted(
    planner_of: Plan, queue: Queue, owner: asyncpg.Connection
) -> None:
    planner = planner_of(Schedule("test.nightly", "0 2 * * *", "test", missed=Missed.SKIP))
    await planner.store()
    await make_due(owner)
    await planner.tick()
    assert await queue.lease("w", ["test"], 10) == []
    await owner.execute("UPDATE schedules SET next_run_at = now() - interval '1 s'")
    await planner.tick()
    assert len(await queue.lease("w", ["test"], 10)) == 1


# --- schedules of users -----------------------------------------------------------------------

KIND = "embedding.batch"


@pytest_asyncio.fixture
async def embedded(database: Database, caller: Caller) -> Caller:
    """A user who wants vectors."""
    await want_vectors(database, caller)
    return caller


async def test_paused_schedule_of_the_mesh_makes_no_jobs_until_it_is_resumed(
    planner_of: Plan, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    planner, own = planner_of(NIGHTLY), OwnSchedules(system_database)
    await planner.store()
    await own.pause(NIGHTLY.name)
    await make_due(owner)
    # A replica that starts meanwhile does not resume it.
    await planner.store()
    await planner.tick()
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 0
    upcoming = await own.resume(NIGHTLY.name)
    assert upcoming > dt.datetime.now(dt.UTC)
    assert await own.resume(NIGHTLY.name) == upcoming
    await planner.tick()
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 0
    (shown,) = await own.all()
    assert (shown.name, shown.next_run_at, shown.paused) == (NIGHTLY.name, upcoming, False)


async def test_schedule_of_the_mesh_is_run_now_and_ticks_as_ever(
    planner_of: Plan, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    planner, own = planner_of(NIGHTLY), OwnSchedules(system_database)
    await planner.store()
    (before,) = await own.all()
    made = await own.run(NIGHTLY.name)
    assert await own.run(NIGHTLY.name) == made
    await make_due(owner)
    await planner.tick()
    # Nobody has done the job yet: it does for the tick as well.
    job = await owner.fetchrow("SELECT id, kind, user_id FROM jobs")
    assert tuple(job) == (made, NIGHTLY.kind, None)
    (after,) = await own.all()
    assert (before.last_run_at, after.last_run_at is not None) == (None, True)


@pytest.mark.parametrize("do", ["pause", "resume", "run"])
async def test_schedule_that_the_mesh_has_not_is_not_found(
    system_database: SystemDatabase, do: str
) -> None:
    with pytest.raises(NotFound):
        await getattr(OwnSchedules(system_database), do)("no.such")


async def make_users_due(owner: asyncpg.Connection, age: str = "1 s") -> None:
    await owner.execute(
        "UPDATE user_schedules SET next_run_at = now() - $1::text::interval "
        "WHERE next_run_at IS NOT NULL",
        age,
    )


async def schedule(schedules: ScheduleStore, caller: Caller, **fields: object) -> UserSchedule:
    usual = {"kind": KIND, "cron": "0 2 * * *", "time_zone": "UTC", "missed": Missed.RUN_ONCE}
    wanted = UserSchedule(ids.new_id(), **{**usual, **fields})  # type: ignore[arg-type]
    return await schedules.create(caller, wanted, "", b"")


async def test_many_planners_make_one_job_of_a_users_tick(
    planner_of: Plan, schedules: ScheduleStore, embedded: Caller, owner: asyncpg.Connection
) -> None:
    made = await schedule(schedules, embedded)
    for expected in (1, 2, 3):
        await make_users_due(owner, "3 days")
        await asyncio.gather(*(planner_of().tick_for_users() for _ in range(4)))
        assert await owner.fetchval("SELECT count(*) FROM jobs") == expected
        # Another tick makes another job only when the one before is done.
        await make_users_due(owner)
        await planner_of().tick_for_users()
        job = await owner.fetchrow("SELECT id, kind, user_id FROM jobs ORDER BY id DESC LIMIT 1")
        assert (job["kind"], job["user_id"]) == (KIND, embedded.user_id)
        assert await owner.fetchval("SELECT count(*) FROM jobs") == expected
        now = await schedules.get(embedded, made.id)
        assert now.last_job_id == job["id"]
        assert now.next_run_at
        assert now.next_run_at > dt.datetime.now(dt.UTC)
        await owner.execute("UPDATE jobs SET state = 'succeeded', finished_at = now()")


async def test_the_job_of_a_users_tick_is_counted_once_whatever_the_number_of_planners(
    database: Database,
    system_database: SystemDatabase,
    schedules: ScheduleStore,
    embedded: Caller,
    owner: asyncpg.Connection,
) -> None:
    await schedule(schedules, embedded)
    await schedule(schedules, await new_caller(database))  # has nothing to do
    await make_users_due(owner)
    counted = list[Caller]()
    planners = [Planner(system_database, (), schedules, counted.append) for _ in range(4)]
    await asyncio.gather(*(planner.tick_for_users() for planner in planners))
    assert counted == [embedded]


async def test_tick_of_a_user_who_withdrew_makes_no_job(
    planner_of: Plan, schedules: ScheduleStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    made = await schedule(schedules, caller)
    await make_users_due(owner)
    await planner_of().tick_for_users()
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 0
    assert (await schedules.get(caller, made.id)).last_job_id is None


async def test_kind_that_is_refused_holds_up_no_other(
    planner_of: Plan, schedules: ScheduleStore, embedded: Caller, owner: asyncpg.Connection
) -> None:
    refused = await schedule(schedules, embedded, kind="meditation.run")
    other = await schedule(schedules, embedded, kind="user.export")
    await owner.execute("UPDATE consents SET granted = false WHERE purpose = 'memory.store'")
    await make_users_due(owner)
    await planner_of().tick_for_users()
    assert await owner.fetchval("SELECT array_agg(kind) FROM jobs") == ["user.export"]
    assert (await schedules.get(embedded, other.id)).last_job_id
    now = await schedules.get(embedded, refused.id)
    assert (now.last_job_id, now.next_run_at and now.next_run_at > dt.datetime.now(dt.UTC)) == (
        None,
        True,
    )


async def test_schedule_of_another_releases_kind_holds_up_no_other(
    planner_of: Plan, schedules: ScheduleStore, embedded: Caller, owner: asyncpg.Connection
) -> None:
    foreign = await schedule(schedules, embedded, kind="meditation.run")
    await owner.execute("UPDATE user_schedules SET kind = 'of.a.later.release'")
    other = await schedule(schedules, embedded)
    await make_users_due(owner)
    await planner_of().tick_for_users()
    assert (await schedules.get(embedded, foreign.id)).last_job_id is None
    assert (await schedules.get(embedded, other.id)).last_job_id


async def test_schedule_of_the_former_name_makes_a_job_of_the_new_one(
    planner_of: Plan, schedules: ScheduleStore, embedded: Caller, owner: asyncpg.Connection
) -> None:
    await schedule(schedules, embedded, kind="memories.embed")
    await make_users_due(owner)
    await planner_of().tick_for_users()
    assert await owner.fetchval("SELECT kind FROM jobs") == KIND


async def test_schedule_of_a_user_who_is_erased_holds_up_no_other(
    planner_of: Plan,
    schedules: ScheduleStore,
    embedded: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    gone = await new_caller(database)
    await schedule(schedules, gone, kind="meditation.run")
    made = await schedule(schedules, embedded)
    await owner.execute(
        "INSERT INTO erasures (id, receipt_id, tenant_id, user_id) VALUES ($1, $1, $2, $3)",
        ids.new_id(),
        gone.tenant_id,
        gone.user_id,
    )
    await make_users_due(owner)
    await planner_of().tick_for_users()
    assert (await schedules.get(embedded, made.id)).last_job_id


async def test_schedule_that_cannot_be_read_any_more_holds_up_no_other(
    planner_of: Plan, schedules: ScheduleStore, embedded: Caller, owner: asyncpg.Connection
) -> None:
    await schedule(schedules, embedded, kind="meditation.run")
    await owner.execute("UPDATE user_schedules SET time_zone = 'Nowhere/Any_More'")
    made = await schedule(schedules, embedded)
    await make_users_due(owner)
    await planner_of().tick_for_users()
    assert await owner.fetchval("SELECT array_agg(kind) FROM jobs") == [KIND]
    assert (await schedules.get(embedded, made.id)).last_job_id


async def test_scheduled_run_is_as_its_payload_says(
    planner_of: Plan, schedules: ScheduleStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    await schedule(schedules, caller, kind="meditation.run", payload={"dry_run": True})
    await make_users_due(owner)
    await planner_of().tick_for_users()
    assert await owner.fetchval("SELECT dry_run FROM meditations") is True


async def test_paused_schedule_does_not_tick_and_a_resumed_one_missed_nothing(
    planner_of: Plan, schedules: ScheduleStore, embedded: Caller, owner: asyncpg.Connection
) -> None:
    made = await schedule(schedules, embedded)
    await make_users_due(owner)
    assert (await schedules.pause(embedded, made.id)).next_run_at is None
    assert (await schedules.pause(embedded, made.id)).next_run_at is None
    await planner_of().tick_for_users()
    resumed = await schedules.resume(embedded, made.id)
    assert await schedules.resume(embedded, made.id) == resumed
    await planner_of().tick_for_users()
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 0
    assert resumed.next_run_at
    assert resumed.next_run_at > dt.datetime.now(dt.UTC)
    actions = await owner.fetch("SELECT action FROM audit_events ORDER BY id")
    assert [row["action"] for row in actions][-3:] == [
        "schedule.create",
        "schedule.pause",
        "schedule.resume",
    ]


async def test_users_missed_tick_is_skipped_if_that_is_wanted(
    planner_of: Plan, schedules: ScheduleStore, embedded: Caller, owner: asyncpg.Connection
) -> None:
    await schedule(schedules, embedded, missed=Missed.SKIP)
    await make_users_due(owner, "2 minutes")
    await planner_of().tick_for_users()
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 0
    await make_users_due(owner)
    await planner_of().tick_for_users()
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 1
