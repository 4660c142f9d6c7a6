"""The queue itself: leases, fencing, attempts, unique keys."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest
from prometheus_client import REGISTRY

from server.caller import Caller
from server.database import Database, SystemDatabase, open_pool
from server.enqueue import NewJob, enqueue, enqueue_all
from server.jobs.model import Beat, Completed, Failed, Held, Lease, Stopped
from server.jobs.queue import LEASE, PLANS_OF_QUEUE, Queue
from tests.conftest import Urls, new_caller


async def enqueue_one(database: SystemDatabase, **arguments: object) -> UUID:
    async with database.transaction() as connection:
        return await enqueue(connection, **{"kind": "test", "payload": {}, **arguments})  # type: ignore[arg-type]


async def let_lapse(owner: asyncpg.Connection) -> None:
    await owner.execute(
        "UPDATE jobs SET lease_expires_at = now() - interval '1 s' WHERE state = 'running'"
    )


async def come_due(queue: Queue, owner: asyncpg.Connection) -> None:
    """Let all delays be over."""
    await owner.execute("UPDATE jobs SET run_at = now() WHERE NOT due")
    await queue.admit()


async def row(owner: asyncpg.Connection, job_id: UUID) -> asyncpg.Record:
    return await owner.fetchrow(
        """
        SELECT state, attempt, error, result, progress, lease_token, run_at > now() AS is_delayed,
               worker_id, finished_at
          FROM jobs
         WHERE id = $1
        """,
        job_id,
    )


async def test_job_is_leased_once(queue: Queue, system_database: SystemDatabase) -> None:
    job_id = await enqueue_one(system_database, payload={"n": 1})
    (lease,) = await queue.lease("a", ["test"], 10)
    assert (lease.held.job_id, lease.payload_json, lease.attempt) == (job_id, '{"n": 1}', 1)
    assert await queue.lease("b", ["test"], 10) == []


async def test_concurrent_leasers_never_get_one_job(
    queue: Queue, system_database: SystemDatabase
) -> None:
    async with system_database.transaction() as connection:
        await enqueue_all(connection, [NewJob("test") for _ in range(100)])
    start = asyncio.Barrier(8)

    async def lease_all(worker_id: str) -> list[Held]:
        await start.wait()
        held: list[Held] = []
        while leases := await queue.lease(worker_id, ["test"], 3):
            held += [lease.held for lease in leases]
        return held

    shares = await asyncio.gather(*(lease_all(f"worker {n}") for n in range(8)))
    held = [lease for share in shares for lease in share]
    assert len(held) == 100
    assert len({lease.job_id for lease in held}) == 100
    assert len({lease.token for lease in held}) == 100


async def test_urgent_jobs_come_first_and_later_ones_wait(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    in_an_hour = await owner.fetchval("SELECT now() + interval '1 h'")
    await enqueue_one(system_database, run_at=in_an_hour, priority=9)
    usual = await enqueue_one(system_database, kind="other")
    urgent = await enqueue_one(system_database, priority=1)
    leases = [
        lease.held.job_id
        for _ in range(3)
        for lease in await queue.lease("a", ["test", "other"], 1)
    ]
    assert leases == [urgent, usual]


async def test_only_kinds_asked_for_are_leased(
    queue: Queue, system_database: SystemDatabase
) -> None:
    await enqueue_one(system_database, kind="other")
    assert await queue.lease("a", ["test"], 10) == []


async def test_lapsed_lease_is_offered_again_with_a_greater_token(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    job_id = await enqueue_one(system_database)
    (first,) = await queue.lease("a", ["test"], 1)
    assert await queue.reclaim() == 0
    await let_lapse(owner)
    assert await queue.reclaim() == 1
    (second,) = await queue.lease("b", ["test"], 1)
    assert second.held.job_id == job_id
    assert second.held.token > first.held.token
    assert second.attempt == 2


@pytest.mark.parametrize("how", [Completed, Failed])
async def test_outcome_of_a_zombie_is_refused(
    how: type[Completed] | type[Failed],
    queue: Queue,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    job_id = await enqueue_one(system_database)
    (zombie,) = await queue.lease("a", ["test"], 1)
    await let_lapse(owner)
    await queue.reclaim()
    (lease,) = await queue.lease("a", ["test"], 1)
    assert await queue.settle("a", [how(zombie.held, "{}")]) == set()
    assert (await queue.extend("a", [Beat(zombie.held, 0.5)])).lost == {zombie.held}
    assert await queue.release("a", [zombie.held]) == set()
    assert (await row(owner, job_id))["state"] == "running"
    assert await queue.settle("a", [Completed(lease.held, '{"by": "b"}')]) == {lease.held}
    assert (await row(owner, job_id))["result"] == '{"by": "b"}'


async def test_outcome_counts_once_and_stands_whenever_it_is_told_again(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    job_id = await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    assert await queue.settle("a", [Completed(lease.held, '{"n": 1}')]) == {lease.held}
    settled = await row(owner, job_id)
    assert await queue.settle("a", [Completed(lease.held, '{"n": 2}')]) == {lease.held}
    assert await queue.settle("a", [Failed(lease.held, "it broke")]) == set()
    assert await row(owner, job_id) == settled


FATES = ["it waits", "it runs again", "it failed again", "it is done", "it is dead"]


@pytest.mark.parametrize("since", FATES)
async def test_failure_counts_once_and_stands_whenever_it_is_told_again(
    since: str, queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    fate = FATES.index(since)
    job_id = await enqueue_one(system_database, max_attempts=1 if since == "it is dead" else 5)
    (lease,) = await queue.lease("a", ["test"], 1)
    assert await queue.settle("a", [Failed(lease.held, "it broke")]) == {lease.held}
    if fate in {1, 2, 3}:
        await come_due(queue, owner)
        (later,) = await queue.lease("b", ["test"], 1)
        if fate > 1:
            how = Completed(later.held, None) if fate == 3 else Failed(later.held, "it broke anew")
            assert await queue.settle("b", [how]) == {later.held}
    before = await row(owner, job_id)
    failures = REGISTRY.get_sample_value("worker_failures_total", {"reason": "handler"})
    assert failures
    assert await queue.settle("a", [Failed(lease.held, "told again")]) == {lease.held}
    assert await row(owner, job_id) == before
    assert REGISTRY.get_sample_value("worker_failures_total", {"reason": "handler"}) == failures
    # It did not end so.
    assert await queue.settle("a", [Completed(lease.held, None)]) == set()
    assert await row(owner, job_id) == before


async def test_only_the_latest_failures_of_a_job_are_remembered(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await enqueue_one(system_database, max_attempts=100)
    held: list[Held] = []
    for _ in range(12):
        (lease,) = await queue.lease("a", ["test"], 1)
        await queue.settle("a", [Failed(lease.held, "it broke")])
        held.append(lease.held)
        await come_due(queue, owner)
    assert await queue.settle("a", [Failed(each, "") for each in held]) == set(held[2:])


@pytest.mark.parametrize("gone", ["lapsed", "released"])
async def test_failure_is_not_told_again_of_what_ended_otherwise(
    gone: str, queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    if gone == "lapsed":
        await let_lapse(owner)
        await queue.reclaim()
    else:
        await queue.release("a", [lease.held])
    assert await queue.settle("a", [Failed(lease.held, "it broke")]) == set()


async def test_lease_of_another_worker_is_out_of_reach(
    queue: Queue, system_database: SystemDatabase
) -> None:
    await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    assert await queue.settle("thief", [Completed(lease.held, None)]) == set()
    assert await queue.settle("thief", [Failed(lease.held, "")]) == set()
    assert (await queue.extend("thief", [Beat(lease.held, 0)])).lost == {lease.held}
    assert await queue.release("thief", [lease.held]) == set()
    assert await queue.settle("a", [Completed(lease.held, None)]) == {lease.held}


async def test_heartbeat_keeps_a_lease_alive(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    job_id = await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    await let_lapse(owner)
    assert not (await queue.extend("a", [Beat(lease.held, 0.25)])).lost
    assert await queue.reclaim() == 0
    assert (await row(owner, job_id))["progress"] == 0.25


async def test_failed_job_waits_longer_each_time_and_dies_at_its_last_attempt(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    job_id = await enqueue_one(system_database, max_attempts=2)
    (first,) = await queue.lease("a", ["test"], 1)
    await queue.settle("a", [Failed(first.held, "no luck")])
    waiting = await row(owner, job_id)
    assert (waiting["state"], waiting["error"], waiting["is_delayed"]) == (
        "waiting",
        "no luck",
        True,
    )
    await come_due(queue, owner)
    (second,) = await queue.lease("a", ["test"], 1)
    await queue.settle("a", [Failed(second.held, "no luck again")])
    dead = await row(owner, job_id)
    assert (dead["state"], dead["attempt"], dead["error"]) == ("dead", 2, "no luck again")
    assert dead["finished_at"] is not None


async def test_outcomes_in_one_batch_each_get_their_own(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    async with system_database.transaction() as connection:
        job_ids = await enqueue_all(connection, [NewJob("test") for _ in range(20)])
    leases = {lease.held.job_id: lease.held for lease in await queue.lease("a", ["test"], 20)}
    standing = await queue.settle(
        "a",
        [
            Failed(leases[job_id], f"error {n}")
            if n % 2
            else Completed(leases[job_id], f'{{"n": {n}}}')
            for n, job_id in enumerate(job_ids)
        ],
    )
    assert standing == set(leases.values())
    for n, job_id in enumerate(job_ids):
        stored = await row(owner, job_id)
        expected = ("waiting", f"error {n}") if n % 2 else ("succeeded", "")
        assert (stored["state"], stored["error"]) == expected
        assert n % 2 or stored["result"] == f'{{"n": {n}}}'


async def test_job_that_kills_its_worker_is_dead_at_the_last_attempt(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    job_id = await enqueue_one(system_database, max_attempts=3)
    for attempt in (1, 2, 3):
        (lease,) = await queue.lease(f"victim {attempt}", ["test"], 1)
        assert lease.attempt == attempt
        await let_lapse(owner)
        await queue.reclaim()
        await come_due(queue, owner)
    assert await queue.lease("next", ["test"], 1) == []
    dead = await row(owner, job_id)
    assert (dead["state"], dead["error"]) == ("dead", "the worker stopped answering")


async def test_jobs_that_lost_two_workers_together_come_back_apart(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    async with system_database.transaction() as connection:
        await enqueue_all(connection, [NewJob("test")] * 20)
    for attempt in (1, 2):
        # One loss is no reason to wait: it is seldom the job's fault.
        leases = await queue.lease(f"victim {attempt}", ["test"], 20)
        assert [lease.attempt for lease in leases] == [attempt] * 20
        await let_lapse(owner)
        assert await queue.reclaim() == 20
    assert await queue.lease("next", ["test"], 20) == []
    pauses = await owner.fetch(
        "SELECT date_part('epoch', run_at - now()) AS seconds FROM jobs ORDER BY run_at"
    )
    assert pauses[-1]["seconds"] <= 2
    assert pauses[-1]["seconds"] - pauses[0]["seconds"] > 0.5
    await come_due(queue, owner)
    assert len(await queue.lease("next", ["test"], 20)) == 20


async def test_handed_back_job_loses_no_attempt(
    queue: Queue, system_database: SystemDatabase
) -> None:
    await enqueue_one(system_database, max_attempts=1)
    (first,) = await queue.lease("a", ["test"], 1)
    assert await queue.release("a", [first.held]) == {first.held}
    (second,) = await queue.lease("b", ["test"], 1)
    assert second.attempt == 1


async def test_unique_key_admits_one_unfinished_job(
    queue: Queue, system_database: SystemDatabase
) -> None:
    first = await enqueue_one(system_database, unique_key="k")
    assert await enqueue_one(system_database, unique_key="k") == first
    (lease,) = await queue.lease("a", ["test"], 10)
    assert await enqueue_one(system_database, unique_key="k") == first
    await queue.settle("a", [Completed(lease.held, None)])
    assert await enqueue_one(system_database, unique_key="k") != first


async def test_however_many_of_one_batch_have_a_unique_key_it_makes_one_job(
    system_database: SystemDatabase,
) -> None:
    jobs = [NewJob("test", unique_key="k")] * 10 + [NewJob("test", unique_key="other")] * 10
    async with system_database.transaction() as connection:
        job_ids = await enqueue_all(connection, jobs)
    assert (len(set(job_ids[:10])), len(set(job_ids[10:]))) == (1, 1)
    assert job_ids[0] != job_ids[10]


async def test_concurrent_enqueues_of_a_unique_key_make_one_job(
    system_database: SystemDatabase,
) -> None:
    start = asyncio.Barrier(8)

    async def attempt() -> UUID:
        await start.wait()
        return await enqueue_one(system_database, unique_key="k")

    assert len(set(await asyncio.gather(*(attempt() for _ in range(8))))) == 1


async def test_job_is_enqueued_with_the_change_or_not_at_all(
    queue: Queue, database: Database, caller: Caller
) -> None:
    async def change_that_fails() -> None:
        async with database.transaction(caller) as connection:
            await enqueue(connection, kind="test", payload={}, caller=caller)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await change_that_fails()
    assert await queue.lease("a", ["test"], 10) == []


async def test_user_cannot_enqueue_for_another(database: Database, caller: Caller) -> None:
    stranger = Caller(caller.tenant_id, UUID(int=1))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with database.transaction(caller) as connection:
            await enqueue(connection, kind="test", payload={}, caller=stranger)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with database.transaction(caller) as connection:
            await enqueue(connection, kind="test", payload={})


async def test_application_role_cannot_say_how_a_job_ended(
    database: Database, caller: Caller
) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with database.transaction(caller) as connection:
            await connection.execute("UPDATE jobs SET state = 'waiting'")


# --- turns, limits, ends ------------------------------------------------------------------------


async def enqueue_for(
    database: Database, caller: Caller, count: int = 1, kind: str = "test", **options: object
) -> list[UUID]:
    jobs = [NewJob(kind, **options)] * count  # type: ignore[arg-type]
    async with database.transaction(caller) as connection:
        return await enqueue_all(connection, jobs, caller=caller)


async def test_a_hundred_thousand_jobs_of_one_user_do_not_keep_another_waiting(
    queue: Queue, database: Database, caller: Caller
) -> None:
    for _ in range(10):
        await enqueue_for(database, caller, 10_000)
    others = [await new_caller(database) for _ in range(3)]
    theirs = {(await enqueue_for(database, other))[0] for other in others}
    for limit in (4, 2, 1):
        leased = [await queue.lease("a", ["test"], limit) for _ in range(4 // limit)]
        held = [lease.held for leases in leased for lease in leases]
        if limit == 4:
            assert theirs < {each.job_id for each in held}
        await queue.release("a", held)


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
async def test_users_take_turns_however_few_are_leased_at_a_time(
    limit: int, queue: Queue, database: Database, owner: asyncpg.Connection
) -> None:
    users = [await new_caller(database) for _ in range(5)]
    for user in users:
        await enqueue_for(database, user, 100)
    for _ in range(40 // limit):
        await queue.lease("a", ["test"], limit)
    shares = await owner.fetch(
        "SELECT count(*) AS jobs FROM jobs WHERE state = 'running' GROUP BY user_id"
    )
    assert len(shares) == 5
    assert max(row["jobs"] for row in shares) - min(row["jobs"] for row in shares) <= 2


async def test_kinds_take_turns_where_there_is_room_for_one(
    queue: Queue, system_database: SystemDatabase
) -> None:
    async with system_database.transaction() as connection:
        await enqueue_all(connection, [NewJob("test")] * 100)
        await enqueue_all(connection, [NewJob("other")] * 100)
    leases = [lease for _ in range(80) for lease in await queue.lease("a", ["test", "other"], 1)]
    # By chance: a half, give or take five standard deviations.
    assert 17 < sum(lease.kind == "other" for lease in leases) < 63


async def test_urgent_jobs_of_one_user_come_before_the_usual_ones_of_others(
    queue: Queue, database: Database, caller: Caller
) -> None:
    other = await new_caller(database)
    await enqueue_for(database, other, 5)
    urgent = await enqueue_for(database, caller, 3, priority=1)
    leases = [lease for _ in range(3) for lease in await queue.lease("a", ["test"], 1)]
    assert {lease.held.job_id for lease in leases} == set(urgent)


async def test_many_jobs_of_one_kind_do_not_keep_another_kind_waiting(
    queue: Queue, system_database: SystemDatabase
) -> None:
    async with system_database.transaction() as connection:
        await enqueue_all(connection, [NewJob("test")] * 1000)
        await enqueue_all(connection, [NewJob("other")] * 2)
    leases = await queue.lease("a", ["test", "other"], 4)
    assert sorted(lease.kind for lease in leases) == ["other", "other", "test", "test"]


async def test_no_more_jobs_of_a_kind_run_than_its_limit(
    system_database: SystemDatabase,
) -> None:
    queue = Queue(system_database, 30, {"test": 3})
    async with system_database.transaction() as connection:
        await enqueue_all(connection, [NewJob("test")] * 20 + [NewJob("other")] * 5)
    start = asyncio.Barrier(4)

    async def lease(worker: str) -> list[Lease]:
        await start.wait()
        return await queue.lease(worker, ["test", "other"], 10)

    shares = await asyncio.gather(*(lease(f"worker {n}") for n in range(4)))
    leases = [lease for share in shares for lease in share]
    assert sorted(lease.kind for lease in leases) == ["other"] * 5 + ["test"] * 3
    mine = [lease.held for lease in shares[0] if lease.kind == "test"]
    await queue.settle("worker 0", [Completed(held, None) for held in mine])
    assert len(await queue.lease("worker 0", ["test"], 10)) == len(mine)


async def test_without_turns_the_limit_is_exceeded(
    system_database: SystemDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_turns(*_: object) -> None:
        pass

    monkeypatch.setattr("server.jobs.queue._take_turns", no_turns)
    exceeded = 0
    for _ in range(20):
        async with system_database.transaction() as connection:
            await enqueue_all(connection, [NewJob("test")] * 20)
        queue, start = Queue(system_database, 30, {"test": 3}), asyncio.Barrier(4)

        async def lease(
            worker: str, queue: Queue = queue, start: asyncio.Barrier = start
        ) -> list[Lease]:
            await start.wait()
            return await queue.lease(worker, ["test"], 10)

        shares = await asyncio.gather(*(lease(f"worker {n}") for n in range(4)))
        exceeded += sum(map(len, shares)) > 3
        async with system_database.transaction() as connection:
            await connection.execute("DELETE FROM jobs")
    assert exceeded


async def test_job_is_leased_when_its_time_has_come(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    in_an_hour = await owner.fetchval("SELECT now() + interval '1 h'")
    later = await enqueue_one(system_database, run_at=in_an_hour)
    assert await queue.admit() == 0
    assert await queue.lease("a", ["test"], 1) == []
    await owner.execute("UPDATE jobs SET run_at = now()")
    assert await queue.admit() == 1
    (lease,) = await queue.lease("a", ["test"], 1)
    assert lease.held.job_id == later


async def cancel_running(owner: asyncpg.Connection) -> None:
    await owner.execute("UPDATE jobs SET cancelled_at = now() WHERE state = 'running'")


@pytest.mark.parametrize("how", [Completed, Failed])
async def test_no_outcome_of_a_cancelled_job_stands_but_that_it_was_stopped(
    how: type[Completed] | type[Failed],
    queue: Queue,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    job_id = await enqueue_one(system_database, unique_key="k")
    (lease,) = await queue.lease("a", ["test"], 1)
    await cancel_running(owner)
    assert (await queue.extend("a", [Beat(lease.held, 0.5)])).cancelled == {lease.held}
    # Until its worker has stopped, nobody may begin the same.
    assert await enqueue_one(system_database, unique_key="k") == job_id
    assert await queue.settle("a", [how(lease.held, "{}")]) == set()
    ended = await row(owner, job_id)
    assert (ended["state"], ended["result"]) == ("cancelled", None)
    assert await enqueue_one(system_database, unique_key="k") != job_id


async def test_cancelled_job_is_settled_as_stopped_by_its_worker_alone(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    job_id = await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    assert await queue.settle("a", [Stopped(lease.held)]) == set()
    await cancel_running(owner)
    assert await queue.settle("thief", [Stopped(lease.held)]) == set()
    assert (await row(owner, job_id))["state"] == "running"
    assert await queue.settle("a", [Stopped(lease.held)]) == {lease.held}
    assert (await row(owner, job_id))["state"] == "cancelled"
    assert await queue.settle("a", [Stopped(lease.held)]) == {lease.held}
    assert await queue.settle("a", [Failed(lease.held, "")]) == set()


@pytest.mark.parametrize("gone", ["lapsed", "released"])
async def test_cancelled_job_whose_worker_goes_is_not_done_again(
    gone: str, queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    job_id = await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    await cancel_running(owner)
    if gone == "lapsed":
        await let_lapse(owner)
        await queue.reclaim()
    else:
        await queue.release("a", [lease.held])
    assert (await row(owner, job_id))["state"] == "cancelled"


async def test_ended_jobs_are_forgotten_in_time_and_dead_ones_later(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    days = {"succeeded": 8, "cancelled": 8, "dead": 31}
    for state, age in days.items():
        for older in (0, -2):
            await owner.execute(
                """
                INSERT INTO jobs (id, kind, max_attempts, payload, state, finished_at)
                VALUES (uuidv7(make_interval(days => -$2::integer)), 'test', 1, '{}', $1,
                        now() - make_interval(days => $2::integer))
                """,
                state,
                age + older,
            )
    await owner.execute(
        """
        INSERT INTO jobs (id, kind, max_attempts, payload)
        VALUES (uuidv7(interval '-99 days'), 'test', 1, '{}')
        """
    )
    assert await queue.forget(timedelta(days=7), timedelta(days=30)) == 3
    assert await queue.forget(timedelta(days=7), timedelta(days=30)) == 0
    left = await owner.fetch("SELECT state, count(*) FROM jobs GROUP BY state ORDER BY state")
    states = ["cancelled", "dead", "succeeded", "waiting"]
    assert [tuple(each) for each in left] == [(state, 1) for state in states]


async def pages_read_to_lease(urls: Urls, limit: int) -> int:
    """Return how many pages the lease statement looks at, as the jobs service runs it."""
    async with (
        await open_pool(urls.system, size=1, name="test", settings=PLANS_OF_QUEUE) as pool,
        pool.acquire() as connection,
    ):
        await connection.execute(f"PREPARE lease AS {LEASE}")
        text = await connection.fetchval(
            f"""
            EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)
            EXECUTE lease ('worker', '{{test,other}}', '{{2147483647,5}}',
                           '{{{UUID(int=7)},{UUID(int=7)}}}', {limit}, 30)
            """
        )
    plan = json.loads(text)[0]["Plan"]
    assert plan["Actual Rows"] == limit
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.parametrize("users", [1, 20_000])
async def test_lease_statement_reads_only_what_it_leases(
    users: int, urls: Urls, owner: asyncpg.Connection
) -> None:
    fill = """
        INSERT INTO jobs (id, tenant_id, user_id, kind, max_attempts, payload, state, finished_at,
                          run_at, due)
        SELECT uuidv7(), user_id, user_id, 'test', 1, '{}', state,
               CASE state WHEN 'succeeded' THEN now() END,
               now() + make_interval(hours => hours), hours = 0
          FROM generate_series(1, $1::integer) AS number
         CROSS JOIN (VALUES ('succeeded', 0), ('waiting', 0), ('waiting', 1)) AS each (state, hours)
         CROSS JOIN LATERAL (
               SELECT lpad(to_hex(number % $2::integer), 32, '0')::uuid AS user_id) AS own
    """
    await owner.execute(fill, 500, min(users, 500))
    few = await pages_read_to_lease(urls, 100)
    await owner.execute(fill, 20_000, users)
    many = await pages_read_to_lease(urls, 100)
    # A tree that is deeper by a level or two; what waits is forty times as much.
    assert many < 2 * few


async def places_of_jobs(owner: asyncpg.Connection) -> dict[UUID, str]:
    """Return the page that each job lies on."""
    rows = await owner.fetch("SELECT id, split_part(ctid::text, ',', 1) AS page FROM jobs")
    return {row["id"]: row["page"] for row in rows}


async def pages_of_keys(owner: asyncpg.Connection) -> int:
    pages: int = await owner.fetchval("SELECT pg_relation_size('jobs_pkey') / 8192")
    return pages


async def test_a_leased_job_is_written_beside_what_it_was(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    """Elsewhere it is logged whole, and a leaf that its own rows fill is split."""
    # Free of what the tests before have left.
    await owner.execute("VACUUM FULL jobs")
    async with system_database.transaction() as connection:
        await enqueue_all(connection, [NewJob("test")] * 1000)
    before, keys = await places_of_jobs(owner), await pages_of_keys(owner)
    assert len(await queue.lease("w" * 32, ["test"], 1000)) == 1000
    after = await places_of_jobs(owner)
    assert sum(after[job_id] == page for job_id, page in before.items()) > 500
    assert await pages_of_keys(owner) < 1.5 * keys


AT_A_TIME = 10_000


async def indexes_of_jobs(owner: asyncpg.Connection) -> dict[str, tuple[int, int]]:
    """Return the entries of each index, as VACUUM counted them, and its pages."""
    rows = await owner.fetch(
        """
        SELECT relname, reltuples::bigint, relpages
          FROM pg_class
          JOIN pg_index ON indexrelid = oid
         WHERE indrelid = 'jobs'::regclass
        """
    )
    return {name: (entries, pages) for name, entries, pages in rows}


async def test_indexes_of_what_waits_and_runs_stay_small_however_many_jobs_have_ended(
    urls: Urls, owner: asyncpg.Connection
) -> None:
    """VACUUM comes as autovacuum does: far more often than a hundred thousand jobs."""
    async with await open_pool(urls.system, size=1, name="test", settings=PLANS_OF_QUEUE) as pool:
        database = SystemDatabase(pool)
        queue = Queue(database, 30)
        await owner.execute("CREATE INDEX whole ON jobs (kind, urgency, lane, run_at, id)")
        # As large as the tests before have left them, otherwise.
        await owner.execute("REINDEX TABLE jobs")
        for turn in range(1, 11):
            async with database.transaction() as connection:
                await enqueue_all(connection, [NewJob("test")] * AT_A_TIME)
            while leases := await queue.lease("a", ["test"], 1000):
                await queue.settle("a", [Completed(lease.held, None) for lease in leases])
            await owner.execute("VACUUM jobs")
            if turn == 3:
                early = await indexes_of_jobs(owner)
    late = await indexes_of_jobs(owner)
    await owner.execute("DROP INDEX whole")
    for name in ("jobs_due", "jobs_delayed", "jobs_running", "jobs_unique"):
        assert late[name][0] == 0, late
        # Pages that were in use are used again; a turn's own fill ten of the smallest, and more or
        # fewer of these wait for VACUUM to come once more.
        assert late[name][1] <= 1.2 * early[name][1] + 10, (early, late)
    # An index that holds all jobs grows with them.
    assert late["whole"][0] == 10 * AT_A_TIME
    assert late["whole"][1] > 2.5 * early["whole"][1], (early, late)
