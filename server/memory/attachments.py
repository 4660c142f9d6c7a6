"""Attachments: announced, uploaded past us, checked, downloaded past us, removed for good.

The order of effects makes every crash harmless. To upload: the row, then the upload in parts, then
its id in the row, then the object, then the row says "complete". A crash before the last step
leaves a pending row, which a retry finishes or the sweep removes with whatever hangs on it. To
delete: row and doom in one transaction, then the object. Nothing is served that was not checked:
the row names the version of the object, and a later upload under the same key is another version.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from server.blobs import Blobs, Digest
from server.caller import Caller
from server.errors import NotFound, UploadMismatch
from server.memory.attachment_store import (
    Announcement,
    Attachment,
    AttachmentState,
    AttachmentStore,
    object_name,
)
from server.memory.objects import DoomedObjects

LARGEST_BYTES = 100 * 1024 * 1024
PART_BYTES = 16 * 1024 * 1024
"""Larger files are uploaded in parts of this size."""


@dataclass(frozen=True, slots=True)
class UploadPart:
    """Where a part of a file goes."""

    number: int
    size_bytes: int
    url: str


@dataclass(frozen=True, slots=True)
class Uploads:
    """Where a file goes: to one URL or to those of its parts; nowhere once it is complete."""

    url: str = ""
    parts: Sequence[UploadPart] = ()


class Attachments:
    """Moves the bytes of attachments between clients and S3 without carrying them."""

    def __init__(
        self,
        store: AttachmentStore,
        blobs: Blobs,
        doomed: DoomedObjects,
        url_lifetime: timedelta,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._doomed = doomed
        self.url_lifetime = url_lifetime

    async def announce(
        self, caller: Caller, announcement: Announcement, request_id: str, now: datetime
    ) -> tuple[Attachment, Uploads]:
        """Return a pending attachment and where to PUT its bytes.

        Raises:
            NotFound: The memory is not there, not the caller's, or a short-term one.
            ConsentMissing: The user has not consented to memory.store.
            RequestIdReused: The request id stands for other contents.
            StoreUnavailable: S3 does not answer.
        """
        attachment = await self._store.announce(caller, announcement, request_id, now)
        if attachment.size_bytes > PART_BYTES and attachment.is_unbegun:
            attachment = await self._begin_upload(caller, attachment.id)
        if attachment.state is AttachmentState.COMPLETE:
            return attachment, Uploads()
        if attachment.upload_id is None:
            return attachment, Uploads(url=self._upload_url(caller, attachment))
        return attachment, Uploads(parts=tuple(self._parts(caller, attachment)))

    async def complete(self, caller: Caller, attachment_id: UUID) -> Attachment:
        """Read the object back and mark the attachment complete if it is the announced one.

        An object that is not the announced one is removed. May be repeated, and by two at once.

        Raises:
            NotFound: There is no such attachment, or it is not the caller's.
            ConsentMissing: The user has not consented to memory.store.
            UploadMismatch: The object or a part is missing, or its size or SHA-256 is another.
            StoreUnavailable: S3 does not answer.
        """
        attachment = await self._store.get(caller, attachment_id)
        if attachment.state is AttachmentState.COMPLETE:
            return attachment
        key = object_name(caller, attachment_id).key
        missing = "nothing was uploaded; PUT the bytes first"
        if attachment.upload_id:
            missing = await self._assemble(attachment, attachment.upload_id, key) or missing
        digest = await self._blobs.digest(key, longest=attachment.size_bytes)
        if digest is None:
            raise UploadMismatch(missing)
        if problem := _difference(attachment, digest):
            await self._blobs.remove_version(key, digest.version_id)
            raise UploadMismatch(problem)
        try:
            return await self._store.complete(caller, attachment_id, digest.version_id)
        except NotFound:
            # It was deleted while its parts became an object.
            await self._blobs.erase(key)
            raise

    async def get(self, caller: Caller, attachment_id: UUID) -> tuple[Attachment, str]:
        """Return an attachment and the URL to GET its bytes from, empty before they are checked.

        Raises:
            NotFound: There is no such attachment, or it is not the caller's.
        """
        attachment = await self._store.get(caller, attachment_id)
        if attachment.state is not AttachmentState.COMPLETE:
            return attachment, ""
        url = self._blobs.download_url(
            object_name(caller, attachment_id).key,
            self.url_lifetime,
            file_name=attachment.file_name,
            version_id=attachment.version_id,
        )
        return attachment, url

    async def page(
        self, caller: Caller, memory_id: UUID, *, before: UUID | None, limit: int
    ) -> list[Attachment]:
        """Return attachments of a memory, newest first, that are older than `before`.

        Raises:
            NotFound: The memory is not there, not the caller's, or a short-term one.
        """
        return await self._store.page(caller, memory_id, before=before, limit=limit)

    async def delete(self, caller: Caller, attachment_id: UUID) -> None:
        """Delete an attachment with its bytes.

        Raises:
            NotFound: There is no such attachment, or it is not the caller's.
        """
        await self._store.delete(caller, attachment_id)
        await self.remove_objects(caller, [attachment_id])

    async def remove_objects(self, caller: Caller, attachment_ids: Sequence[UUID]) -> None:
        """Remove the bytes of attachments that are deleted and whose objects are doomed."""
        await self._doomed.remove(caller, [object_name(caller, each) for each in attachment_ids])

    def _upload_url(self, caller: Caller, attachment: Attachment) -> str:
        return self._blobs.upload_url(
            object_name(caller, attachment.id).key,
            self.url_lifetime,
            size_bytes=attachment.size_bytes,
            sha256=attachment.sha256,
        )

    async def _begin_upload(self, caller: Caller, attachment_id: UUID) -> Attachment:
        """Begin the upload of a large file. One that lost against another request is given up.

        One of which nobody knows whether it was noted stays: the sweep tells.
        """
        key = object_name(caller, attachment_id).key
        upload_id = await self._blobs.begin_upload(key)
        try:
            attachment = await self._store.begin_upload(caller, attachment_id, upload_id)
        except NotFound:
            await self._blobs.abort_upload(key, upload_id)
            raise
        if attachment.upload_id != upload_id:
            await self._blobs.abort_upload(key, upload_id)
        return attachment

    def _parts(self, caller: Caller, attachment: Attachment) -> Iterator[UploadPart]:
        key = object_name(caller, attachment.id).key
        for number, size_bytes in enumerate(part_sizes(attachment.size_bytes), 1):
            url = self._blobs.part_url(
                key,
                self.url_lifetime,
                upload_id=attachment.upload_id or "",
                number=number,
                size_bytes=size_bytes,
            )
            yield UploadPart(number, size_bytes, url)

    async def _assemble(self, attachment: Attachment, upload_id: str, key: str) -> str:
        """Make an object of the uploaded parts, unless another attempt has done so.

        Returns:
            Which parts are missing or have another size; all of them stay. It counts only where
            there is no object: S3 drops the parts of an upload one by one once they became one.
        """
        parts = await self._blobs.parts(key, upload_id)
        if parts is None:
            return ""
        there = {part.part_number: part.size for part in parts}
        wanted = dict(enumerate(part_sizes(attachment.size_bytes), 1))
        wrong = [number for number, size in wanted.items() if there.get(number) != size]
        if wrong:
            numbers = ", ".join(map(str, wrong))
            return f"parts that are missing or have another size: {numbers}"
        own = [part for part in parts if part.part_number in wanted]
        await self._blobs.complete_upload(key, upload_id, own)
        return ""


def part_sizes(size_bytes: int) -> Iterator[int]:
    """Yield the sizes of the parts of a file: full ones, and what is left."""
    for start in range(0, size_bytes, PART_BYTES):
        yield min(PART_BYTES, size_bytes - start)


def _difference(attachment: Attachment, digest: Digest) -> str:
    """Say how an object is not the announced one; empty if it is."""
    again = "announce the file again" if attachment.upload_id else "PUT the announced bytes"
    if digest.size_bytes != attachment.size_bytes:
        return f"the size is not the announced {attachment.size_bytes} bytes; {again}"
    if digest.sha256 != attachment.sha256:
        return f"the SHA-256 is not the announced one; {again}"
    return ""
