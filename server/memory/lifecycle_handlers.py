"""What MemoryService answers about the life of a memory: its states, its worth, its versions."""

from typing import Any, TypeAlias
from uuid import UUID

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids, paging
from server.caller import Caller, current_caller
from server.clock import Clock
from server.memory import messages
from server.memory.attachments import Attachments
from server.memory.lifecycle_store import LifecycleStore
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from server.memory.tiers import wherever_it_is
from server.memory.usage_store import UsageStore

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class LifecycleHandlers:
    """A part of MemoryService."""

    _store: MemoryStore
    _short_term: ShortTermStore
    _lifecycle: LifecycleStore
    _usage: UsageStore
    _attachments: Attachments
    _clock: Clock

    async def DeleteMemory(
        self, request: pb.DeleteMemoryRequest, context: Context
    ) -> pb.DeleteMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        grace = messages.grace_from(request)
        if grace is not None:
            memory = await self._lifecycle.archive(
                caller, memory_id, None, self._clock(), grace=grace
            )
            return pb.DeleteMemoryResponse(memory=messages.memory_to(memory))
        await wherever_it_is(
            lambda: self._delete_durable(caller, memory_id),
            lambda: self._short_term.delete(caller, memory_id),
        )
        return pb.DeleteMemoryResponse()

    async def ArchiveMemory(
        self, request: pb.ArchiveMemoryRequest, context: Context
    ) -> pb.ArchiveMemoryResponse:
        memory = await self._lifecycle.archive(
            current_caller(),
            ids.parse(ids.MEMORY, request.id, "id"),
            messages.version_from(request.etag),
            self._clock(),
        )
        return pb.ArchiveMemoryResponse(memory=messages.memory_to(memory))

    async def RestoreMemory(
        self, request: pb.RestoreMemoryRequest, context: Context
    ) -> pb.RestoreMemoryResponse:
        memory = await self._lifecycle.restore(
            current_caller(),
            ids.parse(ids.MEMORY, request.id, "id"),
            messages.version_from(request.etag),
            self._clock(),
        )
        return pb.RestoreMemoryResponse(memory=messages.memory_to(memory))

    async def ProtectMemory(
        self, request: pb.ProtectMemoryRequest, context: Context
    ) -> pb.ProtectMemoryResponse:
        memory = await self._lifecycle.protect(
            current_caller(),
            ids.parse(ids.MEMORY, request.id, "id"),
            messages.version_from(request.etag),
            self._clock(),
            protected=request.protected,
        )
        return pb.ProtectMemoryResponse(memory=messages.memory_to(memory))

    async def GiveFeedback(
        self, request: pb.GiveFeedbackRequest, context: Context
    ) -> pb.GiveFeedbackResponse:
        memory = await self._lifecycle.rate(
            current_caller(),
            ids.parse(ids.MEMORY, request.id, "id"),
            messages.opinion_from(request),
            self._clock(),
            useful=request.useful,
        )
        return pb.GiveFeedbackResponse(memory=messages.memory_to(memory))

    async def ListMemoryVersions(
        self, request: pb.ListMemoryVersionsRequest, context: Context
    ) -> pb.ListMemoryVersionsResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        size = paging.page_size(request.page_size)
        identity = ("ListMemoryVersions", caller, memory_id)
        before = paging.decode(request.page_token, *identity)
        found = await self._lifecycle.versions(
            caller, memory_id, before=before.int if before else None, limit=size + 1
        )
        page, more = found[:size], len(found) > size
        return pb.ListMemoryVersionsResponse(
            versions=map(messages.memory_to, page),
            next_page_token=(paging.encode(UUID(int=page[-1].version), *identity) if more else ""),
        )

    async def GetUsage(self, request: pb.GetUsageRequest, context: Context) -> pb.GetUsageResponse:
        return messages.usage_to(await self._usage.get(current_caller()))

    async def _delete_durable(self, caller: Caller, memory_id: UUID) -> None:
        attachment_ids = await self._store.delete(caller, memory_id)
        await self._attachments.remove_objects(caller, attachment_ids)
