"""Attachments in Postgres: what is announced and what was checked. The bytes are in S3."""

import enum
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from server import audit, consent, ids
from server.caller import Caller
from server.database import Database
from server.errors import NotFound


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
    created_at: datetime


class AttachmentStore:
    """Keeps the attachments of one user at a time. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def announce(
        self, caller: Caller, announcement: Announcement, now: datetime
    ) -> Attachment:
        """Store an attachment whose bytes are still to come.

        Raises:
            NotFound: The memory is not there, not the caller's, or a short-term one.
            ConsentMissing: The user has not consented to memory.store.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            row = await connection.fetchrow(
                """
                INSERT INTO attachments (tenant_id, user_id, id, memory_id, file_name,
                                         content_type, size_bytes, sha256, created_at)
                SELECT tenant_id, user_id, $4, id, $5, $6, $7, $8, $9
                  FROM memories
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                RETURNING id, memory_id, file_name, content_type, size_bytes, sha256, state,
                          created_at
                """,
                caller.tenant_id,
                caller.user_id,
                announcement.memory_id,
                ids.new_id(),
                announcement.file_name,
                announcement.content_type,
                announcement.size_bytes,
                announcement.sha256,
                now,
            )
            if row is None:
                raise NotFound("memory")
            attachment = _attachment(row)
            await audit.record(
                connection, caller, "attachment.create", ids.show(ids.ATTACHMENT, attachment.id)
            )
        return attachment

    async def get(self, caller: Caller, attachment_id: UUID) -> Attachment:
        """Return an attachment.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            row = await connection.fetchrow(
                """
                SELECT id, memory_id, file_name, content_type, size_bytes, sha256, state,
                       created_at
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

    async def complete(self, caller: Caller, attachment_id: UUID) -> Attachment:
        """Mark an attachment as uploaded and checked.

        Raises:
            NotFound: It was deleted meanwhile, or is not the caller's.
            ConsentMissing: The user has not consented to memory.store.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            row = await connection.fetchrow(
                """
                UPDATE attachments
                   SET state = 'complete'
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                RETURNING id, memory_id, file_name, content_type, size_bytes, sha256, state,
                          created_at
                """,
                caller.tenant_id,
                caller.user_id,
                attachment_id,
            )
            if row is None:
                raise NotFound("attachment")
            await audit.record(
                connection, caller, "attachment.complete", ids.show(ids.ATTACHMENT, attachment_id)
            )
        return _attachment(row)


def object_key(caller: Caller, attachment_id: UUID) -> str:
    """Return the S3 key of an attachment: made by the server, nothing in it is the client's."""
    return f"attachments/{caller.tenant_id.hex}/{caller.user_id.hex}/{attachment_id.hex}"


def _attachment(row: asyncpg.Record) -> Attachment:
    return Attachment(
        id=row["id"],
        memory_id=row["memory_id"],
        file_name=row["file_name"],
        content_type=row["content_type"],
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        state=AttachmentState(row["state"]),
        created_at=row["created_at"],
    )
