"""Files of the tests: announced, uploaded, and looked for in the bucket."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc
from minio.datatypes import Part

from server import ids
from server.blobs import Blobs, Digest
from server.caller import Caller
from server.errors import StoreUnavailable
from server.memory.attachment_store import object_name
from tests.conftest import bearer
from tests.memory.calls import create

PART = 16 * 1024 * 1024
DATA = b"hello " * 1000
LARGE = bytes(range(256)) * (PART // 256) + b"and a little more"
"""A file of two parts."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A place where one waits for another."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)


class BrokenBlobs(Blobs):
    """The real bucket, from which one kind of answer gets lost once.

    The call has its effect on the bucket, or none, and then it looks as if S3 were gone: what a
    process that is killed at this point leaves behind.
    """

    lost = ""
    """Method whose answer gets lost after its effect."""
    refused = ""
    """Method that has no effect."""
    held: Gate | None = None
    """Where whoever has read an object waits."""
    drops_parts = False
    """Whether S3 is dropping the parts of every upload, as it does once they became an object."""

    @classmethod
    def of(cls, blobs: Blobs) -> BrokenBlobs:
        return cls(blobs._client, blobs._bucket, blobs._http)

    async def begin_upload(self, key: str) -> str:
        self._break_before("begin_upload")
        upload_id = await super().begin_upload(key)
        self._break_after("begin_upload")
        return upload_id

    async def parts(self, key: str, upload_id: str) -> list[Part] | None:
        return [] if self.drops_parts else await super().parts(key, upload_id)

    async def complete_upload(self, key: str, upload_id: str, parts: list) -> None:  # type: ignore[type-arg]
        await super().complete_upload(key, upload_id, parts)
        self._break_after("complete_upload")

    async def put(self, key: str, data: bytes, content_type: str) -> str | None:
        version_id = await super().put(key, data, content_type)
        self._break_after("put")
        return version_id

    async def digest(self, key: str, *, longest: int) -> Digest | None:
        digest = await super().digest(key, longest=longest)
        if self.held:
            self.held.reached.set()
            await self.held.open.wait()
        return digest

    async def erase(self, key: str) -> None:
        self._break_before("erase")
        await super().erase(key)
        self._break_after("erase")

    def _break_before(self, method: str) -> None:
        if self.refused == method:
            raise StoreUnavailable("the object store")

    def _break_after(self, method: str) -> None:
        if self.lost == method:
            self.lost = ""
            raise StoreUnavailable("the object store")


async def announce(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    data: bytes,
    *,
    memory_id: str = "",
    request_id: str = "",
) -> pb.CreateAttachmentResponse:
    memory_id = memory_id or (await create(memories, caller, "with a file")).id
    return await memories.CreateAttachment(
        pb.CreateAttachmentRequest(
            memory_id=memory_id,
            file_name='../"e\u0301vil".txt',
            content_type="text/plain",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            request_id=request_id,
        ),
        metadata=bearer(caller),
    )


async def upload(announced: pb.CreateAttachmentResponse, data: bytes) -> None:
    """PUT a file to where it belongs."""
    places = [(part.upload_url, (part.number - 1) * PART) for part in announced.parts]
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        for url, start in places or [(announced.upload_url, 0)]:
            (await http.put(url, content=data[start : start + PART])).raise_for_status()


async def complete(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, announced: pb.CreateAttachmentResponse
) -> pb.Attachment:
    request = pb.CompleteAttachmentRequest(id=announced.attachment.id)
    return (await memories.CompleteAttachment(request, metadata=bearer(caller))).attachment


async def attach(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, data: bytes, *, memory_id: str = ""
) -> pb.Attachment:
    """Upload a file and return the attachment, complete."""
    announced = await announce(memories, caller, data, memory_id=memory_id)
    await upload(announced, data)
    return await complete(memories, caller, announced)


async def download(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, attachment: pb.Attachment
) -> bytes:
    request = pb.GetAttachmentRequest(id=attachment.id)
    url = (await memories.GetAttachment(request, metadata=bearer(caller))).download_url
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        return (await http.get(url)).content


def key_of(caller: Caller, attachment: pb.Attachment) -> str:
    return object_name(caller, ids.parse(ids.ATTACHMENT, attachment.id, "id")).key


async def left_of(blobs: Blobs, key: str) -> Sequence[str]:
    """Return what the bucket has of a key: versions, marks and unfinished uploads."""
    found: list[str] = []
    token, pages = "", 0
    while token or not pages:
        page = await blobs.versions(token=token, limit=1000)
        found += [str(version.version_id) for version in page.versions if version.key == key]
        token, pages = page.next_token, pages + 1
    return [*found, *(each.upload_id for each in await blobs.unfinished() if each.key == key)]
