"""What is changed is counted when it is committed, however its call ends, and once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import grpc
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server.billing.plans import Usage
from server.billing.store import BillingStore
from server.billing.toll import Toll
from server.blobs import Blobs
from server.cache import Redis
from server.caller import Caller
from server.database import SystemDatabase
from tests.conftest import bearer
from tests.memory.calls import Stub, change, create
from tests.memory.files import announce, complete, upload
from tests.memory.streams import TURNS, in_chunks, stored
from tests.refusals import refusal_of


@pytest.fixture
def billing(system_database: SystemDatabase) -> BillingStore:
    return BillingStore(system_database)


@pytest.fixture
def gate(redis: Redis, billing: BillingStore) -> Toll:
    """Counts, and writes down what it counted only when a test asks."""
    return Toll(redis, billing)


async def used(gate: Toll, billing: BillingStore, caller: Caller) -> Usage:
    await gate.flush()
    months = await billing.used(caller)
    return months[0].used if months else Usage()


async def test_a_batch_counts_what_it_holds_and_a_retry_of_it_nothing(
    memories: Stub, gate: Toll, billing: BillingStore, caller: Caller
) -> None:
    request = pb.BatchCreateMemoriesRequest(
        memories=[pb.Memory(content=f"thing {n}") for n in range(30)], request_id="once"
    )
    for _ in range(2):
        await memories.BatchCreateMemories(request, metadata=bearer(caller))
    expected = Usage(writes=30, bytes=request.ByteSize())
    assert await used(gate, billing, caller) == expected


@pytest.mark.parametrize("tier", [pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM])
async def test_every_change_of_a_memory_counts_and_reading_and_refusals_do_not(
    memories: Stub, gate: Toll, billing: BillingStore, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    memory = await create(memories, caller, "what is said", tier=tier)
    await create(memories, caller, "what is said", tier=tier)
    await change(memories, caller, memory, content="what was meant")
    await memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=bearer(caller))
    await refusal_of(create(memories, caller, "", tier=tier))
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))
    refusal = await refusal_of(
        memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))
    )
    assert refusal.reason == "RESOURCE_NOT_FOUND"
    assert (await used(gate, billing, caller)).writes == 4


async def test_queries_count_when_they_are_answered(
    memories: Stub, gate: Toll, billing: BillingStore, caller: Caller
) -> None:
    await memories.QueryMemories(pb.QueryMemoriesRequest(query="tea"), metadata=bearer(caller))
    refused = pb.QueryMemoriesRequest(query="tea", top_k=-1)
    await refusal_of(memories.QueryMemories(refused, metadata=bearer(caller)))
    assert await used(gate, billing, caller) == Usage(queries=1)


async def test_a_meditation_is_one_job_however_often_it_is_asked_for(
    memories: Stub, gate: Toll, billing: BillingStore, caller: Caller
) -> None:
    for _ in range(3):
        await memories.Meditate(pb.MeditateRequest(), metadata=bearer(caller))
    assert await used(gate, billing, caller) == Usage(jobs=1)


async def test_an_import_counts_what_it_created(
    memories: Stub, gate: Toll, billing: BillingStore, caller: Caller
) -> None:
    for _ in range(2):
        await memories.ImportMemories(in_chunks(TURNS, 100), metadata=bearer(caller))
    size = sum([request.ByteSize() async for request in in_chunks(TURNS, 100)])
    assert await used(gate, billing, caller) == Usage(writes=250, bytes=size)


async def test_an_import_that_its_client_gives_up_counts_what_is_kept_of_it(
    memories: Stub, gate: Toll, billing: BillingStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    never = asyncio.Event()

    async def two_chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
        async for request in in_chunks(TURNS[:200], 100):
            yield request
        await never.wait()

    call = memories.ImportMemories(two_chunks(), metadata=bearer(caller))
    await stored(owner, 200)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    size = sum([request.ByteSize() async for request in in_chunks(TURNS[:200], 100)])
    assert await used(gate, billing, caller) == Usage(writes=200, bytes=size)


async def test_an_import_that_is_refused_at_last_counts_what_is_kept_of_it(
    memories: Stub, gate: Toll, billing: BillingStore, caller: Caller
) -> None:
    async def then_rubbish() -> AsyncIterator[pb.ImportMemoriesRequest]:
        async for request in in_chunks(TURNS[:200], 100):
            yield request
        yield pb.ImportMemoriesRequest(first_index=-1)

    refusal = await refusal_of(memories.ImportMemories(then_rubbish(), metadata=bearer(caller)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await used(gate, billing, caller)).writes == 200


async def test_a_file_counts_with_its_bytes_once_it_is_complete(
    memories: Stub, gate: Toll, billing: BillingStore, caller: Caller, blobs: Blobs
) -> None:
    await blobs.keep_versions()
    data = b"a file" * 10_000
    announced = await announce(memories, caller, data)
    await upload(announced, data)
    before = await used(gate, billing, caller)
    assert before.bytes < len(data)
    for _ in range(2):
        await complete(memories, caller, announced)
    after = await used(gate, billing, caller)
    assert after.writes == before.writes + 1
    assert len(data) < after.bytes - before.bytes < len(data) + 200
