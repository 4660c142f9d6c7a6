"""What users see of their jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.enqueue import enqueue
from server.jobs.model import Beat, Completed, Failed
from server.jobs.queue import Queue
from server.jobs.schedule_store import MOST, ScheduleStore
from server.jobs.service import JobService
from server.jobs.store import JobStore
from server.jobs.watching import STREAMS, JobFeed
from server.processes.kinds import KINDS
from tests.conftest import Serve, bearer, new_caller
from tests.jobs.conftest import want_vectors
from tests.refusals import refusal_of


@pytest_asyncio.fixture
async def feed(database: Database, system_database: SystemDatabase) -> AsyncIterator[JobFeed]:
    feed = JobFeed(
        JobStore(database, system_database, KINDS), session_seconds=60, poll_seconds=0.01
    )
    running = asyncio.create_task(feed.run())
    yield feed
    running.cancel()
    await asyncio.wait([running])


@pytest_asyncio.fixture
async def jobs(
    serve: Serve, database: Database, system_database: SystemDatabase, feed: JobFeed
) -> rpc.JobServiceAsyncStub:
    store = JobStore(database, system_database, KINDS)
    service = JobService(store, feed, ScheduleStore(database, system_database, KINDS), KINDS)
    channel = await serve(lambda server: rpc.add_JobServiceServicer_to_server(service, server))
    return rpc.JobServiceStub(channel)


async def enqueue_for(database: Database, caller: Caller) -> str:
    async with database.transaction(caller) as connection:
        job_id = await enqueue(connection, kind="test", payload={}, caller=caller, max_attempts=1)
    return ids.show(ids.JOB, job_id)


async def test_user_sees_how_a_job_goes_on(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, queue: Queue
) -> None:
    request = pb.GetJobRequest(id=await enqueue_for(database, caller))
    waiting = (await jobs.GetJob(request, metadata=bearer(caller))).job
    assert (waiting.kind, waiting.state) == ("test", pb.JOB_STATE_WAITING)
    assert not waiting.HasField("finish_time")
    (lease,) = await queue.lease("w", ["test"], 1)
    running = (await jobs.GetJob(request, metadata=bearer(caller))).job
    assert (running.state, running.attempts) == (pb.JOB_STATE_RUNNING, 1)
    await queue.settle("w", [Completed(lease.held, '{"n": 1}')])
    done = (await jobs.GetJob(request, metadata=bearer(caller))).job
    assert (done.state, done.progress) == (pb.JOB_STATE_SUCCEEDED, 1)
    assert done.result_json == '{"n": 1}'
    assert done.finish_time.ToDatetime() >= done.create_time.ToDatetime()


async def test_user_sees_why_a_job_was_given_up(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, queue: Queue
) -> None:
    job_id = await enqueue_for(database, caller)
    (lease,) = await queue.lease("w", ["test"], 1)
    await queue.settle("w", [Failed(lease.held, "no luck")])
    job = (await jobs.GetJob(pb.GetJobRequest(id=job_id), metadata=bearer(caller))).job
    assert (job.state, job.error) == (pb.JOB_STATE_DEAD, "no luck")


async def test_jobs_are_listed_newest_first_page_by_page(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller
) -> None:
    job_ids = [await enqueue_for(database, caller) for _ in range(5)]
    listed: list[str] = []
    token = ""
    while True:
        page = await jobs.ListJobs(
            pb.ListJobsRequest(page_size=2, page_token=token), metadata=bearer(caller)
        )
        listed += [job.id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert listed == job_ids[::-1]


async def test_page_token_of_another_user_is_refused(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller
) -> None:
    for _ in range(2):
        await enqueue_for(database, caller)
    page = await jobs.ListJobs(pb.ListJobsRequest(page_size=1), metadata=bearer(caller))
    refusal = await refusal_of(
        jobs.ListJobs(
            pb.ListJobsRequest(page_token=page.next_page_token),
            metadata=bearer(await new_caller(database)),
        )
    )
    assert refusal.reason == "PAGE_TOKEN_INVALID"


async def test_job_of_another_looks_like_none(
    jobs: rpc.JobServiceAsyncStub,
    database: Database,
    system_database: SystemDatabase,
    caller: Caller,
) -> None:
    async with system_database.transaction() as connection:
        of_system = await enqueue(connection, kind="test", payload={})
    theirs = await enqueue_for(database, await new_caller(database))
    missing = ids.show(ids.JOB, ids.new_id())
    refusals = [
        await refusal_of(jobs.GetJob(pb.GetJobRequest(id=job_id), metadata=bearer(caller)))
        for job_id in (theirs, missing, ids.show(ids.JOB, of_system))
    ]
    assert len(set(refusals)) == 1
    assert refusals[0].code == grpc.StatusCode.NOT_FOUND
    page = await jobs.ListJobs(pb.ListJobsRequest(), metadata=bearer(caller))
    assert list(page.jobs) == []


async def test_id_that_is_none_is_refused_by_its_field(
    jobs: rpc.JobServiceAsyncStub, caller: Caller
) -> None:
    refusal = await refusal_of(jobs.GetJob(pb.GetJobRequest(id="mem_0"), metadata=bearer(caller)))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("id",))


async def test_jobs_of_one_state_are_listed_alone(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, queue: Queue
) -> None:
    job_ids = [await enqueue_for(database, caller) for _ in range(4)]
    leases = await queue.lease("w", ["test"], 2)
    await queue.settle("w", [Failed(lease.held, "no luck") for lease in leases])
    dead = {ids.show(ids.JOB, lease.held.job_id) for lease in leases}
    for state, expected in (
        (pb.JOB_STATE_DEAD, dead),
        (pb.JOB_STATE_WAITING, set(job_ids) - dead),
        (pb.JOB_STATE_UNSPECIFIED, set(job_ids)),
    ):
        page = await jobs.ListJobs(pb.ListJobsRequest(state=state), metadata=bearer(caller))
        assert {job.id for job in page.jobs} == expected
    page = await jobs.ListJobs(pb.ListJobsRequest(page_size=1), metadata=bearer(caller))
    for request, field in (
        (pb.ListJobsRequest(state=99), "state"),  # type: ignore[arg-type]
        (
            pb.ListJobsRequest(page_token=page.next_page_token, state=pb.JOB_STATE_DEAD),
            "page_token",
        ),
    ):
        refusal = await refusal_of(jobs.ListJobs(request, metadata=bearer(caller)))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


# --- retry, cancel, create ----------------------------------------------------------------------


async def end(queue: Queue, how: type[Completed] | type[Failed]) -> None:
    (lease,) = await queue.lease("w", ["test"], 1)
    assert await queue.settle("w", [how(lease.held, "{}")])


async def actions(owner: asyncpg.Connection) -> list[str]:
    rows = await owner.fetch("SELECT action FROM audit_events ORDER BY id")
    return [row["action"] for row in rows]


async def test_job_that_was_given_up_is_done_again_with_all_its_attempts(
    jobs: rpc.JobServiceAsyncStub,
    database: Database,
    caller: Caller,
    queue: Queue,
    owner: asyncpg.Connection,
) -> None:
    request = pb.RetryJobRequest(id=await enqueue_for(database, caller))
    await end(queue, Failed)
    retried = (await jobs.RetryJob(request, metadata=bearer(caller))).job
    assert (retried.state, retried.attempts) == (pb.JOB_STATE_WAITING, 0)
    assert not retried.HasField("finish_time")
    # Whoever did not hear the answer asks again.
    again = (await jobs.RetryJob(request, metadata=bearer(caller))).job
    assert again == retried
    assert await actions(owner) == ["job.retry"]
    await end(queue, Completed)
    refusal = await refusal_of(jobs.RetryJob(request, metadata=bearer(caller)))
    assert refusal.reason == "STATE_CONFLICT"


async def test_job_is_not_retried_beside_another_of_its_unique_key(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, queue: Queue
) -> None:
    async def unique() -> str:
        async with database.transaction(caller) as connection:
            job_id = await enqueue(
                connection, kind="test", payload={}, caller=caller, unique_key="k", max_attempts=1
            )
        return ids.show(ids.JOB, job_id)

    dead = await unique()
    await end(queue, Failed)
    other = await unique()
    request = pb.RetryJobRequest(id=dead)
    refusal = await refusal_of(jobs.RetryJob(request, metadata=bearer(caller)))
    assert refusal.reason == "STATE_CONFLICT"
    await jobs.CancelJob(pb.CancelJobRequest(id=other), metadata=bearer(caller))
    await jobs.RetryJob(request, metadata=bearer(caller))


async def test_waiting_job_is_cancelled_at_once_and_can_be_retried(
    jobs: rpc.JobServiceAsyncStub,
    database: Database,
    caller: Caller,
    queue: Queue,
    owner: asyncpg.Connection,
) -> None:
    job_id = await enqueue_for(database, caller)
    request = pb.CancelJobRequest(id=job_id)
    cancelled = (await jobs.CancelJob(request, metadata=bearer(caller))).job
    assert cancelled.state == pb.JOB_STATE_CANCELLED
    assert cancelled.HasField("cancel_time")
    assert cancelled.HasField("finish_time")
    assert (await jobs.CancelJob(request, metadata=bearer(caller))).job == cancelled
    assert await actions(owner) == ["job.cancel"]
    assert await queue.lease("w", ["test"], 1) == []
    await jobs.RetryJob(pb.RetryJobRequest(id=job_id), metadata=bearer(caller))
    await end(queue, Completed)
    refusal = await refusal_of(jobs.CancelJob(request, metadata=bearer(caller)))
    assert refusal.reason == "STATE_CONFLICT"


async def test_running_job_stays_so_until_its_worker_has_stopped(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, queue: Queue
) -> None:
    request = pb.CancelJobRequest(id=await enqueue_for(database, caller))
    (lease,) = await queue.lease("w", ["test"], 1)
    ending = (await jobs.CancelJob(request, metadata=bearer(caller))).job
    assert (ending.state, ending.HasField("cancel_time")) == (pb.JOB_STATE_RUNNING, True)
    assert await queue.settle("w", [Completed(lease.held, "{}")]) == set()
    ended = (await jobs.CancelJob(request, metadata=bearer(caller))).job
    assert (ended.state, ended.result_json) == (pb.JOB_STATE_CANCELLED, "")


async def test_nobody_retries_or_cancels_what_is_anothers(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller
) -> None:
    job_id = await enqueue_for(database, caller)
    stranger = bearer(await new_caller(database))
    for refused in (
        jobs.RetryJob(pb.RetryJobRequest(id=job_id), metadata=stranger),
        jobs.CancelJob(pb.CancelJobRequest(id=job_id), metadata=stranger),
    ):
        assert (await refusal_of(refused)).code is grpc.StatusCode.NOT_FOUND
    job = (await jobs.GetJob(pb.GetJobRequest(id=job_id), metadata=bearer(caller))).job
    assert (job.state, job.HasField("cancel_time")) == (pb.JOB_STATE_WAITING, False)


async def test_user_asks_for_a_job_of_a_kind_that_users_may_ask_for(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller
) -> None:
    request = pb.CreateJobRequest(kind="embedding.batch")
    refusal = await refusal_of(jobs.CreateJob(request, metadata=bearer(caller)))
    assert refusal.reason == "STATE_CONFLICT"
    await want_vectors(database, caller)
    made = (await jobs.CreateJob(request, metadata=bearer(caller))).job
    assert (made.kind, made.state) == ("embedding.batch", pb.JOB_STATE_WAITING)
    assert (await jobs.CreateJob(request, metadata=bearer(caller))).job == made
    for kind in ("", "meditation.plan", "user.erase"):
        refusal = await refusal_of(
            jobs.CreateJob(pb.CreateJobRequest(kind=kind), metadata=bearer(caller))
        )
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("kind",))


async def test_job_that_is_asked_for_again_with_its_request_id_is_made_once_even_if_it_has_ended(
    jobs: rpc.JobServiceAsyncStub, owner: asyncpg.Connection, caller: Caller
) -> None:
    request = pb.CreateJobRequest(kind="user.export", request_id="mine")
    made = (await jobs.CreateJob(request, metadata=bearer(caller))).job
    await owner.execute("UPDATE jobs SET state = 'succeeded', finished_at = now()")
    again = (await jobs.CreateJob(request, metadata=bearer(caller))).job
    assert (again.id, again.state) == (made.id, pb.JOB_STATE_SUCCEEDED)
    other = pb.CreateJobRequest(kind="user.export")
    assert (await jobs.CreateJob(other, metadata=bearer(caller))).job.id != made.id
    reused = pb.CreateJobRequest(kind="meditation.run", request_id="mine")
    refusal = await refusal_of(jobs.CreateJob(reused, metadata=bearer(caller)))
    assert refusal.reason == "REQUEST_ID_REUSED"
    too_long = pb.CreateJobRequest(kind="user.export", request_id="x" * 65)
    refusal = await refusal_of(jobs.CreateJob(too_long, metadata=bearer(caller)))
    assert refusal.fields == ("request_id",)
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 2


@pytest.mark.parametrize(
    ("kind", "payload_json", "does"),
    [
        ("embedding.batch", "", "embedding.batch"),
        ("memories.embed", "", "embedding.batch"),
        ("user.export", "{}", "user.export"),
        ("meditation.run", '{"dry_run": true, "full_run": false}', "meditation.shard"),
    ],
)
async def test_every_kind_that_users_may_ask_for_makes_one_job_until_that_is_done(
    jobs: rpc.JobServiceAsyncStub,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    kind: str,
    payload_json: str,
    does: str,
) -> None:
    await want_vectors(database, caller)
    request = pb.CreateJobRequest(kind=kind, payload_json=payload_json)
    made = (await jobs.CreateJob(request, metadata=bearer(caller))).job
    assert (made.kind, made.state) == (does, pb.JOB_STATE_WAITING)
    assert (await jobs.CreateJob(request, metadata=bearer(caller))).job == made
    job_id = ids.parse(ids.JOB, made.id, "id")
    assert await owner.fetchval("SELECT user_id FROM jobs WHERE id = $1", job_id) == caller.user_id
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 1


async def test_run_that_is_asked_for_is_as_the_payload_says(
    jobs: rpc.JobServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    for payload in ('{"dry_run": true}', '{"full_run": true}'):
        request = pb.CreateJobRequest(kind="meditation.run", payload_json=payload)
        await jobs.CreateJob(request, metadata=bearer(caller))
    runs = await owner.fetch("SELECT dry_run, full_run FROM meditations ORDER BY id")
    assert [tuple(run) for run in runs] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("kind", "payload_json", "field"),
    [
        ("meditation.run", "dry_run", "payload_json"),
        ("meditation.run", "[]", "payload_json"),
        ("meditation.run", '{"a": "' + "a" * 1000 + '"}', "payload_json"),
        ("meditation.run", "[" * 999, "payload_json"),
        ("meditation.run", '{"dry_run": 1}', "payload_json.dry_run"),
        ("meditation.run", '{"dry_run": null}', "payload_json.dry_run"),
        ("meditation.run", '{"user_id": "usr_1"}', "payload_json.user_id"),
        ("user.export", '{"dry_run": true}', "payload_json.dry_run"),
        ("embedding.batch", '{"model": "small"}', "payload_json.model"),
    ],
)
async def test_what_a_kind_cannot_be_told_is_refused_by_its_field(
    jobs: rpc.JobServiceAsyncStub, caller: Caller, kind: str, payload_json: str, field: str
) -> None:
    for refused in (
        jobs.CreateJob(
            pb.CreateJobRequest(kind=kind, payload_json=payload_json), metadata=bearer(caller)
        ),
        jobs.CreateSchedule(
            pb.CreateScheduleRequest(kind=kind, payload_json=payload_json, cron="0 2 * * *"),
            metadata=bearer(caller),
        ),
    ):
        refusal = await refusal_of(refused)
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


async def test_schedule_shows_what_its_jobs_are_told(
    jobs: rpc.JobServiceAsyncStub, caller: Caller
) -> None:
    request = pb.CreateScheduleRequest(
        kind="meditation.run", payload_json='{"dry_run": true}', cron="0 2 * * *"
    )
    made = (await jobs.CreateSchedule(request, metadata=bearer(caller))).schedule
    assert made.payload_json == '{"dry_run": true}'
    shown = await jobs.GetSchedule(pb.GetScheduleRequest(id=made.id), metadata=bearer(caller))
    assert shown.schedule == made


# --- watching -----------------------------------------------------------------------------------


async def test_watch_shows_what_changes_and_ends_with_the_job(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, queue: Queue
) -> None:
    request = pb.WatchJobRequest(id=await enqueue_for(database, caller))
    stream: Any = jobs.WatchJob(request, metadata=bearer(caller), timeout=20)
    assert (await stream.read()).job.state == pb.JOB_STATE_WAITING
    (lease,) = await queue.lease("w", ["test"], 1)
    assert (await stream.read()).job.state == pb.JOB_STATE_RUNNING
    await queue.extend("w", [Beat(lease.held, 0.5)])
    assert (await stream.read()).job.progress == 0.5
    await queue.settle("w", [Completed(lease.held, '{"n": 1}')])
    last = (await stream.read()).job
    assert (last.state, last.result_json) == (pb.JOB_STATE_SUCCEEDED, '{"n": 1}')
    assert (await stream.read()).end.reason == pb.WATCH_JOB_END_REASON_FINISHED
    assert not isinstance(await stream.read(), pb.WatchJobResponse)


async def test_watch_of_a_job_that_stands_still_shows_it_again_and_again(
    serve: Serve, database: Database, system_database: SystemDatabase, caller: Caller
) -> None:
    store = JobStore(database, system_database, KINDS)
    # Nobody looks at the table: whatever comes after the first message was not called for.
    feed = JobFeed(store, session_seconds=60, heartbeat_seconds=0.01)
    schedules = ScheduleStore(database, system_database, KINDS)
    service = JobService(store, feed, schedules, KINDS)
    channel = await serve(lambda server: rpc.add_JobServiceServicer_to_server(service, server))
    request = pb.WatchJobRequest(id=await enqueue_for(database, caller))
    stream: Any = rpc.JobServiceStub(channel).WatchJob(request, metadata=bearer(caller), timeout=20)
    first = await stream.read()
    assert first.job.state == pb.JOB_STATE_WAITING
    assert [await stream.read() for _ in range(3)] == [first] * 3
    feed.drain()
    while (last := await stream.read()) == first:
        pass
    assert last.end.reason == pb.WATCH_JOB_END_REASON_RECONNECT


async def test_watch_of_a_job_that_has_ended_ends_at_once(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, queue: Queue
) -> None:
    request = pb.WatchJobRequest(id=await enqueue_for(database, caller))
    await end(queue, Failed)
    seen = [each async for each in jobs.WatchJob(request, metadata=bearer(caller))]
    assert [each.WhichOneof("message") for each in seen] == ["job", "end"]
    assert seen[0].job.state == pb.JOB_STATE_DEAD


async def test_watchers_are_asked_to_come_back_when_the_service_stops(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, feed: JobFeed
) -> None:
    request = pb.WatchJobRequest(id=await enqueue_for(database, caller))
    stream: Any = jobs.WatchJob(request, metadata=bearer(caller), timeout=20)
    await stream.read()
    feed.drain()
    assert (await stream.read()).end.reason == pb.WATCH_JOB_END_REASON_RECONNECT
    late: Any = jobs.WatchJob(request, metadata=bearer(caller), timeout=20)
    assert (await late.read()).WhichOneof("message") == "end"


async def test_nobody_watches_what_is_anothers_or_is_gone(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller, owner: asyncpg.Connection
) -> None:
    request = pb.WatchJobRequest(id=await enqueue_for(database, caller))
    stranger: Any = jobs.WatchJob(request, metadata=bearer(await new_caller(database)))
    assert (await refusal_of(stranger.read())).code is grpc.StatusCode.NOT_FOUND
    stream: Any = jobs.WatchJob(request, metadata=bearer(caller), timeout=20)
    await stream.read()
    await owner.execute("DELETE FROM jobs")
    assert (await refusal_of(stream.read())).code is grpc.StatusCode.NOT_FOUND


async def test_user_watches_by_a_bounded_number_of_streams(
    jobs: rpc.JobServiceAsyncStub, database: Database, caller: Caller
) -> None:
    request = pb.WatchJobRequest(id=await enqueue_for(database, caller))
    streams: list[Any] = []
    for _ in range(STREAMS):
        streams.append(jobs.WatchJob(request, metadata=bearer(caller), timeout=20))
        await streams[-1].read()
    one_more: Any = jobs.WatchJob(request, metadata=bearer(caller))
    assert (await refusal_of(one_more.read())).reason == "QUOTA_EXCEEDED"
    for stream in streams:
        stream.cancel()


# --- schedules ----------------------------------------------------------------------------------

WEEKLY = pb.CreateScheduleRequest(
    kind="embedding.batch", cron="30 2 * * 0", time_zone="Europe/Berlin", request_id="weekly"
)


async def test_schedule_is_made_once_shown_paused_resumed_and_deleted(
    jobs: rpc.JobServiceAsyncStub, caller: Caller
) -> None:
    me = bearer(caller)
    made = (await jobs.CreateSchedule(WEEKLY, metadata=me)).schedule
    assert (await jobs.CreateSchedule(WEEKLY, metadata=me)).schedule == made
    assert made.missed_ticks == pb.MISSED_TICKS_RUN_ONCE
    first, *later = [each.ToDatetime() for each in made.next_run_times]
    assert [tick - first for tick in later] == [timedelta(days=7), timedelta(days=14)] or len(
        {tick.hour for tick in (first, *later)}
    ) == 2  # clocks are put forward or back in between
    paused = (await jobs.PauseSchedule(pb.PauseScheduleRequest(id=made.id), metadata=me)).schedule
    assert (paused.paused, list(paused.next_run_times)) == (True, [])
    resumed = (
        await jobs.ResumeSchedule(pb.ResumeScheduleRequest(id=made.id), metadata=me)
    ).schedule
    assert resumed == made
    shown = (await jobs.GetSchedule(pb.GetScheduleRequest(id=made.id), metadata=me)).schedule
    assert shown == made
    assert [*(await jobs.ListSchedules(pb.ListSchedulesRequest(), metadata=me)).schedules] == [made]
    await jobs.DeleteSchedule(pb.DeleteScheduleRequest(id=made.id), metadata=me)
    refusal = await refusal_of(
        jobs.DeleteSchedule(pb.DeleteScheduleRequest(id=made.id), metadata=me)
    )
    assert refusal.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "meditation.plan"}, "kind"),
        ({"cron": ""}, "cron"),
        ({"cron": "0 0 30 2 *"}, "cron"),
        ({"cron": "* * * * * *"}, "cron"),
        ({"cron": "every night"}, "cron"),
        ({"cron": "61 * * * *"}, "cron"),
        ({"cron": "0 0 * * *\0"}, "cron"),
        ({"time_zone": "Mars/Olympus"}, "time_zone"),
        ({"time_zone": "../../etc/passwd"}, "time_zone"),
        ({"time_zone": "a\0b"}, "time_zone"),
        ({"missed_ticks": 9}, "missed_ticks"),
        ({"request_id": "r" * 65}, "request_id"),
    ],
)
async def test_schedule_that_makes_no_sense_is_refused_by_its_field(
    jobs: rpc.JobServiceAsyncStub, caller: Caller, change: dict[str, Any], field: str
) -> None:
    request = pb.CreateScheduleRequest()
    request.CopyFrom(WEEKLY)
    for name, value in change.items():
        setattr(request, name, value)
    refusal = await refusal_of(jobs.CreateSchedule(request, metadata=bearer(caller)))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


async def test_schedules_are_listed_page_by_page_and_are_a_bounded_number(
    jobs: rpc.JobServiceAsyncStub, caller: Caller
) -> None:
    me = bearer(caller)
    request = pb.CreateScheduleRequest(kind="embedding.batch", cron="0 0 1 1 *")
    made = [(await jobs.CreateSchedule(request, metadata=me)).schedule.id for _ in range(MOST)]
    refusal = await refusal_of(jobs.CreateSchedule(request, metadata=me))
    assert refusal.reason == "QUOTA_EXCEEDED"
    listed: list[str] = []
    token = ""
    while True:
        page = await jobs.ListSchedules(
            pb.ListSchedulesRequest(page_size=7, page_token=token), metadata=me
        )
        listed += [each.id for each in page.schedules]
        if not (token := page.next_page_token):
            break
    assert listed == made[::-1]
