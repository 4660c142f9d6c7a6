"""Exporting everything: in order, complete or visibly not, and noted."""

from __future__ import annotations

import hashlib
from typing import Any

import asyncpg
import grpc
import pytest
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from tests.conftest import bearer, new_caller
from tests.deciding import withdraw
from tests.memory.calls import create
from tests.memory.streams import changes, export, to_the_end, watching
from tests.refusals import refusal_of

ALL_TIERS = (pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM, pb.TIER_PERMANENT)


async def test_an_export_holds_every_tier_in_order_and_says_what_it_was(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    kept = [
        await create(memories, caller, f"{number}", tier=ALL_TIERS[number % 3])
        for number in range(250)
    ]
    exported, end = await export(memories, caller)
    assert exported == kept
    lines = "".join(f"{memory.id} {memory.content_hash}\n" for memory in exported)
    assert (end.count, end.sha256) == (250, hashlib.sha256(lines.encode()).hexdigest())


async def test_archived_memories_are_exported_too(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    one = await create(memories, caller, "one")
    await memories.ArchiveMemory(pb.ArchiveMemoryRequest(id=one.id), metadata=bearer(caller))
    exported, _ = await export(memories, caller)
    assert [(memory.id, memory.HasField("archive_time")) for memory in exported] == [(one.id, True)]


@pytest.mark.parametrize("tier", ALL_TIERS)
async def test_one_tier_can_be_exported_alone(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    for each in ALL_TIERS:
        await create(memories, caller, "text", tier=each)
    exported, end = await export(memories, caller, tier)
    assert [memory.tier for memory in exported] == [tier]
    assert end.count == 1


async def test_an_export_of_nothing_is_complete(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    await create(memories, await new_caller(database), "somebody else's")
    exported, end = await export(memories, caller)
    assert (exported, end.count, end.sha256) == ([], 0, hashlib.sha256().hexdigest())


async def test_what_is_stored_after_the_start_is_left_out_and_found_by_watching(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    kept = [await create(memories, caller, f"{number} {'x' * 20_000}") for number in range(60)]
    stream = memories.ExportMemories(pb.ExportMemoriesRequest(), metadata=bearer(caller))
    first = await stream.read()
    assert isinstance(first, pb.ExportMemoriesResponse)
    late = await create(memories, caller, "late")
    parts: list[pb.ExportMemoriesResponse] = []
    await to_the_end(stream, parts)
    last = parts.pop()
    assert [first.memory, *(part.memory for part in parts)] == kept
    async with watching(memories, caller, last.end.cursor) as watch:
        (told,) = await changes(watch, 1)
    assert told.change.memory_id == late.id


async def test_an_export_that_is_cut_has_no_end(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    for number in range(120):
        await create(memories, caller, f"{number} {'x' * 10_000}")
    stream = memories.ExportMemories(pb.ExportMemoriesRequest(), metadata=bearer(caller))
    parts: list[Any] = [await stream.read() for _ in range(3)]
    await database._pool.close()

    refusal = await refusal_of(to_the_end(stream, parts))
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    assert not any(part.HasField("end") for part in parts)


async def test_an_export_is_in_the_audit_log_and_needs_no_consent(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    one = await create(memories, caller, "one")
    await withdraw(database, caller)
    exported, _ = await export(memories, caller)
    assert exported == [one]
    told = await owner.fetchrow(
        "SELECT user_id, resource FROM audit_events WHERE action = 'memory.export'"
    )
    assert told["user_id"] == caller.user_id
    assert told["resource"] == f"usr_{caller.user_id.hex}"


async def test_an_unknown_tier_is_refused_and_nothing_noted(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    stream = memories.ExportMemories(pb.ExportMemoriesRequest(tier=99), metadata=bearer(caller))  # type: ignore[arg-type]
    refusal = await refusal_of(stream.read())
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("tier",))
    assert not await owner.fetchval("SELECT count(*) FROM audit_events")


async def test_readers_who_go_away_hold_no_connection(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    for number in range(110):
        await create(memories, caller, f"{number} {'x' * 15_000}")
    request, metadata = pb.ExportMemoriesRequest(), bearer(caller)
    streams = [memories.ExportMemories(request, metadata=metadata) for _ in range(15)]
    for stream in streams:  # more of them than the pool has connections, and none reads on
        await stream.read()
    await create(memories, caller, "in between")
    for stream in streams:
        stream.cancel()
