"""Transcripts of conversations: written once, served by URL, replaced and deleted for good."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.blobs import Blobs
from server.caller import Caller
from server.database import Database
from server.errors import ConsentMissing, StoreUnavailable
from server.memory.objects import DoomedObjects, Kind, ObjectName
from server.memory.transcripts import Transcript, Transcripts, Turn
from tests.conftest import FakeClock, bearer, new_caller
from tests.memory.conftest import URL_LIFETIME
from tests.memory.files import BrokenBlobs, left_of
from tests.refusals import refusal_of

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
TURNS = [
    Turn(position=n, speaker="Ann", content=f'line {n}\n"quoted" é', occurred_at=NOON)
    for n in range(3)
]


@pytest.fixture
def blobs(blobs: Blobs) -> BrokenBlobs:
    """The bucket of this test run, which breaks when a test says so."""
    return BrokenBlobs.of(blobs)


@pytest_asyncio.fixture
async def transcripts(database: Database, blobs: Blobs) -> Transcripts:
    await blobs.keep_versions()
    return Transcripts(database, blobs, DoomedObjects(database, blobs), URL_LIFETIME)


def key_of(caller: Caller, transcript: Transcript) -> str:
    return ObjectName(Kind.TRANSCRIPT, caller, transcript.id).key


async def read(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, session_id: str
) -> tuple[pb.Transcript, bytes]:
    answer = await memories.GetTranscript(
        pb.GetTranscriptRequest(session_id=session_id), metadata=bearer(caller)
    )
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        return answer.transcript, (await http.get(answer.download_url)).content


async def test_transcript_is_a_file_with_a_line_for_each_turn(
    memories: rpc.MemoryServiceAsyncStub,
    transcripts: Transcripts,
    caller: Caller,
    clock: FakeClock,
) -> None:
    await transcripts.write(caller, "talk", iter(TURNS), clock())
    shown, data = await read(memories, caller, "talk")
    assert (shown.session_id, shown.turns, shown.size_bytes) == ("talk", 3, len(data))
    lines = [json.loads(line) for line in data.splitlines()]
    assert lines[2] == {
        "position": 2,
        "speaker": "Ann",
        "content": 'line 2\n"quoted" é',
        "occurTime": "2026-05-04T12:00:00+00:00",
    }
    assert [line["position"] for line in lines] == [0, 1, 2]


async def test_writing_again_replaces_and_the_same_turns_write_nothing(
    memories: rpc.MemoryServiceAsyncStub,
    transcripts: Transcripts,
    caller: Caller,
    blobs: Blobs,
    clock: FakeClock,
) -> None:
    first = await transcripts.write(caller, "talk", TURNS, clock())
    assert await transcripts.write(caller, "talk", TURNS, clock()) == first
    assert len(await left_of(blobs, key_of(caller, first))) == 1
    second = await transcripts.write(caller, "talk", TURNS[:1], clock())
    assert await left_of(blobs, key_of(caller, first)) == []
    assert (await read(memories, caller, "talk"))[0].turns == 1
    assert second.id != first.id


async def test_one_of_two_that_are_written_at_once_stands(
    memories: rpc.MemoryServiceAsyncStub,
    transcripts: Transcripts,
    caller: Caller,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    await asyncio.gather(
        *(transcripts.write(caller, "talk", TURNS[: n + 1], clock()) for n in range(3))
    )
    shown, data = await read(memories, caller, "talk")
    assert len(data.splitlines()) == shown.turns
    assert await owner.fetchval("SELECT count(*) FROM transcripts") == 1


async def test_killed_between_object_and_row_it_is_written_by_the_next_attempt(
    memories: rpc.MemoryServiceAsyncStub,
    transcripts: Transcripts,
    caller: Caller,
    blobs: BrokenBlobs,
    clock: FakeClock,
) -> None:
    blobs.lost = "put"
    with pytest.raises(StoreUnavailable):
        await transcripts.write(caller, "talk", TURNS, clock())
    missing = await refusal_of(read(memories, caller, "talk"))
    assert missing.code is grpc.StatusCode.NOT_FOUND
    await transcripts.write(caller, "talk", TURNS, clock())
    assert (await read(memories, caller, "talk"))[0].turns == 3


async def test_replaced_object_is_not_forgotten_when_s3_is_silent(
    transcripts: Transcripts,
    caller: Caller,
    blobs: BrokenBlobs,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    first = await transcripts.write(caller, "talk", TURNS, clock())
    blobs.refused = "erase"
    await transcripts.write(caller, "talk", TURNS[:1], clock())
    doomed = await owner.fetch("SELECT object_key FROM doomed_objects")
    assert [row["object_key"] for row in doomed] == [key_of(caller, first)]


async def test_deleted_transcript_leaves_nothing(
    memories: rpc.MemoryServiceAsyncStub,
    transcripts: Transcripts,
    caller: Caller,
    blobs: Blobs,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    written = await transcripts.write(caller, "talk", TURNS, clock())
    request = pb.DeleteTranscriptRequest(session_id="talk")
    await memories.DeleteTranscript(request, metadata=bearer(caller))
    assert await left_of(blobs, key_of(caller, written)) == []
    gone = await refusal_of(memories.DeleteTranscript(request, metadata=bearer(caller)))
    assert gone.code is grpc.StatusCode.NOT_FOUND
    actions = await owner.fetch("SELECT action FROM audit_events ORDER BY id")
    assert [row["action"] for row in actions] == ["transcript.create", "transcript.delete"]
    assert await owner.fetchval("SELECT count(*) FROM doomed_objects") == 0


async def test_transcript_is_its_users_alone_and_needs_consent(
    memories: rpc.MemoryServiceAsyncStub,
    transcripts: Transcripts,
    caller: Caller,
    database: Database,
    clock: FakeClock,
) -> None:
    await transcripts.write(caller, "talk", TURNS, clock())
    stranger = await new_caller(database, consenting=False)
    foreign = await refusal_of(read(memories, stranger, "talk"))
    assert foreign.code is grpc.StatusCode.NOT_FOUND
    with pytest.raises(ConsentMissing):
        await transcripts.write(stranger, "talk", TURNS, clock())
    for wrong in ("", "x" * 129):
        refusal = await refusal_of(read(memories, caller, wrong))
        assert refusal.fields == ("session_id",)
