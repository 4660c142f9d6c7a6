"""Creating memories, in Postgres and in Redis."""

from __future__ import annotations

import asyncio

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from tests.conftest import bearer, new_caller

TIERS = [pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM, pb.TIER_PERMANENT]


@pytest.mark.parametrize("tier", TIERS)
async def test_created_memory_can_be_read_back(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    draft = pb.Memory(content="Ann likes tea", tier=tier, tags=["b", "a"], speaker="Ann")
    created = await memories.CreateMemory(
        pb.CreateMemoryRequest(memory=draft), metadata=bearer(caller)
    )
    read = await memories.GetMemory(
        pb.GetMemoryRequest(id=created.memory.id), metadata=bearer(caller)
    )
    assert created.created
    assert read.memory == created.memory
    assert (read.memory.content, list(read.memory.tags)) == ("Ann likes tea", ["a", "b"])
    assert read.memory.size_bytes == len("Ann likes tea") + 2
    assert read.memory.HasField("expire_time") == (tier == pb.TIER_SHORT_TERM)


@pytest.mark.parametrize("tier", TIERS)
async def test_fifty_identical_creates_at_once_store_one_memory(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="same", tier=tier))
    answers = await asyncio.gather(
        *(memories.CreateMemory(request, metadata=bearer(caller)) for _ in range(50))
    )
    assert len({answer.memory.id for answer in answers}) == 1
    assert sum(answer.created for answer in answers) == 1


@pytest.mark.parametrize("tier", TIERS)
async def test_request_id_makes_a_retry_safe(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="once", tier=tier), request_id="r1")
    first = await memories.CreateMemory(request, metadata=bearer(caller))
    again = await memories.CreateMemory(request, metadata=bearer(caller))
    assert again.memory == first.memory
    assert not again.created


async def test_request_id_of_other_contents_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="one"), request_id="r1")
    await memories.CreateMemory(request, metadata=bearer(caller))
    request.memory.content = "two"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await memories.CreateMemory(request, metadata=bearer(caller))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("tier", TIERS)
async def test_write_without_consent_is_refused(
    memories: rpc.MemoryServiceAsyncStub, database: Database, tier: pb.Tier.ValueType
) -> None:
    stranger = await new_caller(database, consenting=False)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await memories.CreateMemory(
            pb.CreateMemoryRequest(memory=pb.Memory(content="x", tier=tier)),
            metadata=bearer(stranger),
        )
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "memory.store" in (refused.value.details() or "")


@pytest.mark.parametrize("tier", TIERS)
async def test_every_write_leaves_an_audit_event_without_text(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    owner: asyncpg.Connection,
    tier: pb.Tier.ValueType,
) -> None:
    metadata = bearer(caller)
    memory = (
        await memories.CreateMemory(
            pb.CreateMemoryRequest(memory=pb.Memory(content="zebra", tier=tier)), metadata=metadata
        )
    ).memory
    change = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, content="zebras"), update_mask=FieldMask(paths=["content"])
    )
    await memories.UpdateMemory(change, metadata=metadata)
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=metadata)
    events = await owner.fetch("SELECT * FROM audit_events ORDER BY id")
    assert [(event["action"], event["resource"]) for event in events] == [
        ("memory.create", memory.id),
        ("memory.update", memory.id),
        ("memory.delete", memory.id),
    ]
    assert "zebra" not in str(events)
