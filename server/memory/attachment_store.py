"""Attachments in Postgres: what is announced and what was checked. The bytes are in S3."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from server import audit, consent, ids, requests
from server.caller import Caller
from server.database import Connection, Database
from server.errors import NotFound
from server.memory.objects import Kind, ObjectName, doom
from server.metering import ledger


class AttachmentState(enum.StrEnum):
    """Where an upload stands."""

    PENDING = "pending"
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class Announcement:
    """A file that a caller wants to upload, checked."""

    memory_id: UUID
    file_name: str
    content_type: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that belongs to a memory."""

    id: UUID
    memory_id: UUID
    file_name: str
    content_type: str
    size_bytes: int
    sha256: bytes
    state: AttachmentState
    upload_id: str | None
    """Of an upload in parts."""
    version_id: str | None
    """The version of the object that was checked."""
    created_at: datetime

    @property
    def is_unbegun(self) -> bool:
        """Whether it is pending without an upload in parts."""
        return self.state is AttachmentState.PENDING and self.upload_id is None


class AttachmentStore:
    """Keeps the attachments of one user at a time. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def announce(
        self, caller: Caller, announcement: Announcement, request_id: str, now: datetime
    ) -> Attachment:
        """Store an attachment whose bytes are still to come, or return the one of the request id.

        Raises:
            NotFound: The memory is not there, not the caller's, or a short-term one; or what the
                request made is deleted.
            ConsentMissing: The user has not consented to memory.store.
            RequestIdReused: The request id stands for other contents.
        """
        attachment_id = ids.new_id()
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            if request_id:
                contents = repr(announcement).encode()
                first_id = await requests.claim(
                    connection, caller, "CreateAttachment", request_id, contents, attachment_id
                )
                if first_id != attachment_id:
                    return await _get(connection, caller, first_id)
            attachment = await _insert(connection, caller, attachment_id, announcement, now)
            await audit.record(
                connection, caller, "attachment.create", ids.show(ids.ATTACHMENT, attachment_id)
            )
        return attachment

    async def begin_upload(self, caller: Caller, attachment_id: UUID, upload_id: str) -> Attachment:
        """Note the upload in parts of a pending attachment; the first one that is noted stands.

        Raises:
            NotFound: It was deleted meanwhile, or is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            await connection.execute(
                """
                UPDATE attachments
                   SET upload_id = coalesce(upload_id, $4)
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3 AND state = 'pending'
                """,
                caller.tenant_id,
                caller.user_id,
                attachment_id,
                upload_id,
            )
            return await _get(connection, caller, attachment_id)

    async def get(self, caller: Caller, attachment_id: UUID) -> Attachment:
        """Return an attachment.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            return await _get(connection, caller, attachment_id)

    async def page(
        self, caller: Caller, memory_id: UUID, *, before: UUID | None, limit: int
    ) -> list[Attachment]:
        """Return attachments of a memory, newest first, that are older than `before`.

        Raises:
            NotFound: The memory is not there, not the caller's, or a short-term one.
        """
        rows = await self._database.fetch(
            caller,
            """
            SELECT attachment.id, attachment.memory_id, attachment.file_name,
                   attachment.content_type, attachment.size_bytes, attachment.sha256,
                   attachment.state, attachment.upload_id, attachment.version_id,
                   attachment.created_at
              FROM memories AS memory
              LEFT JOIN LATERAL (
                  SELECT *
                    FROM attachments
                   WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
                     AND memory_id = memory.id AND id < $4
                   ORDER BY id DESC
                   LIMIT $5) AS attachment ON true
             WHERE memory.tenant_id = caller.tenant_id AND memory.user_id = caller.user_id
               AND memory.id = $3
             ORDER BY attachment.id DESC
            """,
            memory_id,
            before or ids.ABOVE_ALL,
            limit,
        )
        if not rows:
            raise NotFound("memory")
        return [_attachment(row) for row in rows if row["id"] is not None]

    async def complete(
        self, caller: Caller, attachment_id: UUID, version_id: str | None
    ) -> Attachment:
        """Mark a pending attachment as uploaded and checked; a complete one stays as it is.

        Raises:
            NotFound: It was deleted meanwhile, or is not the caller's.
            ConsentMissing: The user has not consented to memory.store.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            size_bytes = await connection.fetchval(
                """
                UPDATE attachments
                   SET state = 'complete', version_id = $4, upload_id = NULL
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3 AND state = 'pending'
                RETURNING size_bytes
                """,
                caller.tenant_id,
                caller.user_id,
                attachment_id,
                version_id,
            )
            if size_bytes is not None:
                shown = ids.show(ids.ATTACHMENT, attachment_id)
                await audit.record(connection, caller, "attachment.complete", shown)
                if noted := ledger():
                    noted.note(connection, 0, uploaded_bytes=size_bytes)
            return await _get(connection, caller, attachment_id)

    async def delete(self, caller: Caller, attachment_id: UUID) -> None:
        """Delete an attachment and doom its object.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            deleted = await connection.fetchval(
                """
                DELETE FROM attachments
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                RETURNING true
                """,
                caller.tenant_id,
                caller.user_id,
                attachment_id,
            )
            if not deleted:
                raise NotFound("attachment")
            await doom_objects(connection, caller, [attachment_id])
            await audit.record(
                connection, caller, "attachment.delete", ids.show(ids.ATTACHMENT, attachment_id)
            )


async def doom_objects(
    connection: Connection, caller: Caller, attachment_ids: Sequence[UUID]
) -> None:
    """Record that the objects of attachments must go, in the transaction that deletes the rows."""
    await doom(connection, [object_name(caller, each) for each in attachment_ids])


def object_name(caller: Caller, attachment_id: UUID) -> ObjectName:
    """Return which object holds the bytes of an attachment."""
    return ObjectName(Kind.ATTACHMENT, caller, attachment_id)


async def _insert(
    connection: Connection,
    caller: Caller,
    attachment_id: UUID,
    announcement: Announcement,
    now: datetime,
) -> Attachment:
    row = await connection.fetchrow(
        """
        INSERT INTO attachments (tenant_id, user_id, id, memory_id, file_name,
                                 content_type, size_bytes, sha256, created_at)
        SELECT tenant_id, user_id, $4, id, $5, $6, $7, $8, $9
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        RETURNING id, memory_id, file_name, content_type, size_bytes, sha256, state, upload_id,
                  version_id, created_at
        """,
        caller.tenant_id,
        caller.user_id,
        announcement.memory_id,
        attachment_id,
        announcement.file_name,
        announcement.content_type,
        announcement.size_bytes,
        announcement.sha256,
        now,
    )
    if row is None:
        raise NotFound("memory")
    return _attachment(row)


async def _get(connection: Connection, caller: Caller, attachment_id: UUID) -> Attachment:
    row = await connection.fetchrow(
        """
        SELECT id, memory_id, file_name, content_type, size_bytes, sha256, state, upload_id,
               version_id, created_at
          FROM attachments
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        attachment_id,
    )
    if row is None:
        raise NotFound("attachment")
    return _attachment(row)


def _attachment(row: asyncpg.Record) -> Attachment:
    return Attachment(
        id=row["id"],
        memory_id=row["memory_id"],
        file_name=row["file_name"],
        content_type=row["content_type"],
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        state=AttachmentState(row["state"]),
        upload_id=row["upload_id"],
        version_id=row["version_id"],
        created_at=row["created_at"],
    )
