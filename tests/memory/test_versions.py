"""What memories were before they changed."""

from __future__ import annotations

import asyncpg
import grpc
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from tests.conftest import FakeClock, bearer
from tests.memory.calls import Stub, archive, change, create, restore, versions
from tests.refusals import refusal_of


async def test_every_change_keeps_the_version_before_it(
    memories: Stub, caller: Caller, clock: FakeClock
) -> None:
    memory = await create(memories, caller, "first", tags=["a"], channels=["voice"])
    told = [memory]
    for fields in (
        {"content": "second"},
        {"tags": ["b"]},
        {"speaker": "Ann"},
        {"channels": ["email"]},
        {"scope": pb.SCOPE_SHARED},
        {"tier": pb.TIER_PERMANENT},
    ):
        clock.advance(minutes=1)
        told.append(await change(memories, caller, memory, **fields))
    told.append(await archive(memories, caller, memory))
    told.append(await restore(memories, caller, memory))
    kept = await versions(memories, caller, memory)
    assert [version.version for version in kept] == list(range(9, 0, -1))
    for version, then in zip(kept, reversed(told), strict=True):
        version.ClearField("delete_time")
        then.ClearField("delete_time")
        assert version == then


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
async def test_versions_come_in_pages(memories: Stub, caller: Caller, size: int) -> None:
    memory = await create(memories, caller, "text 1")
    for number in range(2, 5):
        await change(memories, caller, memory, content=f"text {number}")
    kept = await versions(memories, caller, memory, size)
    assert [version.content for version in kept] == ["text 4", "text 3", "text 2", "text 1"]


async def test_neighbours_of_a_changed_turn_have_no_new_version(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    turn = await create(memories, caller, "one", session_id="s", session_position=0)
    await create(memories, caller, "two", session_id="s", session_position=1)
    await change(memories, caller, turn, content="one again")
    assert await owner.fetchval("SELECT count(*) FROM memory_versions") == 1


async def test_versions_go_with_the_memory(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "canary before")
    await change(memories, caller, memory, content="canary after")
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))
    assert await owner.fetchval("SELECT count(*) FROM memory_versions") == 0
    refusal = await refusal_of(versions(memories, caller, memory))
    assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_token_of_another_memory_is_refused(memories: Stub, caller: Caller) -> None:
    one, other = [await create(memories, caller, text) for text in ("one", "other")]
    await change(memories, caller, one, content="more")
    request = pb.ListMemoryVersionsRequest(id=one.id, page_size=1)
    page = await memories.ListMemoryVersions(request, metadata=bearer(caller))
    wrong = pb.ListMemoryVersionsRequest(id=other.id, page_token=page.next_page_token)
    refusal = await refusal_of(memories.ListMemoryVersions(wrong, metadata=bearer(caller)))
    assert refusal.reason == "PAGE_TOKEN_INVALID"


async def test_moved_memory_keeps_its_id_and_is_in_one_tier(memories: Stub, caller: Caller) -> None:
    memory = await create(memories, caller, "to stay")
    moved = await change(memories, caller, memory, tier=pb.TIER_PERMANENT)
    assert (moved.id, moved.tier) == (memory.id, pb.TIER_PERMANENT)
    for tier, count in ((pb.TIER_LONG_TERM, 0), (pb.TIER_PERMANENT, 1)):
        page = await memories.ListMemories(
            pb.ListMemoriesRequest(tier=tier), metadata=bearer(caller)
        )
        assert len(page.memories) == count


async def test_durable_memory_does_not_become_short_term(memories: Stub, caller: Caller) -> None:
    memory = await create(memories, caller, "to stay")
    refusal = await refusal_of(change(memories, caller, memory, tier=pb.TIER_SHORT_TERM))
    assert refusal.fields == ("memory.tier",)
