"""The stream on which workers take jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc
from prometheus_client import REGISTRY

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase, open_pool
from server.enqueue import NewJob, enqueue, enqueue_all
from server.jobs.doorbell import Doorbell
from server.jobs.queue import Queue
from server.jobs.worker_service import WorkerService
from tests.conftest import Serve, Urls, as_worker, bearer
from tests.jobs.conftest import LEASE_SECONDS, Stream, completed, failed, working
from tests.refusals import refusal_of


async def enqueue_some(database: SystemDatabase, count: int = 1) -> list[str]:
    async with database.transaction() as connection:
        job_ids = await enqueue_all(connection, [NewJob("test") for _ in range(count)])
    return [ids.show(ids.JOB, job_id) for job_id in job_ids]


async def state(owner: asyncpg.Connection, job_id: str) -> str:
    found: str = await owner.fetchval(
        "SELECT state FROM jobs WHERE id = $1", ids.parse(ids.JOB, job_id, "id")
    )
    return found


async def pass_on(owner: asyncpg.Connection, queue: Queue) -> None:
    """Let all leases lapse and another worker take the jobs."""
    await owner.execute("UPDATE jobs SET lease_expires_at = now() WHERE state = 'running'")
    await queue.reclaim()
    assert await queue.lease("another worker", ["test"], 100)


async def refusal_of_stream(stream: Stream) -> tuple[grpc.StatusCode, str, tuple[str, ...]]:
    async def hear_all() -> None:
        while isinstance(await stream.call.read(), pb.WorkResponse):
            pass

    refusal = await refusal_of(hear_all())
    return refusal.code, refusal.reason, refusal.fields


async def test_job_is_leased_done_and_settled(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    (job_id,) = await enqueue_some(system_database)
    async with working(workers) as stream:
        lease = await stream.lease()
        assert (lease.job_id, lease.kind, lease.attempt) == (job_id, "test", 1)
        await stream.settle(completed(lease, '{"n": 1}'))
        assert (await stream.hear("settled")).job_ids == [job_id]
    assert await state(owner, job_id) == "succeeded"


async def test_welcome_asks_for_three_heartbeats_a_lease(
    workers: rpc.WorkerServiceAsyncStub,
) -> None:
    call = workers.Work(metadata=as_worker())  # type: ignore[call-arg]
    stream = Stream(call)
    await stream.say(hello=pb.Hello(worker_id="w" * 32, kinds=["test"]))
    welcome = await stream.hear("welcome")
    assert welcome.lease_duration.ToSeconds() == 30
    assert welcome.heartbeat_interval.ToSeconds() == 10
    call.cancel()


async def test_idle_worker_is_called_when_a_job_is_enqueued(
    workers: rpc.WorkerServiceAsyncStub,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    async with working(workers) as stream:
        await stream.say(credit=pb.Credit(jobs=1))
        async with database.transaction(caller) as connection:
            await enqueue(connection, kind="test", payload={}, caller=caller)
        # The fixture's doorbell polls once an hour: only the notification can have rung it.
        assert len((await stream.hear("leased")).leases) == 1


async def test_lost_notification_is_made_up_for_by_polling(
    serve: Serve, queue: Queue, urls: Urls, system_database: SystemDatabase
) -> None:
    deaf = Doorbell("postgresql://nobody@127.0.0.1:1/nothing", poll_seconds=0.01)
    service = WorkerService(queue, deaf, lease_seconds=30, session_seconds=60)
    running = asyncio.create_task(service.run())
    channel = await serve(lambda server: rpc.add_WorkerServiceServicer_to_server(service, server))
    async with working(rpc.WorkerServiceStub(channel)) as stream:
        await stream.say(credit=pb.Credit(jobs=1))
        await enqueue_some(system_database)
        assert len((await stream.hear("leased")).leases) == 1
    running.cancel()
    await asyncio.wait([running])


async def test_doorbell_is_heard_again_after_its_connection_was_cut(
    urls: Urls, owner: asyncpg.Connection
) -> None:
    doorbell = Doorbell(urls.system, poll_seconds=3600)
    rung = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(doorbell.run())
        with doorbell.heard_by(rung.set):
            for _ in range(2):
                # It rings when it has connected: something may have come before.
                await asyncio.wait_for(rung.wait(), 30)
                rung.clear()
                await owner.execute("SELECT pg_notify('jobs', '')")
                await asyncio.wait_for(rung.wait(), 30)
                rung.clear()
                await owner.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'kimberly-doorbell' AND datname = current_database()"
                )
        running.cancel()


async def test_worker_that_vanishes_hands_nothing_back(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    """What it died of would otherwise never come to its last attempt."""
    for _ in range(20):
        await enqueue_some(system_database)
        async with working(workers) as stream:
            await stream.lease()
    # A stream that hands back is not over before it has.
    async with asyncio.timeout(30):
        while REGISTRY.get_sample_value("workers_connected"):  # noqa: ASYNC110 - it is no event
            await asyncio.sleep(0.01)
    rows = await owner.fetch("SELECT state, attempt FROM jobs")
    assert [tuple(row) for row in rows] == [("running", 1)] * 20


async def test_no_more_jobs_come_than_there_is_credit(
    workers: rpc.WorkerServiceAsyncStub, system_database: SystemDatabase
) -> None:
    await enqueue_some(system_database, 5)
    async with working(workers) as stream:
        await stream.say(credit=pb.Credit(jobs=2))
        first = (await stream.hear("leased")).leases
        await stream.settle(completed(first[0]))
        await stream.hear("settled")
        await stream.say(credit=pb.Credit(jobs=1))
        second = (await stream.hear("leased")).leases
    assert (len(first), len(second)) == (2, 1)


async def test_zombie_hears_that_its_lease_is_lost(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    queue: Queue,
    owner: asyncpg.Connection,
) -> None:
    (job_id,) = await enqueue_some(system_database)
    async with working(workers) as stream:
        lease = await stream.lease()
        await pass_on(owner, queue)
        beat = pb.LeaseProgress(job_id=lease.job_id, lease_token=lease.lease_token)
        await stream.say(heartbeat=pb.Heartbeat(leases=[beat]))
        assert (await stream.hear("lease_lost")).job_ids == [job_id]
        await stream.settle(completed(lease))
        assert (await stream.hear("lease_lost")).job_ids == [job_id]
    assert await state(owner, job_id) == "running"


async def test_worker_that_takes_columns_gets_and_settles_many_jobs_in_them(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    job_ids = await enqueue_some(system_database, 5)
    async with working(workers, in_columns=True) as stream:
        await stream.say(credit=pb.Credit(jobs=5))
        leased = await stream.hear("leased")
        assert not leased.leases
        columns = leased.columns
        shown = [ids.show(ids.JOB, each) for each in ids.unpacked(columns.leases.job_ids)]
        assert shown == job_ids
        assert [*columns.kinds] == ["test"] * 5
        assert [*columns.payloads_json] == ["{}"] * 5
        assert [*columns.attempts] == [1] * 5
        assert not columns.traceparents
        await stream.say(settle=pb.Settle(done=columns.leases))
        settled = await stream.hear("settled")
        assert not settled.job_ids
        assert set(ids.unpacked(settled.job_id_column)) == {*ids.unpacked(columns.leases.job_ids)}
    ended = await owner.fetch("SELECT state, result, lease_token FROM jobs ORDER BY id")
    assert [tuple(row) for row in ended] == [
        ("succeeded", None, token) for token in columns.leases.lease_tokens
    ]


async def test_leases_that_overlap_are_of_different_jobs_and_within_the_credit(
    workers: rpc.WorkerServiceAsyncStub, system_database: SystemDatabase
) -> None:
    await enqueue_some(system_database, 4000)
    room, leased, settled = 1000, set[tuple[UUID, int]](), 0
    async with working(workers, in_columns=True) as stream:
        await stream.say(credit=pb.Credit(jobs=room))
        while settled < 4000:
            response = await stream.call.read()
            assert isinstance(response, pb.WorkResponse)
            if response.HasField("leased"):
                columns = response.leased.columns.leases
                new = set(zip(ids.unpacked(columns.job_ids), columns.lease_tokens, strict=True))
                assert not new & leased
                leased |= new
                room -= len(new)
                assert room >= 0
                await stream.say(settle=pb.Settle(done=columns))
            else:
                done = len(ids.unpacked(response.settled.job_id_column))
                await stream.say(credit=pb.Credit(jobs=done))
                room += done
                settled += done
    assert len({job_id for job_id, _ in leased}) == 4000


async def test_leases_in_columns_say_whose_trace_they_continue(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    _, second = await enqueue_some(system_database, 2)
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    await owner.execute(
        "UPDATE jobs SET trace = $1 WHERE id = $2", trace, ids.parse(ids.JOB, second, "id")
    )
    async with working(workers, in_columns=True) as stream:
        await stream.say(credit=pb.Credit(jobs=2))
        assert (await stream.hear("leased")).columns.traceparents == ["", trace]


async def test_zombie_that_settles_in_columns_hears_that_its_lease_is_lost(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    queue: Queue,
    owner: asyncpg.Connection,
) -> None:
    (job_id,) = await enqueue_some(system_database)
    async with working(workers, in_columns=True) as stream:
        await stream.say(credit=pb.Credit(jobs=1))
        leases = (await stream.hear("leased")).columns.leases
        await pass_on(owner, queue)
        await stream.say(settle=pb.Settle(done=leases))
        assert (await stream.hear("lease_lost")).job_ids == [job_id]
    assert await state(owner, job_id) == "running"


async def test_worker_that_closes_its_stream_hands_back_what_it_holds(
    workers: rpc.WorkerServiceAsyncStub, system_database: SystemDatabase
) -> None:
    (job_id,) = await enqueue_some(system_database)
    async with working(workers) as leaving:
        await leaving.lease()
        await leaving.close()
    async with working(workers, worker_id="x" * 32) as stream:
        lease = await stream.lease()
    assert (lease.job_id, lease.attempt) == (job_id, 1)


async def test_worker_that_vanishes_keeps_its_leases_until_they_lapse(
    workers: rpc.WorkerServiceAsyncStub,
    worker_service: WorkerService,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    (job_id,) = await enqueue_some(system_database)
    async with working(workers) as vanishing:
        await vanishing.lease()
    # A stream that was opened later and is served: the one that broke is long dealt with.
    async with working(workers, worker_id="x" * 32) as stream:
        await stream.close()
    assert await state(owner, job_id) == "running"


async def test_worker_takes_its_leases_along_to_the_next_stream(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    (job_id,) = await enqueue_some(system_database)
    async with working(workers) as breaking:
        lease = await breaking.lease()
    async with working(workers) as stream:
        beat = pb.LeaseProgress(job_id=lease.job_id, lease_token=lease.lease_token, progress=0.5)
        await stream.say(heartbeat=pb.Heartbeat(leases=[beat]))
        await stream.settle(completed(lease))
        assert (await stream.hear("settled")).job_ids == [job_id]


async def test_failed_attempt_is_settled_and_tried_again_later(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    (job_id,) = await enqueue_some(system_database)
    async with working(workers) as stream:
        lease = await stream.lease()
        await stream.settle(failed(lease, "no\0 luck"))
        assert (await stream.hear("settled")).job_ids == [job_id]
        await owner.execute("UPDATE jobs SET run_at = now()")
        # Let in by the service, of its own accord.
        again = await stream.lease()
    assert again.attempt == 2
    assert again.lease_token > lease.lease_token
    error = await owner.fetchval("SELECT error FROM jobs")
    assert error == "no luck"


async def test_drain_asks_workers_to_finish_and_leases_no_more(
    workers: rpc.WorkerServiceAsyncStub,
    worker_service: WorkerService,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    held, waiting = await enqueue_some(system_database, 2)
    async with working(workers) as stream:
        lease = await stream.lease()
        await stream.say(credit=pb.Credit(jobs=1000))
        leased = await stream.hear("leased")
        worker_service.drain()
        await stream.hear("drain")
        more = await enqueue_some(system_database)
        await stream.settle(completed(lease), completed(leased.leases[0]))
        assert set((await stream.hear("settled")).job_ids) == {held, waiting}
        await stream.close()
    assert await state(owner, more[0]) == "waiting"
    async with working(workers) as late:
        await late.hear("drain")


async def test_old_stream_is_asked_to_connect_again(serve: Serve, queue: Queue, urls: Urls) -> None:
    service = WorkerService(queue, Doorbell(urls.system), lease_seconds=30, session_seconds=0.01)
    running = asyncio.create_task(service.run())
    channel = await serve(lambda server: rpc.add_WorkerServiceServicer_to_server(service, server))
    async with working(rpc.WorkerServiceStub(channel)) as stream:
        await stream.hear("drain")
        await stream.close()
    running.cancel()
    await asyncio.wait([running])


async def test_stream_of_a_silent_worker_ends(serve: Serve, queue: Queue, urls: Urls) -> None:
    service = WorkerService(queue, Doorbell(urls.system), lease_seconds=0.05, session_seconds=60)
    running = asyncio.create_task(service.run())
    channel = await serve(lambda server: rpc.add_WorkerServiceServicer_to_server(service, server))
    async with working(rpc.WorkerServiceStub(channel)) as stream:
        code, reason, _ = await refusal_of_stream(stream)
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LEASE_LOST")
    running.cancel()
    await asyncio.wait([running])


async def test_lapsed_leases_are_swept_up_by_the_service(
    workers: rpc.WorkerServiceAsyncStub,
    serve: Serve,
    urls: Urls,
    queue: Queue,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    (job_id,) = await enqueue_some(system_database)
    assert await Queue(system_database, 0.01).lease("dead worker", ["test"], 1)
    sweeper = WorkerService(queue, Doorbell(urls.system), lease_seconds=0.1, session_seconds=60)
    running = asyncio.create_task(sweeper.run())
    async with working(workers) as stream:
        assert (await stream.lease()).job_id == job_id
    running.cancel()
    await asyncio.wait([running])


async def test_two_replicas_share_the_jobs_of_two_workers(
    workers: rpc.WorkerServiceAsyncStub,
    serve: Serve,
    urls: Urls,
    queue: Queue,
    system_database: SystemDatabase,
) -> None:
    replica = WorkerService(queue, Doorbell(urls.system), lease_seconds=30, session_seconds=60)
    running = asyncio.create_task(replica.run())
    channel = await serve(lambda server: rpc.add_WorkerServiceServicer_to_server(replica, server))
    job_ids = await enqueue_some(system_database, 40)

    async def do_all(stub: rpc.WorkerServiceAsyncStub, worker_id: str) -> list[str]:
        done: list[str] = []
        async with working(stub, worker_id=worker_id) as stream:
            for _ in range(20):
                lease = await stream.lease()
                await stream.settle(completed(lease))
                done += (await stream.hear("settled")).job_ids
        return done

    shares = await asyncio.gather(
        do_all(workers, "a" * 32), do_all(rpc.WorkerServiceStub(channel), "b" * 32)
    )
    assert sorted([*shares[0], *shares[1]]) == sorted(job_ids)
    running.cancel()
    await asyncio.wait([running])


# --- what is slow


POOL = 4


@pytest_asyncio.fixture
async def small(
    serve: Serve, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[rpc.WorkerServiceAsyncStub]:
    """A service as it is deployed, with few connections, and whose queue loses no patience.

    It does one job of the kind "slow" at a time.
    """
    monkeypatch.setattr("server.jobs.queue.ACQUIRE_SECONDS", 60)
    patient = {"lock_timeout": "0", "statement_timeout": "0"}
    async with await open_pool(urls.system, size=POOL, name="small", settings=patient) as pool:
        queue = Queue(SystemDatabase(pool), LEASE_SECONDS, {"slow": 1})
        service = WorkerService(
            queue, Doorbell(urls.system), lease_seconds=LEASE_SECONDS, session_seconds=600
        )
        running = asyncio.create_task(service.run())
        channel = await serve(
            lambda server: rpc.add_WorkerServiceServicer_to_server(service, server)
        )
        yield rpc.WorkerServiceStub(channel)
        running.cancel()
        await asyncio.wait([running])


@asynccontextmanager
async def holding(urls: Urls, *statements: tuple[str, object]) -> AsyncIterator[None]:
    """Hold what these statements lock."""
    connection = await asyncpg.connect(urls.superuser)
    try:
        async with connection.transaction():
            for statement, argument in statements:
                await connection.execute(statement, argument)
            yield
    finally:
        await connection.close()


TURNS = ("SELECT pg_advisory_xact_lock(hashtextextended('jobs/' || $1, 0))", "slow")
"""Whoever leases jobs of the kind waits."""


async def stuck(owner: asyncpg.Connection, statements: int) -> None:
    """Return when so many statements of the small service wait for somebody else's lock."""
    async with asyncio.timeout(60):
        while statements > await owner.fetchval(
            """
            SELECT count(*)
              FROM pg_stat_activity
             WHERE application_name = 'small' AND wait_event_type = 'Lock'
            """
        ):
            pass


@asynccontextmanager
async def busy(
    stub: rpc.WorkerServiceAsyncStub, streams: int, *kinds: str
) -> AsyncIterator[list[Stream]]:
    """Open streams of workers that each have room for a job."""
    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(working(stub, *kinds, worker_id=f"busy worker {n:020}"))
            for n in range(streams)
        ]
        for stream in opened:
            await stream.say(credit=pb.Credit(jobs=1))
        yield opened


async def beat(stream: Stream, owner: asyncpg.Connection, lease: pb.Lease) -> None:
    """Send heartbeats, one after the other, each when the one before was written."""
    for number in range(1, 11):
        progress = pb.LeaseProgress(
            job_id=lease.job_id, lease_token=lease.lease_token, progress=number / 10
        )
        await stream.say(heartbeat=pb.Heartbeat(leases=[progress]))
        job_id = ids.parse(ids.JOB, lease.job_id, "id")
        async with asyncio.timeout(60):
            while number != await owner.fetchval(
                "SELECT round(progress * 10) FROM jobs WHERE id = $1", job_id
            ):
                pass


async def test_however_many_wait_for_a_lease_outcomes_and_heartbeats_get_through(
    small: rpc.WorkerServiceAsyncStub,
    urls: Urls,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    await enqueue_some(system_database, 5)
    async with working(small) as stream, holding(urls, TURNS):
        leases = [await stream.lease() for _ in range(5)]
        async with busy(small, 2 * POOL, "slow"):
            await stuck(owner, POOL - 2)
            for lease in leases[1:]:
                await beat(stream, owner, lease)
                await stream.settle(completed(lease))
                assert (await stream.hear("settled")).job_ids == [lease.job_id]


async def test_however_many_wait_to_settle_heartbeats_get_through(
    small: rpc.WorkerServiceAsyncStub,
    urls: Urls,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    await enqueue_some(system_database)
    locked = "SELECT FROM jobs WHERE worker_id LIKE $1 FOR UPDATE"
    async with working(small) as stream:
        lease = await stream.lease()
        await enqueue_some(system_database, 2 * POOL)
        async with busy(small, 2 * POOL) as others:
            theirs = [(await other.hear("leased")).leases[0] for other in others]
            async with holding(urls, (locked, "busy%")):
                for other, held in zip(others, theirs, strict=True):
                    await other.settle(completed(held))
                await stuck(owner, POOL - 1)
                await beat(stream, owner, lease)
            for other, held in zip(others, theirs, strict=True):
                assert (await other.hear("settled")).job_ids == [held.job_id]


async def test_heartbeats_of_a_worker_do_not_wait_for_what_it_settles(
    small: rpc.WorkerServiceAsyncStub,
    urls: Urls,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    await enqueue_some(system_database, 2)
    async with working(small) as stream:
        done, goes_on = [await stream.lease() for _ in range(2)]
        locked = "SELECT FROM jobs WHERE lease_token = $1 FOR UPDATE"
        async with holding(urls, (locked, done.lease_token)):
            await stream.settle(completed(done))
            await stuck(owner, 1)
            await beat(stream, owner, goes_on)
        assert (await stream.hear("settled")).job_ids == [done.job_id]


async def test_outcome_told_again_says_nothing_about_the_lease_that_followed(
    workers: rpc.WorkerServiceAsyncStub,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    """The worker is told of jobs, not of leases: it would drop the one that it works on."""
    (job_id,) = await enqueue_some(system_database)
    async with working(workers) as stream:
        first = await stream.lease()
        await stream.settle(failed(first))
        await stream.hear("settled")
        await owner.execute("UPDATE jobs SET run_at = now()")
        second = await stream.lease()
        await stream.settle(failed(first), completed(first))
        old = pb.LeaseProgress(job_id=job_id, lease_token=first.lease_token)
        await stream.say(heartbeat=pb.Heartbeat(leases=[old]))
        await stream.settle(completed(second))
        assert (await stream.hear("settled")).job_ids == [job_id]
        await stream.settle(failed(first))
        assert (await stream.hear("settled")).job_ids == [job_id]
    assert await state(owner, job_id) == "succeeded"


JOB = ids.show(ids.JOB, UUID(int=1))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"hello": pb.Hello(worker_id="w" * 32, kinds=["test"])}, "message"),
        ({}, "message"),
        ({"credit": pb.Credit(jobs=0)}, "credit.jobs"),
        ({"credit": pb.Credit(jobs=1001)}, "credit.jobs"),
        (
            {"heartbeat": pb.Heartbeat(leases=[pb.LeaseProgress(job_id="x")])},
            "heartbeat.leases[0].job_id",
        ),
        (
            {"heartbeat": pb.Heartbeat(leases=[pb.LeaseProgress(job_id=JOB, progress=2)])},
            "heartbeat.leases[0].progress",
        ),
        (
            {"settle": pb.Settle(outcomes=[pb.Outcome(job_id=JOB)])},
            "settle.outcomes[0].result",
        ),
        *(
            (
                {"settle": pb.Settle(done=pb.LeaseColumns(job_ids=column, lease_tokens=[1, 2]))},
                "settle.done.job_ids",
            )
            for column in (b"", b"x" * 16, b"x" * 31, b"x" * 48)
        ),
        (
            {
                "settle": pb.Settle(
                    outcomes=[pb.Outcome(job_id=JOB, completed=pb.Completed())],
                    done=pb.LeaseColumns(job_ids=b"x" * 16_000, lease_tokens=range(1000)),
                )
            },
            "settle.outcomes",
        ),
        *(
            (
                {
                    "settle": pb.Settle(
                        outcomes=[pb.Outcome(job_id=JOB, completed=pb.Completed(result_json=text))]
                    )
                },
                "settle.outcomes[0].completed.result_json",
            )
            for text in (
                "[1]",
                "{",
                '{"a": "\\u0000"}',
                '{"a": "\\ud800"}',
                '{"a": NaN}',
                '{"a": 1e999}',
            )
        ),
    ],
)
async def test_message_that_makes_no_sense_ends_the_stream(
    workers: rpc.WorkerServiceAsyncStub, message: dict[str, object], field: str
) -> None:
    async with working(workers) as stream:
        await stream.say(**message)
        assert await refusal_of_stream(stream) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "FIELD_INVALID",
            (field,),
        )


async def test_result_with_any_other_character_is_taken(
    workers: rpc.WorkerServiceAsyncStub, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await enqueue_some(system_database)
    async with working(workers) as stream:
        lease = await stream.lease()
        await stream.settle(completed(lease, '{"a": "\\ud83d\\ude00 \\\\u0000 ü"}'))
        await stream.hear("settled")
    assert await owner.fetchval("SELECT result ->> 'a' FROM jobs") == "\U0001f600 \\u0000 ü"


async def test_stream_must_open_with_hello(workers: rpc.WorkerServiceAsyncStub) -> None:
    call = workers.Work(metadata=as_worker())  # type: ignore[call-arg]
    stream = Stream(call)
    await stream.say(credit=pb.Credit(jobs=1))
    code, _, fields = await refusal_of_stream(stream)
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("message",))


@pytest.mark.parametrize("identity", ["user", "auth", "nobody"])
async def test_only_workers_may_work(
    workers: rpc.WorkerServiceAsyncStub, caller: Caller, identity: str
) -> None:
    metadata = {
        "user": bearer(caller),
        "auth": as_worker("spiffe://kimberly.local/ns/test/sa/auth"),
        "nobody": (),
    }[identity]
    call = workers.Work(metadata=metadata)  # type: ignore[call-arg]
    code, reason, _ = await refusal_of_stream(Stream(call))
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED")
