"""Changing and removing memories."""

from __future__ import annotations

import asyncio

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from tests.conftest import bearer
from tests.memory.calls import create
from tests.refusals import refusal_of

TIERS = [pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM, pb.TIER_PERMANENT]


def change(memory: pb.Memory, **fields: object) -> pb.UpdateMemoryRequest:
    changed = pb.Memory(id=memory.id, etag=memory.etag, **fields)  # type: ignore[arg-type]
    return pb.UpdateMemoryRequest(memory=changed, update_mask=FieldMask(paths=list(fields)))


@pytest.mark.parametrize("tier", TIERS)
async def test_update_changes_the_named_fields_only(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    memory = await create(memories, caller, "Ann likes tea", tier=tier)
    request = change(memory, tags=["drinks"])
    request.memory.content = "not named in the mask"
    changed = (await memories.UpdateMemory(request, metadata=bearer(caller))).memory
    assert (changed.content, list(changed.tags)) == ("Ann likes tea", ["drinks"])
    assert (changed.version, changed.etag) == (2, "v2")
    assert changed.size_bytes == memory.size_bytes + len("drinks")


@pytest.mark.parametrize("tier", TIERS)
async def test_stale_etag_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    memory = await create(memories, caller, "one", tier=tier)
    await memories.UpdateMemory(change(memory, content="two"), metadata=bearer(caller))
    for etag in (memory.etag, "nonsense", "v", "v-1", "v" + "9" * 40):
        request = change(memory, content="three")
        request.memory.etag = etag
        refusal = await refusal_of(memories.UpdateMemory(request, metadata=bearer(caller)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")


@pytest.mark.parametrize("tier", TIERS)
async def test_fifty_updates_with_one_etag_have_one_winner(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    memory = await create(memories, caller, "start", tier=tier)
    answers = await asyncio.gather(
        *(
            memories.UpdateMemory(change(memory, content=f"text {n}"), metadata=bearer(caller))
            for n in range(50)
        ),
        return_exceptions=True,
    )
    winners = [a for a in answers if isinstance(a, pb.UpdateMemoryResponse)]
    losers = [a for a in answers if isinstance(a, grpc.aio.AioRpcError)]
    assert len(winners) == 1
    assert {loser.code() for loser in losers} == {grpc.StatusCode.ABORTED}
    read = await memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=bearer(caller))
    assert read.memory == winners[0].memory


@pytest.mark.parametrize("tier", TIERS)
async def test_update_to_the_text_of_another_memory_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    await create(memories, caller, "taken", tier=tier)
    memory = await create(memories, caller, "free", tier=tier)
    refusal = await refusal_of(
        memories.UpdateMemory(change(memory, content="taken"), metadata=bearer(caller))
    )
    assert refusal.code is grpc.StatusCode.ALREADY_EXISTS


async def test_changed_text_forgets_the_sentiment_of_the_old_one(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "I hate it")
    await owner.execute("UPDATE memory_scores SET sentiment = 0.1")
    changed = (
        await memories.UpdateMemory(change(memory, tags=["t"]), metadata=bearer(caller))
    ).memory
    assert await owner.fetchval("SELECT sentiment FROM memory_scores") is not None
    await memories.UpdateMemory(change(changed, content="I love it"), metadata=bearer(caller))
    assert await owner.fetchval("SELECT sentiment FROM memory_scores") is None


@pytest.mark.parametrize("tier", TIERS)
async def test_deleted_memory_is_gone(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    owner: asyncpg.Connection,
    tier: pb.Tier.ValueType,
) -> None:
    memory = await create(memories, caller, "ephemeral", tier=tier)
    metadata = bearer(caller)
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=metadata)
    for call in (
        memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=metadata),
        memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=metadata),
        memories.UpdateMemory(change(memory, content="x"), metadata=metadata),
    ):
        assert (await refusal_of(call)).code is grpc.StatusCode.NOT_FOUND
    found = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="ephemeral"), metadata=metadata
    )
    listed = await memories.ListMemories(pb.ListMemoriesRequest(), metadata=metadata)
    assert not found.matches
    assert not listed.memories
    assert await owner.fetchval("SELECT count(*) FROM memory_scores") == 0


async def test_ten_deletions_at_once_are_one(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "ephemeral")
    request = pb.DeleteMemoryRequest(id=memory.id)
    answers = await asyncio.gather(
        *(memories.DeleteMemory(request, metadata=bearer(caller)) for _ in range(10)),
        return_exceptions=True,
    )
    refused = [a.code() for a in answers if isinstance(a, grpc.aio.AioRpcError)]
    assert refused == [grpc.StatusCode.NOT_FOUND] * 9
    events = await owner.fetchval(
        "SELECT count(*) FROM audit_events WHERE action = 'memory.delete'"
    )
    assert events == 1


@pytest.mark.parametrize("tier", TIERS)
async def test_text_of_a_deleted_memory_can_be_kept_again(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    first = await create(memories, caller, "again", tier=tier)
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=first.id), metadata=bearer(caller))
    second = await create(memories, caller, "again", tier=tier)
    assert second.id != first.id
