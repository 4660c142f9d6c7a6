"""What time does to memories."""

from __future__ import annotations

import datetime as dt

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from server.database import Database, SystemDatabase
from server.memory.retention_store import REQUESTS_KNOWN, RetentionStore
from tests.conftest import FakeClock, as_worker, bearer, new_caller
from tests.deciding import write_settings
from tests.memory.calls import Stub, archive, create, restore
from workers.housekeeping import SWEEP_MEMORIES, Housekeeping
from workers.stream import Task


@pytest.fixture
def retention(system_database: SystemDatabase) -> RetentionStore:
    return RetentionStore(system_database)


async def delete_later(memories: Stub, caller: Caller, memory: pb.Memory, seconds: int) -> None:
    request = pb.DeleteMemoryRequest(id=memory.id, grace=Duration(seconds=seconds))
    await memories.DeleteMemory(request, metadata=bearer(caller))


async def keep_for(owner: asyncpg.Connection, caller: Caller, days: int) -> None:
    """Let a user choose that what is unseen for so many days is archived."""
    await write_settings(owner, caller, long_term_days=days)


async def kept(owner: asyncpg.Connection) -> dict[str, bool]:
    """Return the contents of all memories, and whether each is active."""
    rows = await owner.fetch("SELECT content, archived_at IS NULL AS active FROM memories")
    return {row["content"]: row["active"] for row in rows}


async def test_memory_goes_for_good_when_its_grace_period_is_over(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    retention: RetentionStore,
    clock: FakeClock,
) -> None:
    for number, name in enumerate(["soon", "later", "back"], start=1):
        await delete_later(memories, caller, await create(memories, caller, name), number * 60)
    await create(memories, caller, "active")
    back = (
        await memories.ListMemories(
            pb.ListMemoriesRequest(state=pb.MEMORY_STATE_ARCHIVED), metadata=bearer(caller)
        )
    ).memories[0]
    await restore(memories, caller, back)
    assert await retention.delete_due(clock.now, 10) == 0
    clock.advance(seconds=60)
    assert await retention.delete_due(clock.now, 10) == 1
    assert await kept(owner) == {"later": False, "back": True, "active": True}
    clock.advance(hours=1)
    assert await retention.delete_due(clock.now, 10) == 1
    assert await kept(owner) == {"back": True, "active": True}


async def test_what_is_due_of_many_users_goes_in_pages_and_usage_follows(
    memories: Stub,
    database: Database,
    owner: asyncpg.Connection,
    retention: RetentionStore,
    clock: FakeClock,
) -> None:
    for _ in range(3):
        caller = await new_caller(database)
        for number in range(3):
            memory = await create(memories, caller, f"text {number}")
            await delete_later(memories, caller, memory, 1)
    clock.advance(seconds=2)
    assert [await retention.delete_due(clock.now, 4) for _ in range(4)] == [4, 4, 1, 0]
    usage = await owner.fetch("SELECT archived_bytes, archived_count FROM memory_usage")
    assert [tuple(row) for row in usage] == [(0, 0)] * 3


async def test_deletion_by_time_is_audited_as_the_systems_own(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    retention: RetentionStore,
    clock: FakeClock,
) -> None:
    memory = await create(memories, caller, "due")
    await delete_later(memories, caller, memory, 1)
    clock.advance(seconds=2)
    await retention.delete_due(clock.now, 10)
    event = await owner.fetchrow(
        "SELECT actor, user_id, resource FROM audit_events WHERE action = 'memory.delete'"
    )
    assert tuple(event) == ("system", caller.user_id, memory.id)


async def test_objects_of_attachments_are_doomed_with_their_memory(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    retention: RetentionStore,
    clock: FakeClock,
) -> None:
    memory = await create(memories, caller, "with a file")
    request = pb.CreateAttachmentRequest(
        memory_id=memory.id,
        file_name="a.txt",
        content_type="text/plain",
        size_bytes=1,
        sha256="00" * 32,
    )
    await memories.CreateAttachment(request, metadata=bearer(caller))
    await delete_later(memories, caller, memory, 1)
    clock.advance(seconds=2)
    await retention.delete_due(clock.now, 10)
    assert await owner.fetchval("SELECT count(*) FROM attachments") == 0
    assert await owner.fetchval("SELECT count(*) FROM doomed_objects") == 1


async def test_unseen_long_term_memories_are_archived_as_the_user_chose(
    memories: Stub,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
    retention: RetentionStore,
    clock: FakeClock,
) -> None:
    await keep_for(owner, caller, 30)
    other = await new_caller(database)
    await create(memories, other, "of someone who never chose")
    await create(memories, caller, "unseen")
    await create(memories, caller, "seen again")
    await create(memories, caller, "protected", protected=True)
    await create(memories, caller, "permanent", tier=pb.TIER_PERMANENT)
    await restore(
        memories, caller, await archive(memories, caller, await create(memories, caller, "back"))
    )
    clock.advance(days=20)
    await create(memories, caller, "seen again")
    assert await retention.archive_unseen(clock.now, 10) == 0
    clock.advance(days=11)
    assert await retention.archive_unseen(clock.now, 10) == 1
    assert await retention.archive_unseen(clock.now, 10) == 0
    archived = [content for content, active in (await kept(owner)).items() if not active]
    assert archived == ["unseen"]
    due = await owner.fetchval("SELECT delete_after FROM memories WHERE archived_at IS NOT NULL")
    assert due == clock.now + dt.timedelta(days=30)


async def test_neighbours_of_unseen_turns_lose_their_words(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    retention: RetentionStore,
    clock: FakeClock,
) -> None:
    await keep_for(owner, caller, 1)
    await create(memories, caller, "the heron", session_id="s", session_position=0)
    clock.advance(days=2)
    await create(memories, caller, "who?", session_id="s", session_position=1)
    assert await retention.archive_unseen(clock.now, 10) == 1
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="heron"), metadata=bearer(caller)
    )
    assert not answer.matches


async def test_request_ids_are_known_for_a_week(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    retention: RetentionStore,
) -> None:
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="once"), request_id="r")
    await memories.CreateMemory(request, metadata=bearer(caller))
    made_at = await owner.fetchval("SELECT created_at FROM requests")
    assert await retention.forget_requests(made_at + REQUESTS_KNOWN) == 0
    assert await retention.forget_requests(made_at + REQUESTS_KNOWN * 1.01) == 1


async def test_sweeping_job_archives_and_deletes_page_by_page(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    clock: FakeClock,
    maintenance_channel: grpc.aio.Channel,
) -> None:
    await keep_for(owner, caller, 1)
    for number in range(5):
        await create(memories, caller, f"unseen {number}")
        memory = await create(memories, caller, f"due {number}", protected=True)
        await delete_later(memories, caller, memory, 1)
    clock.advance(days=2)
    housekeeping = Housekeeping(maintenance_channel, metadata=as_worker(), page_size=2)
    result = await housekeeping.sweep_memories(Task("job_1", 1, SWEEP_MEMORIES, {}, 1))
    assert result == {"archived": 5, "deleted": 5}
    assert list((await kept(owner)).values()) == [False] * 5
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await Housekeeping(maintenance_channel, metadata=bearer(caller)).sweep_memories(
            Task("job_1", 1, SWEEP_MEMORIES, {}, 1)
        )
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
