"""Serves kimberly.agents.v1.AgentService: parse, act, answer."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias
from uuid import UUID

import grpc
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.agents.v1 import agents_pb2_grpc as rpc

from server import ids, paging
from server.agents.messages import (
    agent_to,
    doing_from,
    instant_from,
    kind_from,
    overlap_from,
    task_to,
)
from server.agents.model import Agent, check_scopes
from server.agents.store import AgentStore
from server.agents.task_store import TaskStore
from server.caller import Caller, current_caller, current_credentials
from server.clock import Clock, utc_now
from server.display_names import check_display_name
from server.errors import NotFound, StateConflict
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
CancelJob = Callable[[Caller, UUID], Awaitable[object]]
"""Ends a job of a user; raises NotFound or StateConflict."""


class AgentService(rpc.AgentServiceServicer):
    """Serves the agents of the signed-in user."""

    def __init__(
        self, store: AgentStore, tasks: TaskStore, cancel: CancelJob, *, clock: Clock = utc_now
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._cancel = cancel
        self._clock = clock

    async def RegisterAgent(
        self, request: pb.RegisterAgentRequest, context: Context
    ) -> pb.RegisterAgentResponse:
        check_request_id(request.request_id)
        agent = Agent(
            id=ids.new_id(),
            name=check_display_name(request.name, "name"),
            kind=kind_from(request.kind),
            scopes=check_scopes(request.scopes, "scopes"),
            created_at=self._clock(),
        )
        expire_at = None
        if request.HasField("key_expire_time"):
            expire_at = instant_from(request.key_expire_time, "key_expire_time")
        contents = request.SerializeToString(deterministic=True)
        credentials = current_credentials()
        registered, key = await self._store.register(
            credentials.caller,
            agent,
            expire_at,
            request.request_id,
            contents,
            credentials.grant_id,
        )
        return pb.RegisterAgentResponse(agent=agent_to(registered), key=key)

    async def GetAgent(self, request: pb.GetAgentRequest, context: Context) -> pb.GetAgentResponse:
        agent = await self._store.get(current_caller(), ids.parse(ids.AGENT, request.id, "id"))
        return pb.GetAgentResponse(agent=agent_to(agent))

    async def ListAgents(
        self, request: pb.ListAgentsRequest, context: Context
    ) -> pb.ListAgentsResponse:
        agents = await self._store.list_agents(current_caller())
        return pb.ListAgentsResponse(agents=map(agent_to, agents))

    async def DisableAgent(
        self, request: pb.DisableAgentRequest, context: Context
    ) -> pb.DisableAgentResponse:
        caller, agent_id = current_caller(), ids.parse(ids.AGENT, request.id, "id")
        agent = await self._store.disable(caller, agent_id, self._clock())
        await self._cancel_tasks(caller, agent_id)
        return pb.DisableAgentResponse(agent=agent_to(agent))

    async def EnableAgent(
        self, request: pb.EnableAgentRequest, context: Context
    ) -> pb.EnableAgentResponse:
        agent = await self._store.enable(current_caller(), ids.parse(ids.AGENT, request.id, "id"))
        return pb.EnableAgentResponse(agent=agent_to(agent))

    async def DeleteAgent(
        self, request: pb.DeleteAgentRequest, context: Context
    ) -> pb.DeleteAgentResponse:
        caller, agent_id = current_caller(), ids.parse(ids.AGENT, request.id, "id")
        await self._store.delete(caller, agent_id, self._clock())
        await self._cancel_tasks(caller, agent_id)
        return pb.DeleteAgentResponse()

    async def RotateAgentKey(
        self, request: pb.RotateAgentKeyRequest, context: Context
    ) -> pb.RotateAgentKeyResponse:
        expire_at = None
        if request.HasField("key_expire_time"):
            expire_at = instant_from(request.key_expire_time, "key_expire_time")
        credentials = current_credentials()
        agent, key = await self._store.rotate(
            credentials.caller,
            ids.parse(ids.AGENT, request.id, "id"),
            self._clock(),
            overlap_from(request.overlap),
            expire_at,
            credentials.grant_id,
        )
        return pb.RotateAgentKeyResponse(agent=agent_to(agent), key=key)

    async def RunAgentTask(
        self, request: pb.RunAgentTaskRequest, context: Context
    ) -> pb.RunAgentTaskResponse:
        check_request_id(request.request_id)
        task = await self._tasks.run(
            current_caller(),
            ids.parse(ids.AGENT, request.agent_id, "agent_id"),
            doing_from(request),
            request.request_id,
            request.SerializeToString(deterministic=True),
        )
        return pb.RunAgentTaskResponse(task=task_to(task))

    async def GetAgentTask(
        self, request: pb.GetAgentTaskRequest, context: Context
    ) -> pb.GetAgentTaskResponse:
        task = await self._tasks.get(current_caller(), ids.parse(ids.JOB, request.id, "id"))
        return pb.GetAgentTaskResponse(task=task_to(task))

    async def ListAgentTasks(
        self, request: pb.ListAgentTasksRequest, context: Context
    ) -> pb.ListAgentTasksResponse:
        caller, agent_id = current_caller(), ids.parse(ids.AGENT, request.agent_id, "agent_id")
        size = paging.page_size(request.page_size)
        identity = ("ListAgentTasks", caller, agent_id)
        before = paging.decode(request.page_token, *identity)
        tasks = await self._tasks.page(caller, agent_id, before=before, limit=size + 1)
        more = len(tasks) > size
        return pb.ListAgentTasksResponse(
            tasks=map(task_to, tasks[:size]),
            next_page_token=paging.encode(tasks[size - 1].id, *identity) if more else "",
        )

    async def CancelAgentTask(
        self, request: pb.CancelAgentTaskRequest, context: Context
    ) -> pb.CancelAgentTaskResponse:
        caller, task_id = current_caller(), ids.parse(ids.JOB, request.id, "id")
        await self._tasks.get(caller, task_id)
        await self._cancel(caller, task_id)
        return pb.CancelAgentTaskResponse(task=task_to(await self._tasks.get(caller, task_id)))

    async def _cancel_tasks(self, caller: Caller, agent_id: UUID) -> None:
        """Cancel what an agent was doing: it fails from now on, but nobody waits for that."""
        for task_id in await self._tasks.unfinished(caller, agent_id):
            with suppress(NotFound, StateConflict):  # it has ended meanwhile
                await self._cancel(caller, task_id)
