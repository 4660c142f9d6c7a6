"""Serves kimberly.jobs.v1.JobService: parse, act, answer."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from server import ids, paging
from server.caller import current_caller
from server.jobs.model import Job, JobState
from server.jobs.store import JobStore

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_STATES: Mapping[JobState, pb.JobState.ValueType] = {
    JobState.WAITING: pb.JOB_STATE_WAITING,
    JobState.RUNNING: pb.JOB_STATE_RUNNING,
    JobState.SUCCEEDED: pb.JOB_STATE_SUCCEEDED,
    JobState.DEAD: pb.JOB_STATE_DEAD,
}


class JobService(rpc.JobServiceServicer):
    """Shows the signed-in user their jobs."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        job = await self._store.get(current_caller(), ids.parse(ids.JOB, request.id, "id"))
        return pb.GetJobResponse(job=job_to(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        caller = current_caller()
        size = paging.page_size(request.page_size)
        before = paging.decode(request.page_token, "ListJobs", caller)
        jobs = await self._store.page(caller, before=before, limit=size + 1)
        more = len(jobs) > size
        return pb.ListJobsResponse(
            jobs=map(job_to, jobs[:size]),
            next_page_token=paging.encode(jobs[size - 1].id, "ListJobs", caller) if more else "",
        )


def job_to(job: Job) -> pb.Job:
    """Return a job as the contract has it."""
    return pb.Job(
        id=ids.show(ids.JOB, job.id),
        kind=job.kind,
        state=_STATES[job.state],
        attempts=job.attempt,
        max_attempts=job.max_attempts,
        progress=job.progress,
        error=job.error,
        create_time=_timestamp(job.created_at),
        finish_time=None if job.finished_at is None else _timestamp(job.finished_at),
    )


def _timestamp(instant: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(instant)
    return timestamp
