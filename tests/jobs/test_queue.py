"""The queue itself: leases, fencing, attempts, unique keys."""

from __future__ import annotations

import asyncio
from uuid import UUID

import asyncpg
import pytest

from server.caller import Caller
from server.database import Database, SystemDatabase
from server.enqueue import NewJob, enqueue, enqueue_all
from server.jobs.model import Beat, Completed, Failed, Held
from server.jobs.queue import Queue


async def enqueue_one(database: SystemDatabase, **arguments: object) -> UUID:
    async with database.transaction() as connection:
        return await enqueue(connection, **{"kind": "test", "payload": {}, **arguments})  # type: ignore[arg-type]


async def let_lapse(owner: asyncpg.Connection) -> None:
    await owner.execute(
        "UPDATE jobs SET lease_expires_at = now() - interval '1 s' WHERE state = 'running'"
    )


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
    assert await queue.extend("a", [Beat(zombie.held, 0.5)]) == {zombie.held}
    assert await queue.release("a", [zombie.held]) == set()
    assert (await row(owner, job_id))["state"] == "running"
    assert await queue.settle("a", [Completed(lease.held, '{"by": "b"}')]) == {lease.held}
    assert (await row(owner, job_id))["result"] == '{"by": "b"}'


async def test_outcome_counts_once(queue: Queue, system_database: SystemDatabase) -> None:
    await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    outcome = Completed(lease.held, None)
    assert await queue.settle("a", [outcome]) == {lease.held}
    assert await queue.settle("a", [outcome]) == set()


async def test_lease_of_another_worker_is_out_of_reach(
    queue: Queue, system_database: SystemDatabase
) -> None:
    await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    assert await queue.settle("thief", [Completed(lease.held, None)]) == set()
    assert await queue.settle("thief", [Failed(lease.held, "")]) == set()
    assert await queue.extend("thief", [Beat(lease.held, 0)]) == {lease.held}
    assert await queue.release("thief", [lease.held]) == set()
    assert await queue.settle("a", [Completed(lease.held, None)]) == {lease.held}


async def test_heartbeat_keeps_a_lease_alive(
    queue: Queue, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    job_id = await enqueue_one(system_database)
    (lease,) = await queue.lease("a", ["test"], 1)
    await let_lapse(owner)
    assert await queue.extend("a", [Beat(lease.held, 0.25)]) == set()
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
    await owner.execute("UPDATE jobs SET run_at = now()")
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
    assert await queue.lease("next", ["test"], 1) == []
    dead = await row(owner, job_id)
    assert (dead["state"], dead["error"]) == ("dead", "the worker stopped answering")


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


async def test_lease_statement_reads_only_what_it_leases(
    system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await owner.execute(
        """
        INSERT INTO jobs (id, kind, max_attempts, payload, state, finished_at)
        SELECT gen_random_uuid(), 'test', 1, '{}', 'succeeded', now()
          FROM generate_series(1, 5000);
        INSERT INTO jobs (id, kind, max_attempts, payload)
        SELECT gen_random_uuid(), 'test', 1, '{}' FROM generate_series(1, 20000);
        ANALYZE jobs;
        """
    )
    plan = await owner.fetch(
        """
        EXPLAIN SELECT id FROM jobs
         WHERE state = 'waiting' AND kind = 'test' AND run_at <= now()
         ORDER BY priority DESC, run_at, id LIMIT 10 FOR UPDATE SKIP LOCKED
        """
    )
    text = "\n".join(line[0] for line in plan)
    assert "jobs_waiting" in text
    assert "Sort" not in text
