"""What MemoryService answers about goals."""

from collections.abc import Iterable
from typing import Any, Final, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server import etags, ids, paging
from server.caller import current_caller
from server.clock import Clock
from server.errors import InvalidArgument
from server.memory.goal_store import GoalStore
from server.memory.goals import Goal, GoalChange, check_goal
from server.memory.messages import timestamp
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_CHANGEABLE: Final = frozenset({"content", "active"})


class GoalHandlers:
    """A part of MemoryService."""

    _goals: GoalStore
    _clock: Clock

    async def CreateGoal(
        self, request: pb.CreateGoalRequest, context: Context
    ) -> pb.CreateGoalResponse:
        check_request_id(request.request_id)
        content = check_goal(request.goal.content, "goal.content")
        is_active = request.goal.active or not request.goal.HasField("active")
        goal = await self._goals.create(
            current_caller(), content, request.request_id, self._clock(), is_active=is_active
        )
        return pb.CreateGoalResponse(goal=goal_to(goal))

    async def GetGoal(self, request: pb.GetGoalRequest, context: Context) -> pb.GetGoalResponse:
        goal = await self._goals.get(current_caller(), ids.parse(ids.GOAL, request.id, "id"))
        return pb.GetGoalResponse(goal=goal_to(goal))

    async def ListGoals(
        self, request: pb.ListGoalsRequest, context: Context
    ) -> pb.ListGoalsResponse:
        caller = current_caller()
        size = paging.page_size(request.page_size)
        identity = ("ListGoals", caller, request.active_only)
        before = paging.decode(request.page_token, *identity)
        found = await self._goals.page(
            caller, active_only=request.active_only, before=before, limit=size + 1
        )
        page, more = found[:size], len(found) > size
        return pb.ListGoalsResponse(
            goals=map(goal_to, page),
            next_page_token=paging.encode(page[-1].id, *identity) if more else "",
        )

    async def UpdateGoal(
        self, request: pb.UpdateGoalRequest, context: Context
    ) -> pb.UpdateGoalResponse:
        goal_id = ids.parse(ids.GOAL, request.goal.id, "goal.id")
        change = _change_from(request.goal, request.update_mask.paths)
        goal = await self._goals.update(current_caller(), goal_id, change, self._clock())
        return pb.UpdateGoalResponse(goal=goal_to(goal))

    async def DeleteGoal(
        self, request: pb.DeleteGoalRequest, context: Context
    ) -> pb.DeleteGoalResponse:
        await self._goals.delete(current_caller(), ids.parse(ids.GOAL, request.id, "id"))
        return pb.DeleteGoalResponse()


def goal_to(goal: Goal) -> pb.Goal:
    """Return a goal as the contract shows it."""
    return pb.Goal(
        id=ids.show(ids.GOAL, goal.id),
        content=goal.content,
        active=goal.is_active,
        etag=etags.show(goal.version),
        create_time=timestamp(goal.created_at),
        update_time=timestamp(goal.updated_at),
    )


def _change_from(message: pb.Goal, mask: Iterable[str]) -> GoalChange:
    paths = set(mask)
    if not paths or paths - _CHANGEABLE:
        raise InvalidArgument("update_mask", f"must name some of {', '.join(sorted(_CHANGEABLE))}")
    if "active" in paths and not message.HasField("active"):
        raise InvalidArgument("goal.active", "must be true or false: the mask names it")
    return GoalChange(
        check_goal(message.content, "goal.content") if "content" in paths else None,
        message.active if "active" in paths else None,
        etags.parse(message.etag),
    )
