"""Files beside memories: announced, uploaded past us, checked, served, deleted for good."""

from __future__ import annotations

import asyncio
import hashlib
import resource
import time

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
from server.memory.attachments import part_sizes
from tests.conftest import bearer, new_caller
from tests.deciding import withdraw
from tests.memory.calls import create
from tests.memory.files import (
    DATA,
    LARGE,
    PART,
    BrokenBlobs,
    Gate,
    announce,
    attach,
    complete,
    download,
    key_of,
    left_of,
    upload,
)
from tests.refusals import refusal_of

ACTIONS = "SELECT action FROM audit_events WHERE resource = $1 ORDER BY id"


@pytest.fixture
def blobs(blobs: Blobs) -> BrokenBlobs:
    """The bucket of this test run, which breaks when a test says so."""
    return BrokenBlobs.of(blobs)


@pytest_asyncio.fixture(autouse=True)
async def versions_kept(blobs: Blobs) -> None:
    await blobs.keep_versions()


async def test_attachment_travels_by_presigned_urls(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    announced = await announce(memories, caller, DATA)
    metadata = bearer(caller)
    request = pb.GetAttachmentRequest(id=announced.attachment.id)
    assert (await memories.GetAttachment(request, metadata=metadata)).download_url == ""
    await upload(announced, DATA)
    done = await complete(memories, caller, announced)
    assert done.state == pb.ATTACHMENT_STATE_COMPLETE
    url = (await memories.GetAttachment(request, metadata=metadata)).download_url
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        downloaded = await http.get(url)
        assert downloaded.content == DATA
        assert downloaded.headers["content-disposition"].startswith("attachment;")
        await memories.DeleteMemory(
            pb.DeleteMemoryRequest(id=announced.attachment.memory_id), metadata=metadata
        )
        assert (await http.get(url)).status_code == httpx.codes.NOT_FOUND
    gone = await refusal_of(memories.GetAttachment(request, metadata=metadata))
    assert gone.code is grpc.StatusCode.NOT_FOUND


async def test_object_that_is_not_the_announced_one_is_refused_and_removed(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: Blobs
) -> None:
    announced = await announce(memories, caller, DATA)
    key = key_of(caller, announced.attachment)
    nothing = await refusal_of(complete(memories, caller, announced))
    assert nothing.reason == "UPLOAD_MISMATCH"
    # As if the server had not kept the URL's bounds: with the key of the bucket itself.
    for wrong in (DATA[::-1], DATA * 100, DATA[:-1], b""):
        await blobs.put(key, wrong, "text/plain")
        refusal = await refusal_of(complete(memories, caller, announced))
        assert refusal.reason == "UPLOAD_MISMATCH"
        assert await left_of(blobs, key) == []
    await upload(announced, DATA)
    assert (await complete(memories, caller, announced)).state == pb.ATTACHMENT_STATE_COMPLETE


async def test_what_was_checked_is_served_whatever_comes_later(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: Blobs
) -> None:
    attachment = await attach(memories, caller, DATA)
    await blobs.put(key_of(caller, attachment), b"something else", "text/plain")
    assert await download(memories, caller, attachment) == DATA


async def test_completing_again_and_at_the_same_time_changes_nothing(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    for data in (DATA, LARGE):
        announced = await announce(memories, caller, data)
        await upload(announced, data)
        answers = [complete(memories, caller, announced) for _ in range(4)]
        done = {each.SerializeToString() for each in await asyncio.gather(*answers)}
        done.add((await complete(memories, caller, announced)).SerializeToString())
        assert len(done) == 1
        actions = await owner.fetch(ACTIONS, announced.attachment.id)
        assert [row["action"] for row in actions] == ["attachment.create", "attachment.complete"]


async def test_parts_that_go_because_they_became_an_object_are_not_missing(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: BrokenBlobs
) -> None:
    announced = await announce(memories, caller, LARGE)
    await upload(announced, LARGE)
    blobs.drops_parts = True
    refusal = await refusal_of(complete(memories, caller, announced))
    assert refusal.message.endswith(": 1, 2")
    blobs.drops_parts, blobs.lost = False, "complete_upload"
    await refusal_of(complete(memories, caller, announced))
    blobs.drops_parts = True
    done = await complete(memories, caller, announced)
    assert done.state == pb.ATTACHMENT_STATE_COMPLETE


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (1, [1]),
        (PART, [PART]),
        (PART + 1, [PART, 1]),
        (2 * PART, [PART, PART]),
        (100 * 1024 * 1024, [PART] * 6 + [4 * 1024 * 1024]),
    ],
)
def test_parts_are_full_but_for_the_last(size: int, sizes: list[int]) -> None:
    assert list(part_sizes(size)) == sizes


async def test_large_file_is_uploaded_in_parts(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: Blobs
) -> None:
    announced = await announce(memories, caller, LARGE)
    assert announced.upload_url == ""
    assert [(part.number, part.size_bytes) for part in announced.parts] == [(1, PART), (2, 17)]
    first, second = announced.parts
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        (await http.put(second.upload_url, content=LARGE[PART:])).raise_for_status()
        refusal = await refusal_of(complete(memories, caller, announced))
        assert refusal.reason == "UPLOAD_MISMATCH"
        assert refusal.message.endswith(": 1")
        assert (await http.put(first.upload_url, content=LARGE[:-1])).status_code == 403
        (await http.put(first.upload_url, content=LARGE[:PART])).raise_for_status()
    done = await complete(memories, caller, announced)
    assert done.state == pb.ATTACHMENT_STATE_COMPLETE
    assert await download(memories, caller, done) == LARGE
    assert len(await left_of(blobs, key_of(caller, done))) == 1


async def test_large_file_with_other_bytes_is_refused_and_removed(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: Blobs
) -> None:
    announced = await announce(memories, caller, LARGE)
    await upload(announced, LARGE[::-1])
    for _ in range(2):
        refusal = await refusal_of(complete(memories, caller, announced))
        assert refusal.reason == "UPLOAD_MISMATCH"
        assert await left_of(blobs, key_of(caller, announced.attachment)) == []


@pytest.mark.alone
async def test_largest_file_is_checked_within_a_deadline_and_in_little_memory(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    data = LARGE[:PART] * 6 + LARGE[: 4 * 1024 * 1024]
    announced = await announce(memories, caller, data)
    await upload(announced, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    await complete(memories, caller, announced)
    assert time.perf_counter() - began < 10
    # In KiB. The file has 100 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16 * 1024
    await memories.DeleteAttachment(
        pb.DeleteAttachmentRequest(id=announced.attachment.id), metadata=bearer(caller)
    )


async def test_upload_is_finished_after_a_crash_between_object_and_commit(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: BrokenBlobs
) -> None:
    announced = await announce(memories, caller, LARGE)
    await upload(announced, LARGE)
    blobs.lost = "complete_upload"
    refusal = await refusal_of(complete(memories, caller, announced))
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    request = pb.GetAttachmentRequest(id=announced.attachment.id)
    pending = await memories.GetAttachment(request, metadata=bearer(caller))
    assert (pending.attachment.state, pending.download_url) == (pb.ATTACHMENT_STATE_PENDING, "")
    done = await complete(memories, caller, announced)
    assert await download(memories, caller, done) == LARGE


async def test_announcement_is_finished_after_a_crash_within_it(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    blobs: BrokenBlobs,
    owner: asyncpg.Connection,
) -> None:
    memory = await create(memories, caller, "with a file")
    for method in ("lost", "refused"):
        setattr(blobs, method, "begin_upload")
        refusal = await refusal_of(
            announce(memories, caller, LARGE, memory_id=memory.id, request_id="r")
        )
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        blobs.refused = ""
    announced = await announce(memories, caller, LARGE, memory_id=memory.id, request_id="r")
    await upload(announced, LARGE)
    await complete(memories, caller, announced)
    assert await owner.fetchval("SELECT count(*) FROM attachments") == 1


async def test_announcing_again_under_a_request_id_makes_nothing_new(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection, blobs: Blobs
) -> None:
    memory = await create(memories, caller, "with a file")
    for data in (DATA, LARGE):
        request_id = str(len(data))
        both = await asyncio.gather(
            *(
                announce(memories, caller, data, memory_id=memory.id, request_id=request_id)
                for _ in range(2)
            )
        )
        assert len({each.attachment.id for each in both}) == 1
        again = await announce(memories, caller, data, memory_id=memory.id, request_id=request_id)
        for announced in (*both, again):
            await upload(announced, data)
        done = await complete(memories, caller, again)
        over = await announce(memories, caller, data, memory_id=memory.id, request_id=request_id)
        assert (over.attachment, over.upload_url, list(over.parts)) == (done, "", [])
        assert not over.HasField("upload_expire_time")
        assert not [each for each in await blobs.unfinished() if each.key == key_of(caller, done)]
        reused = await refusal_of(
            announce(memories, caller, data + b"x", memory_id=memory.id, request_id=request_id)
        )
        assert reused.reason == "REQUEST_ID_REUSED"
    assert await owner.fetchval("SELECT count(*) FROM attachments") == 2


async def test_deleting_leaves_no_version_of_the_object(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    blobs: Blobs,
    owner: asyncpg.Connection,
) -> None:
    kept = await attach(memories, caller, b"kept")
    deleted = await attach(memories, caller, DATA)
    await blobs.put(key_of(caller, deleted), b"another version", "text/plain")
    request = pb.DeleteAttachmentRequest(id=deleted.id)
    await memories.DeleteAttachment(request, metadata=bearer(caller))
    assert await left_of(blobs, key_of(caller, deleted)) == []
    assert await download(memories, caller, kept) == b"kept"
    gone = await refusal_of(memories.DeleteAttachment(request, metadata=bearer(caller)))
    assert gone.code is grpc.StatusCode.NOT_FOUND
    actions = [row["action"] for row in await owner.fetch(ACTIONS, deleted.id)]
    assert actions[-1] == "attachment.delete"
    assert await owner.fetchval("SELECT count(*) FROM doomed_objects") == 0


async def test_deleting_a_pending_attachment_gives_its_upload_up(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: Blobs
) -> None:
    announced = await announce(memories, caller, LARGE)
    key = key_of(caller, announced.attachment)
    assert len(await left_of(blobs, key)) == 1
    await memories.DeleteAttachment(
        pb.DeleteAttachmentRequest(id=announced.attachment.id), metadata=bearer(caller)
    )
    assert await left_of(blobs, key) == []
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        late = await http.put(announced.parts[1].upload_url, content=LARGE[PART:])
    assert late.status_code == 404


async def test_deletion_is_not_lost_when_s3_is_silent(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    blobs: BrokenBlobs,
    owner: asyncpg.Connection,
) -> None:
    attachment = await attach(memories, caller, DATA)
    blobs.refused = "erase"
    await memories.DeleteAttachment(
        pb.DeleteAttachmentRequest(id=attachment.id), metadata=bearer(caller)
    )
    doomed = await owner.fetchrow("SELECT object_key, user_id FROM doomed_objects")
    assert doomed is not None
    assert (doomed["object_key"], doomed["user_id"]) == (
        key_of(caller, attachment),
        caller.user_id,
    )


async def test_what_is_deleted_while_it_completes_leaves_nothing(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: BrokenBlobs
) -> None:
    announced = await announce(memories, caller, LARGE)
    await upload(announced, LARGE)
    gate = blobs.held = Gate()
    completing = asyncio.create_task(refusal_of(complete(memories, caller, announced)))
    await gate.reached.wait()
    await memories.DeleteAttachment(
        pb.DeleteAttachmentRequest(id=announced.attachment.id), metadata=bearer(caller)
    )
    # And it comes back to life: parts that were put together after the deletion.
    key = key_of(caller, announced.attachment)
    await blobs.put(key, b"x", "text/plain")
    gate.open.set()
    assert (await completing).code is grpc.StatusCode.NOT_FOUND
    assert await left_of(blobs, key) == []


async def test_list_shows_the_attachments_of_one_memory_page_by_page(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    memory = await create(memories, caller, "with files")
    other = await create(memories, caller, "with another file")
    made = [
        (await announce(memories, caller, bytes([n]), memory_id=memory.id)).attachment
        for n in range(5)
    ]
    await announce(memories, caller, b"x", memory_id=other.id)
    found: list[pb.Attachment] = []
    token, pages = "", 0
    while token or not pages:
        page = await memories.ListAttachments(
            pb.ListAttachmentsRequest(memory_id=memory.id, page_size=2, page_token=token),
            metadata=bearer(caller),
        )
        found += page.attachments
        token, pages = page.next_page_token, pages + 1
    assert (found, pages) == (made[::-1], 3)
    empty = await create(memories, caller, "without files")
    request = pb.ListAttachmentsRequest(memory_id=empty.id)
    assert not (await memories.ListAttachments(request, metadata=bearer(caller))).attachments
    stranger = await new_caller(database)
    refusal = await refusal_of(
        memories.ListAttachments(
            pb.ListAttachmentsRequest(memory_id=memory.id), metadata=bearer(stranger)
        )
    )
    assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_what_is_anothers_is_not_found(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    stranger = bearer(await new_caller(database))
    attachment = await attach(memories, caller, DATA)
    for call in (
        memories.GetAttachment(pb.GetAttachmentRequest(id=attachment.id), metadata=stranger),
        memories.CompleteAttachment(
            pb.CompleteAttachmentRequest(id=attachment.id), metadata=stranger
        ),
        memories.DeleteAttachment(pb.DeleteAttachmentRequest(id=attachment.id), metadata=stranger),
    ):
        assert (await refusal_of(call)).code is grpc.StatusCode.NOT_FOUND
    assert await download(memories, caller, attachment) == DATA


async def test_attachment_of_a_foreign_or_short_term_memory_is_not_found(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    stranger = await new_caller(database)
    foreign = await create(memories, caller, "mine")
    fleeting = await create(memories, caller, "soon gone", tier=pb.TIER_SHORT_TERM)
    for user, memory in ((stranger, foreign), (caller, fleeting)):
        refusal = await refusal_of(announce(memories, user, DATA, memory_id=memory.id))
        assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_file_of_more_than_100_mib_or_none_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    memory = await create(memories, caller, "with a file")
    for size in (0, -1, 100 * 1024 * 1024 + 1):
        request = pb.CreateAttachmentRequest(
            memory_id=memory.id,
            file_name="f",
            content_type="t",
            size_bytes=size,
            sha256=hashlib.sha256(b"").hexdigest(),
        )
        refusal = await refusal_of(memories.CreateAttachment(request, metadata=bearer(caller)))
        assert refusal.fields == ("size_bytes",)


async def test_without_consent_nothing_is_completed(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    announced = await announce(memories, caller, DATA)
    await upload(announced, DATA)
    await withdraw(database, caller)
    refusal = await refusal_of(complete(memories, caller, announced))
    assert refusal.reason == "CONSENT_MISSING"
