"""What MemoryService answers to batches."""

from typing import Any, Final, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import current_caller
from server.clock import Clock
from server.errors import InvalidArgument, NotFound
from server.memory import messages
from server.memory.batch_store import BatchStore
from server.memory.bulk_store import BulkStore
from server.memory.model import Draft, Tier
from server.memory.sensitive import Opener
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LARGEST: Final = 1_000


class BatchHandlers:
    """A part of MemoryService."""

    _batches: BatchStore
    _bulk: BulkStore
    _opener: Opener
    _clock: Clock

    async def BatchCreateMemories(
        self, request: pb.BatchCreateMemoriesRequest, context: Context
    ) -> pb.BatchCreateMemoriesResponse:
        caller = current_caller()
        check_request_id(request.request_id)
        drafts = _drafts(request)
        kept = await self._batches.create(caller, drafts, request.request_id, self._clock())
        found = await self._bulk.some(caller, [memory_id for memory_id, _ in kept])
        memories = {memory.id: memory for memory in await self._opener.opened(caller, found)}
        if any(memory_id not in memories for memory_id, _ in kept):
            raise NotFound("memory")
        return pb.BatchCreateMemoriesResponse(
            results=[
                pb.CreateMemoryResponse(
                    memory=messages.memory_to(memories[memory_id]), created=created
                )
                for memory_id, created in kept
            ]
        )


def _drafts(request: pb.BatchCreateMemoriesRequest) -> list[Draft]:
    if not 1 <= len(request.memories) <= _LARGEST:
        raise InvalidArgument("memories", f"must be 1 to {_LARGEST}")
    drafts = []
    for place, message in enumerate(request.memories):
        path = f"memories[{place}]"
        draft = messages.draft_from(message, path)
        if draft.tier is Tier.SHORT_TERM:
            raise InvalidArgument(f"{path}.tier", "short-term memories are created one by one")
        drafts.append(draft)
    return drafts
