"""Streams of memories, for tests: imported, watched and exported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
import grpc
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from tests.conftest import bearer
from tests.memory.calls import Stub
from tests.mesh import eventually

Stream: TypeAlias = "grpc.aio.UnaryStreamCall[pb.WatchMemoriesRequest, pb.WatchMemoriesResponse]"
TURNS = [
    pb.Memory(content=f"turn {n}", session_id="talk", session_position=n, speaker="Ann")
    for n in range(250)
]


async def in_chunks(
    memories: Sequence[pb.Memory], size: int, *, start: int = 0, request_id: str = ""
) -> AsyncIterator[pb.ImportMemoriesRequest]:
    """Yield memories in chunks; only the first one says what import it is of."""
    for first in range(start, len(memories), size):
        yield pb.ImportMemoriesRequest(
            first_index=first,
            memories=memories[first : first + size],
            request_id=request_id if first == start else "",
        )


async def imported(
    stub: Stub, caller: Caller, memories: Sequence[pb.Memory], size: int = 100, **resume: str
) -> pb.ImportMemoriesResponse:
    """Import memories, and return what became of each."""
    return await stub.ImportMemories(
        in_chunks(memories, size, request_id=resume.get("request_id", "")), metadata=bearer(caller)
    )


async def stored(owner: asyncpg.Connection, expected: int) -> None:
    """Wait until so many memories are stored."""
    await eventually(
        lambda: owner.fetchval("SELECT count(*) FROM memories"), lambda count: count == expected
    )


@asynccontextmanager
async def watching(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    cursor: str = "",
    *,
    include_memories: bool = False,
) -> AsyncIterator[Stream]:
    request = pb.WatchMemoriesRequest(cursor=cursor, include_memories=include_memories)
    stream = memories.WatchMemories(request, metadata=bearer(caller), timeout=60)
    try:
        yield stream
    finally:
        stream.cancel()


async def next_of(stream: Stream) -> pb.WatchMemoriesResponse:
    async with asyncio.timeout(30):
        response: Any = await stream.read()
    assert isinstance(response, pb.WatchMemoriesResponse)
    return response


async def to_the_end(stream: Any, found: list[Any]) -> None:
    """Read what is left into a list, until the stream ends."""
    # What marks the end of a stream is false.
    while response := await stream.read():
        found.append(response)


async def caught_up(stream: Stream) -> str:
    """Read the mark that nothing is left, and return its cursor."""
    response = await next_of(stream)
    assert response.HasField("caught_up"), response
    return response.cursor


async def changes(stream: Stream, count: int) -> list[pb.WatchMemoriesResponse]:
    """Read so many changes; the marks between them do not count."""
    found: list[pb.WatchMemoriesResponse] = []
    while len(found) < count:
        response = await next_of(stream)
        if response.HasField("change"):
            found.append(response)
    return found


async def export(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    tier: pb.Tier.ValueType = pb.TIER_UNSPECIFIED,
) -> tuple[list[pb.Memory], pb.ExportEnd]:
    """Return what an export holds, and its last word."""
    stream = memories.ExportMemories(pb.ExportMemoriesRequest(tier=tier), metadata=bearer(caller))
    *parts, last = [response async for response in stream]
    assert last.HasField("end")
    assert all(part.HasField("memory") for part in parts)
    return [part.memory for part in parts], last.end
