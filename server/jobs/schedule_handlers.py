"""What JobService answers about schedules."""

from datetime import UTC, datetime
from typing import Any, TypeAlias
from uuid import UUID

import grpc
from kimberly.jobs.v1 import jobs_pb2 as pb

from server import ids, paging
from server.caller import current_caller
from server.jobs.asking import Kinds
from server.jobs.messages import missed_from, schedule_to
from server.jobs.model import UserSchedule
from server.jobs.schedule_store import ScheduleStore
from server.jobs.ticks import check_schedule
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ScheduleHandlers:
    """A part of JobService."""

    _schedules: ScheduleStore
    _kinds: Kinds

    async def CreateSchedule(
        self, request: pb.CreateScheduleRequest, context: Context
    ) -> pb.CreateScheduleResponse:
        check_request_id(request.request_id)
        payload = self._kinds.payload(request.kind, request.payload_json)
        time_zone = request.time_zone or "UTC"
        check_schedule(request.cron, time_zone, datetime.now(UTC))
        wanted = UserSchedule(
            ids.new_id(),
            request.kind,
            request.cron,
            time_zone,
            missed_from(request.missed_ticks),
            payload,
        )
        schedule = await self._schedules.create(
            current_caller(), wanted, request.request_id, request.SerializeToString()
        )
        return pb.CreateScheduleResponse(schedule=schedule_to(schedule))

    async def GetSchedule(
        self, request: pb.GetScheduleRequest, context: Context
    ) -> pb.GetScheduleResponse:
        schedule = await self._schedules.get(current_caller(), _id(request))
        return pb.GetScheduleResponse(schedule=schedule_to(schedule))

    async def ListSchedules(
        self, request: pb.ListSchedulesRequest, context: Context
    ) -> pb.ListSchedulesResponse:
        caller = current_caller()
        size = paging.page_size(request.page_size)
        before = paging.decode(request.page_token, "ListSchedules", caller)
        found = await self._schedules.page(caller, before=before, limit=size + 1)
        token = ""
        if len(found) > size:
            token = paging.encode(found[size - 1].id, "ListSchedules", caller)
        return pb.ListSchedulesResponse(
            schedules=map(schedule_to, found[:size]), next_page_token=token
        )

    async def PauseSchedule(
        self, request: pb.PauseScheduleRequest, context: Context
    ) -> pb.PauseScheduleResponse:
        schedule = await self._schedules.pause(current_caller(), _id(request))
        return pb.PauseScheduleResponse(schedule=schedule_to(schedule))

    async def ResumeSchedule(
        self, request: pb.ResumeScheduleRequest, context: Context
    ) -> pb.ResumeScheduleResponse:
        schedule = await self._schedules.resume(current_caller(), _id(request))
        return pb.ResumeScheduleResponse(schedule=schedule_to(schedule))

    async def DeleteSchedule(
        self, request: pb.DeleteScheduleRequest, context: Context
    ) -> pb.DeleteScheduleResponse:
        await self._schedules.delete(current_caller(), _id(request))
        return pb.DeleteScheduleResponse()


def _id(
    request: pb.GetScheduleRequest
    | pb.PauseScheduleRequest
    | pb.ResumeScheduleRequest
    | pb.DeleteScheduleRequest,
) -> UUID:
    return ids.parse(ids.SCHEDULE, request.id, "id")
