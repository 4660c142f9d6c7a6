"""Watching changes: in order, resumable, bounded, and for as long as the user agrees."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

import server
from server import audit, ids
from server.access import Scope
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.memory.change_store import KINDS, Cursor
from server.memory.watching import STREAMS, WAITING, Feed, cursor_to
from tests.conftest import bearer, new_caller
from tests.deciding import withdraw
from tests.faults.reach import until
from tests.memory.calls import create
from tests.memory.streams import caught_up, changes, next_of, to_the_end, watching
from tests.refusals import refusal_of

NO_CHANGES = {"memory.agent_access", "memory.embed", "memory.export", "memory.store"}
"""Words about memories that the watchers need not hear: consents, vectors, and who reads."""


@pytest.mark.parametrize("tier", [pb.TIER_LONG_TERM, pb.TIER_SHORT_TERM])
async def test_every_change_is_told_in_order_with_the_memory_as_it_is_now(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier.ValueType
) -> None:
    metadata = bearer(caller)
    async with watching(memories, caller, include_memories=True) as stream:
        await caught_up(stream)
        one = await create(memories, caller, "one", tier=tier)
        (created,) = await changes(stream, 1)
        one.content = "uno"
        await memories.UpdateMemory(
            pb.UpdateMemoryRequest(memory=one, update_mask=FieldMask(paths=["content"])),
            metadata=metadata,
        )
        (updated,) = await changes(stream, 1)
        await create(memories, caller, "uno", tier=tier)
        (seen,) = await changes(stream, 1)
        await memories.DeleteMemory(pb.DeleteMemoryRequest(id=one.id), metadata=metadata)
        (deleted,) = await changes(stream, 1)
    told = [response.change for response in (created, updated, seen, deleted)]
    assert [change.kind for change in told] == [
        pb.CHANGE_KIND_CREATED,
        pb.CHANGE_KIND_UPDATED,
        pb.CHANGE_KIND_UPDATED,
        pb.CHANGE_KIND_DELETED,
    ]
    assert {change.memory_id for change in told} == {one.id}
    assert [change.memory.content for change in told] == ["one", "uno", "uno", ""]
    assert told[2].memory.use_count == 1
    assert not told[3].HasField("memory")


async def test_what_is_put_away_and_brought_back_is_told_so(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    metadata = bearer(caller)
    one = await create(memories, caller, "one")
    async with watching(memories, caller) as stream:
        await caught_up(stream)
        await memories.ArchiveMemory(pb.ArchiveMemoryRequest(id=one.id), metadata=metadata)
        await memories.RestoreMemory(pb.RestoreMemoryRequest(id=one.id), metadata=metadata)
        await memories.ProtectMemory(
            pb.ProtectMemoryRequest(id=one.id, protected=True), metadata=metadata
        )
        told = [response.change.kind for response in await changes(stream, 3)]
    assert told == [pb.CHANGE_KIND_ARCHIVED, pb.CHANGE_KIND_RESTORED, pb.CHANGE_KIND_UPDATED]


async def test_a_watch_goes_on_behind_its_cursor_and_misses_nothing(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    async with watching(memories, caller) as stream:
        start = await caught_up(stream)
    kept = [(await create(memories, caller, str(number))).id for number in range(5)]
    async with watching(memories, caller, start) as stream:
        missed = await changes(stream, 5)
    assert [response.change.memory_id for response in missed] == kept
    async with watching(memories, caller, missed[2].cursor) as stream:
        rest = await changes(stream, 2)
        await caught_up(stream)
    assert [response.change.memory_id for response in rest] == kept[3:]


async def test_a_change_waits_for_those_that_may_still_come_before_it(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    early = ids.show(ids.MEMORY, ids.new_id())
    async with watching(memories, caller) as stream:
        await caught_up(stream)
        async with database.transaction(caller) as connection:
            await audit.record(connection, caller, "memory.update", early)
            late = await create(memories, caller, "committed first")
            # A mark that all has been told comes and does not tell of what is committed.
            assert await caught_up(stream)
        told = [response.change.memory_id for response in await changes(stream, 2)]
    assert told == [early, late.id]


async def test_nobody_hears_of_another_users_memories(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    other = await new_caller(database)
    async with watching(memories, caller) as mine, watching(memories, other) as theirs:
        await caught_up(mine)
        await caught_up(theirs)
        secret = await create(memories, other, "secret")
        own = await create(memories, caller, "own")
        (told,) = await changes(mine, 1)
        (heard,) = await changes(theirs, 1)
    assert told.change.memory_id == own.id
    assert heard.change.memory_id == secret.id


async def test_silence_is_broken_by_marks_whose_cursor_moves_on(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    other = await new_caller(database)
    async with watching(memories, caller) as stream:
        first = await caught_up(stream)
        await create(memories, other, "elsewhere")
        marks = {await caught_up(stream) for _ in range(3)}
    assert marks != {first}


async def test_a_reader_that_takes_nothing_is_cut_and_can_go_on(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, feed: Feed
) -> None:
    count = 2 * WAITING
    texts = [f"{number} {'x' * 4500}" for number in range(count)]

    async def chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
        for start in range(0, count, 500):
            kept = [
                pb.Memory(content=text, tier=pb.TIER_PERMANENT)
                for text in texts[start : start + 500]
            ]
            yield pb.ImportMemoriesRequest(first_index=start, memories=kept)

    async def is_cut() -> bool:
        return not feed._watches

    patience_seconds, feed._patience_seconds = feed._patience_seconds, 0.3
    async with watching(memories, caller, include_memories=True) as stream:
        start = await caught_up(stream)
        await memories.ImportMemories(chunks(), metadata=bearer(caller))
        await until(is_cut, 30)
        told: list[pb.WatchMemoriesResponse] = []

        refusal = await refusal_of(to_the_end(stream, told))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "READER_TOO_SLOW",
    )
    heard = [response.change for response in told if response.HasField("change")]
    before = [change.memory.content for change in heard]
    assert before == texts[: len(before)], "what was sent before the cut is in order"
    last = told[-1].cursor if told else start
    feed._patience_seconds = patience_seconds
    async with watching(memories, caller, last, include_memories=True) as stream:
        after = [
            response.change.memory.content
            for response in await changes(stream, count - len(before))
        ]
        await caught_up(stream)
    assert before + after == texts


async def test_who_withdraws_consent_is_told_nothing_more(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    async with watching(memories, caller) as stream:
        await caught_up(stream)
        await withdraw(database, caller)
        refusal = await refusal_of(to_the_end(stream, []))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "CONSENT_MISSING",
    )
    async with watching(memories, caller) as again:
        assert (await refusal_of(next_of(again))).reason == "CONSENT_MISSING"


def damaged(cursor: str) -> str:
    return ("B" if cursor[0] == "A" else "A") + cursor[1:-2] + "xx"


@pytest.mark.parametrize("spoil", [damaged, lambda _: "rubbish", lambda _: "é", lambda c: c[:-12]])
async def test_a_cursor_that_is_none_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, spoil: Callable[[str], str]
) -> None:
    async with watching(memories, caller) as stream:
        cursor = await caught_up(stream)
    async with watching(memories, caller, spoil(cursor)) as stream:
        refusal = await refusal_of(next_of(stream))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("cursor",))


async def test_another_users_cursor_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    async with watching(memories, caller) as stream:
        cursor = await caught_up(stream)
    async with watching(memories, await new_caller(database), cursor) as stream:
        assert (await refusal_of(next_of(stream))).fields == ("cursor",)


async def test_a_cursor_from_beyond_the_end_of_the_log_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    # As a database that was put back to an earlier day would be asked.
    beyond = cursor_to(Cursor(1 << 40), caller)
    async with watching(memories, caller, beyond) as stream:
        assert (await refusal_of(next_of(stream))).fields == ("cursor",)


@pytest.mark.parametrize("session_seconds", [0.5])
async def test_an_old_stream_ends_in_good_order(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    async with watching(memories, caller) as stream:
        responses = [response async for response in stream]
        assert await stream.code() is grpc.StatusCode.OK
    assert responses[-1].end.reason == pb.WATCH_END_REASON_AGE
    late = await create(memories, caller, "late")
    async with watching(memories, caller, responses[-1].cursor) as stream:
        (told,) = await changes(stream, 1)
    assert told.change.memory_id == late.id


async def test_a_server_that_stops_says_so(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, feed: Feed
) -> None:
    async with watching(memories, caller) as stream:
        await caught_up(stream)
        feed.drain()
        rest: list[pb.WatchMemoriesResponse] = []
        await to_the_end(stream, rest)
        last = rest[-1]
        assert await stream.code() is grpc.StatusCode.OK
    assert last.end.reason == pb.WATCH_END_REASON_DRAIN
    assert last.cursor
    async with watching(memories, caller) as stream:
        assert (await next_of(stream)).end.reason == pb.WATCH_END_REASON_DRAIN


async def test_one_user_cannot_take_all_streams(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    request = pb.WatchMemoriesRequest()
    open_ones = [memories.WatchMemories(request, metadata=bearer(caller)) for _ in range(STREAMS)]
    try:
        for stream in open_ones:
            await caught_up(stream)
        async with watching(memories, caller) as stream:
            refusal = await refusal_of(next_of(stream))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUOTA_EXCEEDED",
        )
        async with watching(memories, await new_caller(database)) as stream:
            await caught_up(stream)
    finally:
        for stream in open_ones:
            stream.cancel()


async def test_without_the_log_nobody_is_left_waiting(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, system_database: SystemDatabase
) -> None:
    async with watching(memories, caller) as stream:
        await caught_up(stream)
        await system_database._pool.close()
        refusal = await refusal_of(to_the_end(stream, []))
    assert refusal.code is grpc.StatusCode.UNAVAILABLE


def test_every_word_of_the_audit_log_about_memories_is_a_change_or_known_not_to_be() -> None:
    sources = Path(server.__file__).parent.rglob("*.py")
    words = {
        word
        for path in sources
        for word in re.findall(r"""["'](memory\.[a-z_]+)["']""", path.read_text())
    }
    fields = {f"memory.{name}" for name in pb.Memory.DESCRIPTOR.fields_by_name}
    # One of them is a field, too; and scopes of tokens look alike.
    assert words - (fields - KINDS.keys()) - {*Scope} == KINDS.keys() | NO_CHANGES
