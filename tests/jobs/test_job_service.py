"""What users see of their jobs."""

from __future__ import annotations

import grpc
import pytest_asyncio
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.enqueue import enqueue
from server.jobs.model import Completed, Failed
from server.jobs.queue import Queue
from server.jobs.service import JobService
from server.jobs.store import JobStore
from tests.conftest import Serve, bearer, new_caller
from tests.refusals import refusal_of


@pytest_asyncio.fixture
async def jobs(serve: Serve, database: Database) -> rpc.JobServiceAsyncStub:
    service = JobService(JobStore(database))
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
    await queue.settle("w", [Completed(lease.held, None)])
    done = (await jobs.GetJob(request, metadata=bearer(caller))).job
    assert (done.state, done.progress) == (pb.JOB_STATE_SUCCEEDED, 1)
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
