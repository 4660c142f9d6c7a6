"""Serves kimberly.jobs.v1.JobService: parse, act, answer."""

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from server import ids, paging
from server.caller import current_caller
from server.jobs.asking import Kinds
from server.jobs.messages import job_to, state_from
from server.jobs.schedule_handlers import ScheduleHandlers
from server.jobs.schedule_store import ScheduleStore
from server.jobs.store import JobStore
from server.jobs.watching import JobFeed
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class JobService(ScheduleHandlers, rpc.JobServiceServicer):
    """Shows the signed-in user their jobs, and does with them as they say."""

    def __init__(
        self, store: JobStore, feed: JobFeed, schedules: ScheduleStore, kinds: Kinds
    ) -> None:
        self._store = store
        self._feed = feed
        self._schedules = schedules
        self._kinds = kinds

    async def CreateJob(
        self, request: pb.CreateJobRequest, context: Context
    ) -> pb.CreateJobResponse:
        check_request_id(request.request_id)
        asked = (request.kind, request.payload_json)
        job = await self._store.create(
            current_caller(), *asked, request.request_id, request.SerializeToString()
        )
        return pb.CreateJobResponse(job=job_to(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        job = await self._store.get(current_caller(), ids.parse(ids.JOB, request.id, "id"))
        return pb.GetJobResponse(job=job_to(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        caller = current_caller()
        size = paging.page_size(request.page_size)
        state = state_from(request.state)
        which = ("ListJobs", caller, *([state.value] if state else []))
        before = paging.decode(request.page_token, *which)
        jobs = await self._store.page(caller, state=state, before=before, limit=size + 1)
        more = len(jobs) > size
        return pb.ListJobsResponse(
            jobs=map(job_to, jobs[:size]),
            next_page_token=paging.encode(jobs[size - 1].id, *which) if more else "",
        )

    async def RetryJob(self, request: pb.RetryJobRequest, context: Context) -> pb.RetryJobResponse:
        job = await self._store.retry(current_caller(), ids.parse(ids.JOB, request.id, "id"))
        return pb.RetryJobResponse(job=job_to(job))

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        job = await self._store.cancel(current_caller(), ids.parse(ids.JOB, request.id, "id"))
        return pb.CancelJobResponse(job=job_to(job))

    def WatchJob(
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        return self._feed.stream(current_caller(), ids.parse(ids.JOB, request.id, "id"))
