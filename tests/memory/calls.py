"""Calls that many tests make, and what is left of them in Valkey."""

from __future__ import annotations

from typing import Any, TypeAlias

from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from tests.conftest import bearer

Stub: TypeAlias = "rpc.MemoryServiceAsyncStub"


async def create(memories: Stub, caller: Caller, content: str, **fields: Any) -> pb.Memory:
    request = pb.CreateMemoryRequest(memory=pb.Memory(content=content, **fields))
    return (await memories.CreateMemory(request, metadata=bearer(caller))).memory


async def keep(memories: Stub, caller: Caller, content: str, **fields: Any) -> pb.Memory:
    """Create a memory of the short term."""
    return await create(memories, caller, content, tier=pb.TIER_SHORT_TERM, **fields)


async def get(memories: Stub, caller: Caller, memory: pb.Memory) -> pb.Memory:
    request = pb.GetMemoryRequest(id=memory.id)
    return (await memories.GetMemory(request, metadata=bearer(caller))).memory


async def delete(memories: Stub, caller: Caller, memory: pb.Memory, **fields: Any) -> None:
    request = pb.DeleteMemoryRequest(id=memory.id, **fields)
    await memories.DeleteMemory(request, metadata=bearer(caller))


async def rate(memories: Stub, caller: Caller, memory: pb.Memory, **fields: Any) -> pb.Memory:
    request = pb.GiveFeedbackRequest(id=memory.id, **fields)
    return (await memories.GiveFeedback(request, metadata=bearer(caller))).memory


async def listed(memories: Stub, caller: Caller, **fields: Any) -> list[tuple[str, int]]:
    """Return contents and tiers of the first page of a list."""
    answer = await memories.ListMemories(pb.ListMemoriesRequest(**fields), metadata=bearer(caller))
    return [(memory.content, memory.tier) for memory in answer.memories]


async def short_term_used(memories: Stub, caller: Caller) -> tuple[int, int]:
    """Return bytes and number of short-term memories."""
    answer = await memories.GetUsage(pb.GetUsageRequest(), metadata=bearer(caller))
    (short,) = (tier for tier in answer.tiers if tier.tier == pb.TIER_SHORT_TERM)
    return short.used_bytes, short.count


async def archive(memories: Stub, caller: Caller, memory: pb.Memory, etag: str = "") -> pb.Memory:
    request = pb.ArchiveMemoryRequest(id=memory.id, etag=etag)
    return (await memories.ArchiveMemory(request, metadata=bearer(caller))).memory


async def restore(memories: Stub, caller: Caller, memory: pb.Memory, etag: str = "") -> pb.Memory:
    request = pb.RestoreMemoryRequest(id=memory.id, etag=etag)
    return (await memories.RestoreMemory(request, metadata=bearer(caller))).memory


async def change(memories: Stub, caller: Caller, memory: pb.Memory, **fields: object) -> pb.Memory:
    request = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, **fields),  # type: ignore[arg-type]
        update_mask=FieldMask(paths=list(fields)),
    )
    return (await memories.UpdateMemory(request, metadata=bearer(caller))).memory


async def versions(
    memories: Stub, caller: Caller, memory: pb.Memory, size: int = 0
) -> list[pb.Memory]:
    """Return all versions of a memory, the newest first."""
    told: list[pb.Memory] = []
    token = ""
    while True:
        page = await memories.ListMemoryVersions(
            pb.ListMemoryVersionsRequest(id=memory.id, page_size=size, page_token=token),
            metadata=bearer(caller),
        )
        told += page.versions
        token = page.next_page_token
        if not token:
            return told


async def values_in(redis: Redis, caller: Caller) -> bytes:
    """Return everything that Valkey holds of a user, whatever it is."""
    found = b""
    async for key in redis.scan_iter(f"{KEY_PREFIX}*{caller.user_id.hex}*"):
        found += await redis.dump(key) or b""
    return found
