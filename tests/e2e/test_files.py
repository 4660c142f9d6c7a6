"""Files beside memories and conversations: announced through the edge, carried past it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb

from tests.e2e.test_both_transports import announcement, keep, refusal_of
from tests.mesh import User
from tests.transports import Transport

PART = 16 * 1024 * 1024


@pytest_asyncio.fixture
async def s3() -> AsyncIterator[httpx.AsyncClient]:
    """Goes where URLs lead, with no token."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        yield client


async def attach(call: Transport, s3: httpx.AsyncClient, memory: pb.Memory, data: bytes) -> str:
    """Upload a file and return its id."""
    announced = await call(announcement(memory, data))
    (await s3.put(announced.upload_url, content=data)).raise_for_status()
    await call(pb.CompleteAttachmentRequest(id=announced.attachment.id))
    attachment_id: str = announced.attachment.id
    return attachment_id


# --- attachments -------------------------------------------------------------------------------


async def test_attachments_are_listed_page_by_page(call: Transport, s3: httpx.AsyncClient) -> None:
    memory = await keep(call, "notes of the boat trip")
    await attach(call, s3, await keep(call, "of something else"), b"other")
    files = [await attach(call, s3, memory, b"file %d" % number) for number in range(3)]
    seen: list[str] = []
    token = ""
    while not seen or token:
        request = pb.ListAttachmentsRequest(memory_id=memory.id, page_size=2, page_token=token)
        page = await call(request)
        seen += [each.id for each in page.attachments]
        token = page.next_page_token
    assert seen == files[::-1]


async def test_a_deleted_attachment_is_gone_with_its_bytes(
    call: Transport, s3: httpx.AsyncClient
) -> None:
    memory = await keep(call, "notes of the boat trip")
    kept, gone = [await attach(call, s3, memory, data) for data in (b"kept", b"gone")]
    url = (await call(pb.GetAttachmentRequest(id=gone))).download_url
    assert (await s3.get(url)).content == b"gone"
    await call(pb.DeleteAttachmentRequest(id=gone))
    assert (await s3.get(url)).status_code == httpx.codes.NOT_FOUND
    for request in (pb.GetAttachmentRequest(id=gone), pb.DeleteAttachmentRequest(id=gone)):
        assert (await refusal_of(call, request)).code is grpc.StatusCode.NOT_FOUND
    page = await call(pb.ListAttachmentsRequest(memory_id=memory.id))
    assert [each.id for each in page.attachments] == [kept]


async def test_a_large_file_goes_up_in_parts_that_come_in_any_order(
    user: User, s3: httpx.AsyncClient
) -> None:
    data = os.urandom(PART) + b"and a little more"
    memory = await keep(user.rest, "a film of the boat trip")
    announced = await user.rest(announcement(memory, data))
    assert announced.upload_url == ""
    assert [part.size_bytes for part in announced.parts] == [PART, len(data) - PART]

    async def put(part: pb.UploadPart) -> None:
        start = (part.number - 1) * PART
        piece = data[start : start + part.size_bytes]
        (await s3.put(part.upload_url, content=piece)).raise_for_status()

    complete = pb.CompleteAttachmentRequest(id=announced.attachment.id)
    await put(announced.parts[1])
    assert (await refusal_of(user.grpc, complete)).reason == "UPLOAD_MISMATCH"
    again = await user.grpc(announcement(memory, data))
    await asyncio.gather(*map(put, again.parts))
    done = await user.rest(pb.CompleteAttachmentRequest(id=again.attachment.id))
    assert done.attachment.state == pb.ATTACHMENT_STATE_COMPLETE
    shown = await user.grpc(pb.GetAttachmentRequest(id=again.attachment.id))
    down = (await s3.get(shown.download_url)).content
    assert hashlib.sha256(down).hexdigest() == shown.attachment.sha256


# --- transcripts -------------------------------------------------------------------------------


async def test_a_transcript_is_written_read_and_deleted(
    call: Transport, s3: httpx.AsyncClient
) -> None:
    name = "ann@example.com: Boat? #1 100%"
    said = ["Where did you buy the kayak?", "In Hamburg."]
    turns = [pb.SessionTurn(content=text, speaker="Ann") for text in said]
    await call(pb.AppendToSessionRequest(session_id=name, turns=turns))
    request = pb.GetTranscriptRequest(session_id=name)
    assert (await refusal_of(call, request)).code is grpc.StatusCode.NOT_FOUND
    await call(pb.EndSessionRequest(session_id=name, write_transcript=True))
    shown = await call(request)
    assert (shown.transcript.session_id, shown.transcript.turns) == (name, 2)
    written = (await s3.get(shown.download_url)).content
    assert hashlib.sha256(written).hexdigest() == shown.transcript.sha256
    assert [json.loads(line)["content"] for line in written.splitlines()] == said
    await call(pb.DeleteTranscriptRequest(session_id=name))
    assert (await refusal_of(call, request)).code is grpc.StatusCode.NOT_FOUND
    assert (await s3.get(shown.download_url)).status_code == httpx.codes.NOT_FOUND
