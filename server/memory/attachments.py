"""Attachments: announced, uploaded past us, checked, downloaded past us."""

from datetime import datetime, timedelta
from uuid import UUID

from server.blobs import Blobs
from server.caller import Caller
from server.errors import UploadMismatch
from server.memory.attachment_store import (
    Announcement,
    Attachment,
    AttachmentState,
    AttachmentStore,
    object_key,
)


class Attachments:
    """Moves the bytes of attachments between clients and S3 without carrying them."""

    def __init__(self, store: AttachmentStore, blobs: Blobs, url_lifetime: timedelta) -> None:
        self._store = store
        self._blobs = blobs
        self.url_lifetime = url_lifetime

    async def announce(
        self, caller: Caller, announcement: Announcement, now: datetime
    ) -> tuple[Attachment, str]:
        """Return a pending attachment and the URL to PUT its bytes to.

        Raises:
            NotFound: The memory is not there, not the caller's, or a short-term one.
            ConsentMissing: The user has not consented to memory.store.
        """
        attachment = await self._store.announce(caller, announcement, now)
        url = self._blobs.upload_url(object_key(caller, attachment.id), self.url_lifetime)
        return attachment, url

    async def complete(self, caller: Caller, attachment_id: UUID) -> Attachment:
        """Read the object back and mark the attachment complete if it is the announced one.

        Raises:
            NotFound: There is no such attachment, or it is not the caller's.
            UploadMismatch: The object is missing, or its size or SHA-256 is another.
            StoreUnavailable: S3 does not answer.
        """
        attachment = await self._store.get(caller, attachment_id)
        key = object_key(caller, attachment_id)
        digest = await self._blobs.digest(key, longest=attachment.size_bytes)
        if digest is None:
            raise UploadMismatch("nothing was uploaded; PUT the bytes to upload_url first")
        if digest.size_bytes != attachment.size_bytes:
            raise UploadMismatch(f"the size is not the announced {attachment.size_bytes} bytes")
        if digest.sha256 != attachment.sha256:
            raise UploadMismatch("the SHA-256 is not the announced one")
        return await self._store.complete(caller, attachment_id)

    async def get(self, caller: Caller, attachment_id: UUID) -> tuple[Attachment, str]:
        """Return an attachment and the URL to GET its bytes from, empty before they are checked.

        Raises:
            NotFound: There is no such attachment, or it is not the caller's.
        """
        attachment = await self._store.get(caller, attachment_id)
        if attachment.state is not AttachmentState.COMPLETE:
            return attachment, ""
        url = self._blobs.download_url(
            object_key(caller, attachment_id), self.url_lifetime, file_name=attachment.file_name
        )
        return attachment, url

    async def remove_objects(self, caller: Caller, attachment_ids: list[UUID]) -> None:
        """Remove the bytes of attachments that are deleted.

        Raises:
            StoreUnavailable: S3 does not answer.
        """
        for attachment_id in attachment_ids:
            await self._blobs.remove(object_key(caller, attachment_id))
