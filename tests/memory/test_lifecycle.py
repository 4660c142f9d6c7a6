"""Archived, restored, protected, rated."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from server.database import Database
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import write_settings
from tests.memory.calls import Stub, archive, create, restore
from tests.refusals import refusal_of


async def found(memories: Stub, caller: Caller, query: str) -> list[str]:
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query=query), metadata=bearer(caller)
    )
    return [match.memory.content for match in answer.matches]


async def listed(
    memories: Stub, caller: Caller, state: pb.MemoryState.ValueType = pb.MEMORY_STATE_ACTIVE
) -> list[str]:
    page = await memories.ListMemories(pb.ListMemoriesRequest(state=state), metadata=bearer(caller))
    return [memory.content for memory in page.memories]


async def test_archived_memory_is_found_by_no_query_and_listed_apart(
    memories: Stub, caller: Caller
) -> None:
    memory = await create(memories, caller, "Ann plays the oboe")
    archived = await archive(memories, caller, memory)
    assert archived.state == pb.MEMORY_STATE_ARCHIVED
    assert archived.version == 2
    assert await found(memories, caller, "oboe") == []
    assert await listed(memories, caller) == []
    assert await listed(memories, caller, pb.MEMORY_STATE_ARCHIVED) == ["Ann plays the oboe"]
    read = await memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=bearer(caller))
    assert read.memory == archived


async def test_archived_memory_can_be_restored_for_thirty_days_or_as_the_user_chose(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    first = await archive(memories, caller, await create(memories, caller, "one"))
    assert lasts(first) == dt.timedelta(days=30)
    await write_settings(owner, caller, archive_grace_days=7)
    second = await archive(memories, caller, await create(memories, caller, "two"))
    assert lasts(second) == dt.timedelta(days=7)


def lasts(archived: pb.Memory) -> dt.timedelta:
    return archived.delete_time.ToDatetime() - archived.archive_time.ToDatetime()


async def test_restored_memory_is_found_again(memories: Stub, caller: Caller) -> None:
    memory = await archive(memories, caller, await create(memories, caller, "a red kite"))
    restored = await restore(memories, caller, memory, memory.etag)
    assert restored.state == pb.MEMORY_STATE_ACTIVE
    assert not restored.HasField("archive_time")
    assert not restored.HasField("delete_time")
    assert restored.version == 3
    assert await found(memories, caller, "kite") == ["a red kite"]


async def test_neighbours_of_an_archived_turn_lose_its_words_until_it_is_restored(
    memories: Stub, caller: Caller
) -> None:
    turn = await create(memories, caller, "the heron", session_id="s", session_position=0)
    await create(memories, caller, "who?", session_id="s", session_position=1)
    assert sorted(await found(memories, caller, "heron")) == ["the heron", "who?"]
    await archive(memories, caller, turn)
    assert await found(memories, caller, "heron") == []
    await restore(memories, caller, turn)
    assert sorted(await found(memories, caller, "heron")) == ["the heron", "who?"]


async def test_turn_told_beside_an_archived_one_does_not_take_its_words(
    memories: Stub, caller: Caller
) -> None:
    turn = await create(memories, caller, "the heron", session_id="s", session_position=0)
    await archive(memories, caller, turn)
    await create(memories, caller, "who?", session_id="s", session_position=1)
    assert await found(memories, caller, "heron") == []


async def test_states_repeat_without_a_new_version(memories: Stub, caller: Caller) -> None:
    memory = await create(memories, caller, "once")
    assert (await restore(memories, caller, memory)).version == 1
    archived = await archive(memories, caller, memory)
    assert await archive(memories, caller, memory) == archived


async def test_archived_memory_is_not_changed(memories: Stub, caller: Caller) -> None:
    memory = await archive(memories, caller, await create(memories, caller, "still"))
    request = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, content="moved"), update_mask=FieldMask(paths=["content"])
    )
    refusal = await refusal_of(memories.UpdateMemory(request, metadata=bearer(caller)))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "STATE_CONFLICT",
    )


async def test_words_of_an_archived_memory_can_be_kept_again_but_not_both(
    memories: Stub, caller: Caller
) -> None:
    first = await archive(memories, caller, await create(memories, caller, "twice"))
    second = await create(memories, caller, "twice")
    assert second.id != first.id
    refusal = await refusal_of(restore(memories, caller, first))
    assert refusal.code is grpc.StatusCode.ALREADY_EXISTS
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=second.id), metadata=bearer(caller))
    assert (await restore(memories, caller, first)).state == pb.MEMORY_STATE_ACTIVE


async def test_memory_deleted_with_grace_is_archived_until_then(
    memories: Stub, caller: Caller, clock: FakeClock
) -> None:
    memory = await create(memories, caller, "for a while")
    request = pb.DeleteMemoryRequest(id=memory.id, grace=Duration(seconds=3600))
    answer = await memories.DeleteMemory(request, metadata=bearer(caller))
    assert answer.memory.state == pb.MEMORY_STATE_ARCHIVED
    due = answer.memory.delete_time.ToDatetime(tzinfo=dt.UTC)
    assert due == clock.now + dt.timedelta(hours=1)
    assert (await restore(memories, caller, memory)).state == pb.MEMORY_STATE_ACTIVE


@pytest.mark.parametrize("seconds", [-1, 366 * 86_400, 10**13])
async def test_grace_that_cannot_be_is_refused(
    memories: Stub, caller: Caller, seconds: int
) -> None:
    memory = await create(memories, caller, "x")
    request = pb.DeleteMemoryRequest(id=memory.id, grace=Duration(seconds=seconds))
    refusal = await refusal_of(memories.DeleteMemory(request, metadata=bearer(caller)))
    assert refusal.fields == ("grace",)


async def test_protection_is_a_version_and_can_be_lifted(memories: Stub, caller: Caller) -> None:
    memory = await create(memories, caller, "keep", protected=True)
    assert memory.protected
    request = pb.ProtectMemoryRequest(id=memory.id, protected=False, etag=memory.etag)
    lifted = (await memories.ProtectMemory(request, metadata=bearer(caller))).memory
    assert (lifted.protected, lifted.version) == (False, 2)


@pytest.mark.parametrize(
    ("opinion", "value"),
    [({"thumbs_up": True}, 0.8), ({"thumbs_down": True}, 0.2), ({"rating": 3}, 0.6)],
)
async def test_feedback_is_kept(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    opinion: dict[str, Any],
    value: float,
) -> None:
    memory = await create(memories, caller, "rated")
    request = pb.GiveFeedbackRequest(id=memory.id, useful=True, **opinion)
    rated = (await memories.GiveFeedback(request, metadata=bearer(caller))).memory
    assert rated.feedback == pytest.approx(value)
    assert rated.version == memory.version
    assert await owner.fetchval("SELECT useful_count FROM memory_scores") == 1


async def test_usefulness_alone_leaves_the_opinion(memories: Stub, caller: Caller) -> None:
    memory = await create(memories, caller, "rated")
    for request in (
        pb.GiveFeedbackRequest(id=memory.id, rating=1),
        pb.GiveFeedbackRequest(id=memory.id, useful=True),
    ):
        rated = (await memories.GiveFeedback(request, metadata=bearer(caller))).memory
        assert rated.feedback == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("opinion", "field"),
    [
        ({}, "opinion"),
        ({"thumbs_up": False}, "thumbs_up"),
        ({"rating": 0}, "rating"),
        ({"rating": 6}, "rating"),
    ],
)
async def test_feedback_that_says_nothing_is_refused(
    memories: Stub, caller: Caller, opinion: dict[str, Any], field: str
) -> None:
    memory = await create(memories, caller, "rated")
    request = pb.GiveFeedbackRequest(id=memory.id, **opinion)
    refusal = await refusal_of(memories.GiveFeedback(request, metadata=bearer(caller)))
    assert refusal.fields == (field,)


CALLS: dict[str, Callable[[Stub, str, Caller], Awaitable[Any]]] = {
    "archive": lambda stub, memory_id, caller: stub.ArchiveMemory(
        pb.ArchiveMemoryRequest(id=memory_id), metadata=bearer(caller)
    ),
    "restore": lambda stub, memory_id, caller: stub.RestoreMemory(
        pb.RestoreMemoryRequest(id=memory_id), metadata=bearer(caller)
    ),
    "protect": lambda stub, memory_id, caller: stub.ProtectMemory(
        pb.ProtectMemoryRequest(id=memory_id, protected=True), metadata=bearer(caller)
    ),
    "feedback": lambda stub, memory_id, caller: stub.GiveFeedback(
        pb.GiveFeedbackRequest(id=memory_id, rating=5), metadata=bearer(caller)
    ),
    "delete later": lambda stub, memory_id, caller: stub.DeleteMemory(
        pb.DeleteMemoryRequest(id=memory_id, grace=Duration(seconds=60)), metadata=bearer(caller)
    ),
    "versions": lambda stub, memory_id, caller: stub.ListMemoryVersions(
        pb.ListMemoryVersionsRequest(id=memory_id), metadata=bearer(caller)
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_memory_of_someone_else_is_not_there(
    memories: Stub,
    caller: Caller,
    database: Database,
    call: Callable[[Stub, str, Caller], Awaitable[Any]],
) -> None:
    memory = await create(memories, caller, "mine")
    stranger = await new_caller(database)
    refusal = await refusal_of(call(memories, memory.id, stranger))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
    read = await memories.GetMemory(pb.GetMemoryRequest(id=memory.id), metadata=bearer(caller))
    assert read.memory == memory


async def test_withdrawn_consent_still_lets_go_but_brings_nothing_back(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "let go")
    await owner.execute("UPDATE consents SET granted = false")
    await archive(memories, caller, memory)
    for call in ("restore", "protect", "feedback"):
        refusal = await refusal_of(CALLS[call](memories, memory.id, caller))
        assert refusal.reason == "CONSENT_MISSING"
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))


async def test_neighbours_change_and_are_archived_at_once_without_a_deadlock(
    memories: Stub, caller: Caller
) -> None:
    turns = [
        await create(memories, caller, f"turn {n}", session_id="s", session_position=n)
        for n in range(6)
    ]

    async def stir(turn: pb.Memory, number: int) -> None:
        metadata = bearer(caller)
        for step in range(4):
            changed = pb.Memory(id=turn.id, content=f"turn {number} told {step}")
            await memories.UpdateMemory(
                pb.UpdateMemoryRequest(memory=changed, update_mask=FieldMask(paths=["content"])),
                metadata=metadata,
            )
            await memories.GiveFeedback(
                pb.GiveFeedbackRequest(id=turn.id, rating=4), metadata=metadata
            )
            await memories.ArchiveMemory(pb.ArchiveMemoryRequest(id=turn.id), metadata=metadata)
            await memories.RestoreMemory(pb.RestoreMemoryRequest(id=turn.id), metadata=metadata)

    await asyncio.gather(*(stir(turn, number) for number, turn in enumerate(turns)))
    assert sorted(await listed(memories, caller)) == [f"turn {n} told 3" for n in range(6)]
