"""What MemoryService answers to batches."""

from typing import Any, Final, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import current_caller
from server.clock import Clock
from server.errors import InvalidArgument
from server.memory import messages
from server.memory.batch_store import BatchStore
from server.memory.model import Draft, Tier
from server.memory.sensitive import Opener
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LARGEST: Final = 1_000


class BatchHandlers:
    """A part of MemoryService."""

    _batches: BatchStore
    _opener: Opener
    _clock: Clock

    async def BatchCreateMemories(
        self, request: pb.BatchCreateMemoriesRequest, context: Context
    ) -> pb.BatchCreateMemoriesResponse:
        caller = current_caller()
        check_request_id(request.request_id)
        drafts = _drafts(request)
        kept = await self._batches.create(caller, drafts, request.request_id, self._clock())
        memories = await self._opener.opened(caller, [memory for memory, _ in kept])
        return pb.BatchCreateMemoriesResponse(
            results=[
                pb.CreateMemoryResponse(memory=messages.memory_to(memory), created=created)
                for memory, (_, created) in zip(memories, kept, strict=True)
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
