"""What members of a tenant show each other."""

from __future__ import annotations

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller
from server.database import Database
from tests.conftest import bearer, new_caller
from tests.deciding import withdraw, write_decision
from tests.memory.calls import Stub, archive, change, create
from tests.refusals import refusal_of


@pytest.fixture
async def colleague(caller: Caller, database: Database) -> Caller:
    """Another user of the caller's tenant."""
    other = Caller(caller.tenant_id, ids.new_id())
    await write_decision(database, other, "memory.store", granted=True)
    return other


async def shown(memories: Stub, caller: Caller, **fields: object) -> list[str]:
    request = pb.ListMemoriesRequest(shared=True, **fields)  # type: ignore[arg-type]
    page = await memories.ListMemories(request, metadata=bearer(caller))
    return [memory.content for memory in page.memories]


async def found(memories: Stub, caller: Caller, query: str, *, shared: bool) -> list[str]:
    request = pb.QueryMemoriesRequest(query=query, include_shared=shared)
    answer = await memories.QueryMemories(request, metadata=bearer(caller))
    return sorted(match.memory.content for match in answer.matches)


async def test_shared_turn_is_not_found_by_what_its_private_neighbours_say(
    memories: Stub, caller: Caller, colleague: Caller
) -> None:
    """Whoever sees one turn would otherwise learn, word by word, what stands around it."""
    for position, (content, scope) in enumerate(
        [
            ("the biopsy was benign", pb.SCOPE_PRIVATE),
            ("let us meet on Friday", pb.SCOPE_SHARED),
            ("the salary is a secret", pb.SCOPE_PRIVATE),
        ]
    ):
        await create(
            memories, colleague, content, scope=scope, session_id="call", session_position=position
        )
    for word in ("biopsy", "salary"):
        assert len(await found(memories, colleague, word, shared=False)) == 3
        assert await found(memories, caller, word, shared=True) == []
    assert await found(memories, caller, "Friday", shared=True) == ["let us meet on Friday"]


@pytest.mark.parametrize("scope", [pb.SCOPE_SHARED, pb.SCOPE_PUBLIC])
async def test_shared_memory_is_read_listed_and_found_by_others_of_the_tenant(
    memories: Stub, caller: Caller, colleague: Caller, scope: pb.Scope.ValueType
) -> None:
    memory = await create(memories, colleague, "the door code is 7", scope=scope)
    await create(memories, colleague, "the door squeaks")
    await create(memories, caller, "the door is red")
    read = await memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=bearer(caller))
    assert read.memory.content == "the door code is 7"
    assert read.memory.user_id == ids.show(ids.USER, colleague.user_id)
    assert await shown(memories, caller) == ["the door code is 7"]
    assert await shown(memories, colleague) == []
    assert await found(memories, caller, "door", shared=True) == [
        "the door code is 7",
        "the door is red",
    ]
    assert await found(memories, caller, "door", shared=False) == ["the door is red"]


async def test_other_tenants_see_nothing_of_it(
    memories: Stub, caller: Caller, database: Database
) -> None:
    memory = await create(memories, caller, "ours", scope=pb.SCOPE_PUBLIC)
    stranger = await new_caller(database)
    refusal = await refusal_of(
        memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=bearer(stranger))
    )
    assert refusal.code is grpc.StatusCode.NOT_FOUND
    assert await shown(memories, stranger) == []
    assert await found(memories, stranger, "ours", shared=True) == []


async def test_who_sees_a_memory_can_not_change_it(
    memories: Stub, caller: Caller, colleague: Caller
) -> None:
    memory = await create(memories, colleague, "look only", scope=pb.SCOPE_SHARED)
    for attempt in (
        memories.UpdateMemory(
            pb.UpdateMemoryRequest(
                memory=pb.Memory(id=memory.id, content="mine"),
                update_mask=FieldMask(paths=["content"]),
            ),
            metadata=bearer(caller),
        ),
        memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller)),
        memories.ArchiveMemory(pb.ArchiveMemoryRequest(id=memory.id), metadata=bearer(caller)),
        memories.GiveFeedback(
            pb.GiveFeedbackRequest(id=memory.id, rating=1), metadata=bearer(caller)
        ),
        memories.ListMemoryVersions(
            pb.ListMemoryVersionsRequest(id=memory.id), metadata=bearer(caller)
        ),
    ):
        assert (await refusal_of(attempt)).code is grpc.StatusCode.NOT_FOUND


async def test_memory_that_is_private_again_archived_or_without_consent_is_not_shown(
    memories: Stub, caller: Caller, colleague: Caller, database: Database
) -> None:
    hidden = await create(memories, colleague, "hidden code", scope=pb.SCOPE_SHARED)
    put_away = await create(memories, colleague, "archived code", scope=pb.SCOPE_SHARED)
    await create(memories, colleague, "withdrawn code", scope=pb.SCOPE_SHARED)
    await change(memories, colleague, hidden, scope=pb.SCOPE_PRIVATE)
    await archive(memories, colleague, put_away)
    assert await shown(memories, caller) == ["withdrawn code"]
    await withdraw(database, colleague)
    assert await shown(memories, caller) == []
    assert await found(memories, caller, "code", shared=True) == []
    for memory in (hidden, put_away):
        refusal = await refusal_of(
            memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=bearer(caller))
        )
        assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_shared_list_comes_in_pages_and_is_filtered(
    memories: Stub, caller: Caller, colleague: Caller
) -> None:
    for number in range(5):
        await create(
            memories, colleague, f"note {number}", scope=pb.SCOPE_SHARED, tags=[f"t{number % 2}"]
        )
    first = await memories.ListMemories(
        pb.ListMemoriesRequest(shared=True, page_size=3), metadata=bearer(caller)
    )
    rest = await memories.ListMemories(
        pb.ListMemoriesRequest(shared=True, page_size=3, page_token=first.next_page_token),
        metadata=bearer(caller),
    )
    contents = [memory.content for page in (first, rest) for memory in page.memories]
    assert contents == [f"note {n}" for n in (4, 3, 2, 1, 0)]
    assert await shown(memories, caller, tags=["t1"]) == ["note 3", "note 1"]
    other_list = pb.ListMemoriesRequest(page_token=first.next_page_token)
    refusal = await refusal_of(memories.ListMemories(other_list, metadata=bearer(caller)))
    assert refusal.reason == "PAGE_TOKEN_INVALID"


async def test_archived_memories_of_others_are_not_asked_for(
    memories: Stub, caller: Caller
) -> None:
    request = pb.ListMemoriesRequest(shared=True, state=pb.MEMORY_STATE_ARCHIVED)
    refusal = await refusal_of(memories.ListMemories(request, metadata=bearer(caller)))
    assert refusal.fields == ("state",)


async def test_statement_without_a_where_sees_others_only_where_they_are_shown(
    memories: Stub, caller: Caller, colleague: Caller, database: Database
) -> None:
    await create(memories, caller, "mine")
    await create(memories, colleague, "shared", scope=pb.SCOPE_SHARED)
    await create(memories, colleague, "private")
    stranger = await new_caller(database)
    await create(memories, stranger, "elsewhere", scope=pb.SCOPE_SHARED)
    async with database.transaction(caller) as connection:
        for place, seen in (("memories", ["mine"]), ("shown_memories", ["shared"])):
            rows = await connection.fetch(f"SELECT content FROM {place} ORDER BY content")
            assert [row["content"] for row in rows] == seen
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE shown_memories SET speaker = 'x'")
