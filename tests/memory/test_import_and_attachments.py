"""Bulk import, and files beside memories."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import asyncpg
import grpc
import httpx
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from tests.conftest import bearer, new_caller
from tests.memory.test_update_and_delete import create
from tests.refusals import refusal_of

TURNS = [
    pb.Memory(content=f"turn {n}", session_id="talk", session_position=n, speaker="Ann")
    for n in range(250)
]


async def in_chunks(
    memories: list[pb.Memory], size: int
) -> AsyncIterator[pb.ImportMemoriesRequest]:
    for start in range(0, len(memories), size):
        yield pb.ImportMemoriesRequest(first_index=start, memories=memories[start : start + size])


async def test_import_keeps_every_turn_once_however_often_it_is_sent(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    metadata = bearer(caller)
    first = await memories.ImportMemories(in_chunks(TURNS, 100), metadata=metadata)
    again = await memories.ImportMemories(in_chunks(TURNS, 70), metadata=metadata)
    assert (first.created, first.existing, first.refused) == (250, 0, 0)
    assert (again.created, again.existing, again.refused) == (0, 250, 0)
    assert await owner.fetchval("SELECT count(*) FROM memories") == 250
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 250
    page = await memories.ListMemories(
        pb.ListMemoriesRequest(page_size=3, session_id="talk"), metadata=metadata
    )
    assert [memory.session_position for memory in page.memories] == [249, 248, 247]
    assert page.memories[0].source == pb.SOURCE_IMPORT


async def test_import_tells_what_it_refused_and_keeps_the_rest(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    mixed = [
        pb.Memory(content="good", tags=["a", "b"]),
        pb.Memory(content=""),
        pb.Memory(content="fleeting", tier=pb.TIER_SHORT_TERM),
        pb.Memory(content="good", tags=["a", "b"]),
    ]
    outcome = await memories.ImportMemories(in_chunks(mixed, 2), metadata=bearer(caller))
    assert (outcome.created, outcome.existing, outcome.refused) == (1, 1, 2)
    assert [(refusal.index, refusal.field) for refusal in outcome.refusals] == [
        (1, "memories[1].content"),
        (2, "memories[0].tier"),
    ]
    page = await memories.ListMemories(pb.ListMemoriesRequest(), metadata=bearer(caller))
    assert [list(memory.tags) for memory in page.memories] == [["a", "b"]]


async def test_import_without_consent_or_in_giant_chunks_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    stranger = await new_caller(database, consenting=False)
    no = await refusal_of(memories.ImportMemories(in_chunks(TURNS, 50), metadata=bearer(stranger)))
    assert no.reason == "CONSENT_MISSING"
    giant = [pb.Memory(content=str(n)) for n in range(1001)]
    big = await refusal_of(memories.ImportMemories(in_chunks(giant, 1001), metadata=bearer(caller)))
    assert big.fields == ("memories",)


async def announce(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, data: bytes
) -> pb.CreateAttachmentResponse:
    memory = await create(memories, caller, "with a file")
    return await memories.CreateAttachment(
        pb.CreateAttachmentRequest(
            memory_id=memory.id,
            file_name='../"e\u0301vil".txt',
            content_type="text/plain",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        ),
        metadata=bearer(caller),
    )


async def test_attachment_travels_by_presigned_urls(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    data = b"hello " * 1000
    announced = await announce(memories, caller, data)
    metadata = bearer(caller)
    pending = pb.GetAttachmentRequest(id=announced.attachment.id)
    assert (await memories.GetAttachment(pending, metadata=metadata)).download_url == ""
    async with httpx.AsyncClient(trust_env=False) as http:
        (await http.put(announced.upload_url, content=data)).raise_for_status()
        done = await memories.CompleteAttachment(
            pb.CompleteAttachmentRequest(id=announced.attachment.id), metadata=metadata
        )
        assert done.attachment.state == pb.ATTACHMENT_STATE_COMPLETE
        url = (await memories.GetAttachment(pending, metadata=metadata)).download_url
        downloaded = await http.get(url)
        assert downloaded.content == data
        assert downloaded.headers["content-disposition"].startswith("attachment;")
        await memories.DeleteMemory(
            pb.DeleteMemoryRequest(id=announced.attachment.memory_id), metadata=metadata
        )
        assert (await http.get(url)).status_code == httpx.codes.NOT_FOUND
    gone = await refusal_of(memories.GetAttachment(pending, metadata=metadata))
    assert gone.code is grpc.StatusCode.NOT_FOUND


async def test_upload_that_is_not_the_announced_one_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    announced = await announce(memories, caller, b"expected")
    request = pb.CompleteAttachmentRequest(id=announced.attachment.id)
    async with httpx.AsyncClient(trust_env=False) as http:
        for wrong in (None, b"ExpecteD", b"expected and more", b""):
            if wrong is not None:
                (await http.put(announced.upload_url, content=wrong)).raise_for_status()
            refusal = await refusal_of(
                memories.CompleteAttachment(request, metadata=bearer(caller))
            )
            assert refusal.reason == "UPLOAD_MISMATCH"


async def test_attachment_of_a_foreign_or_short_term_memory_is_not_found(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    stranger = await new_caller(database)
    foreign = await create(memories, caller, "mine")
    fleeting = await create(memories, caller, "soon gone", pb.TIER_SHORT_TERM)
    for user, memory in ((stranger, foreign), (caller, fleeting)):
        request = pb.CreateAttachmentRequest(
            memory_id=memory.id,
            file_name="f",
            content_type="t",
            size_bytes=1,
            sha256="0" * 64,
        )
        refusal = await refusal_of(memories.CreateAttachment(request, metadata=bearer(user)))
        assert refusal.code is grpc.StatusCode.NOT_FOUND
