"""What MemoryService answers about the life of a memory: its states, its worth, its versions."""

from typing import Any, TypeAlias
from uuid import UUID

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids, paging
from server.caller import Caller, current_caller
from server.clock import Clock
from server.memory import messages
from server.memory.agent_reads import AgentReads
from server.memory.attachments import Attachments
from server.memory.lifecycle_store import LifecycleStore
from server.memory.model import Memory
from server.memory.query_handlers import Queries
from server.memory.sensitive import Opener
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from server.memory.tiers import in_either_store
from server.memory.usage_store import UsageStore

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class LifecycleHandlers:
    """A part of MemoryService."""

    _store: MemoryStore
    _short_term: ShortTermStore
    _lifecycle: LifecycleStore
    _usage: UsageStore
    _queries: Queries
    _attachments: Attachments
    _opener: Opener
    _reads: AgentReads
    _clock: Clock

    async def DeleteMemory(
        self, request: pb.DeleteMemoryRequest, context: Context
    ) -> pb.DeleteMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        grace = messages.grace_from(request)
        if grace is not None:
            memory = await in_either_store(
                lambda: self._lifecycle.archive(
                    caller, memory_id, None, self._clock(), grace=grace
                ),
                lambda: self._short_term.refuse(caller, memory_id, "deleted with a grace period"),
            )
            return pb.DeleteMemoryResponse(memory=await self._shown(caller, memory))
        await in_either_store(
            lambda: self._delete_durable(caller, memory_id),
            lambda: self._short_term.delete(caller, memory_id),
        )
        await self._queries.answers.forget(caller)
        return pb.DeleteMemoryResponse()

    async def ArchiveMemory(
        self, request: pb.ArchiveMemoryRequest, context: Context
    ) -> pb.ArchiveMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        version = messages.version_from(request.etag)
        memory = await in_either_store(
            lambda: self._lifecycle.archive(caller, memory_id, version, self._clock()),
            lambda: self._short_term.refuse(caller, memory_id, "archived"),
        )
        return pb.ArchiveMemoryResponse(memory=await self._shown(caller, memory))

    async def RestoreMemory(
        self, request: pb.RestoreMemoryRequest, context: Context
    ) -> pb.RestoreMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        version = messages.version_from(request.etag)
        memory = await in_either_store(
            lambda: self._lifecycle.restore(caller, memory_id, version, self._clock()),
            lambda: self._short_term.refuse(caller, memory_id, "restored"),
        )
        return pb.RestoreMemoryResponse(memory=await self._shown(caller, memory))

    async def ProtectMemory(
        self, request: pb.ProtectMemoryRequest, context: Context
    ) -> pb.ProtectMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        version = messages.version_from(request.etag)
        memory = await in_either_store(
            lambda: self._lifecycle.protect(
                caller, memory_id, version, self._clock(), protected=request.protected
            ),
            lambda: self._short_term.refuse(caller, memory_id, "protected"),
        )
        return pb.ProtectMemoryResponse(memory=await self._shown(caller, memory))

    async def GiveFeedback(
        self, request: pb.GiveFeedbackRequest, context: Context
    ) -> pb.GiveFeedbackResponse:
        caller, now = current_caller(), self._clock()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        opinion, useful = messages.opinion_from(request), request.useful
        memory = await in_either_store(
            lambda: self._lifecycle.rate(caller, memory_id, opinion, now, useful=useful),
            lambda: self._short_term.rate(caller, memory_id, opinion, now, useful=useful),
        )
        return pb.GiveFeedbackResponse(memory=await self._shown(caller, memory))

    async def ListMemoryVersions(
        self, request: pb.ListMemoryVersionsRequest, context: Context
    ) -> pb.ListMemoryVersionsResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        size = paging.page_size(request.page_size)
        identity = ("ListMemoryVersions", caller, memory_id)
        before = paging.decode(request.page_token, *identity)
        below = before.int if before else None
        found = await in_either_store(
            lambda: self._lifecycle.versions(caller, memory_id, before=below, limit=size + 1),
            lambda: self._short_term.versions(caller, memory_id, before=below, limit=size + 1),
        )
        page, more = found[:size], len(found) > size
        await self._reads.note(caller, [memory_id])
        return pb.ListMemoryVersionsResponse(
            versions=map(messages.memory_to, await self._opener.opened(caller, page)),
            next_page_token=(paging.encode(UUID(int=page[-1].version), *identity) if more else ""),
        )

    async def GetUsage(self, request: pb.GetUsageRequest, context: Context) -> pb.GetUsageResponse:
        caller = current_caller()
        short_term = await self._short_term.usage(caller)
        return messages.usage_to(await self._usage.get(caller, *short_term))

    async def _shown(self, caller: Caller, memory: Memory) -> pb.Memory:
        return messages.memory_to(await self._opener.opened_one(caller, memory))

    async def _delete_durable(self, caller: Caller, memory_id: UUID) -> None:
        attachment_ids = await self._store.delete(caller, memory_id)
        await self._attachments.remove_objects(caller, attachment_ids)
