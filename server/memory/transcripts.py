"""Transcripts: what was said in a conversation, as JSON Lines in S3.

The order of effects: the object, then its row. A crash between the two leaves an object that no
row names, which the sweep removes; whoever writes tries again, since nothing was acknowledged.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, consent, ids
from server.blobs import Blobs
from server.caller import Caller
from server.database import Connection, Database
from server.errors import NotFound
from server.memory.objects import DoomedObjects, Kind, ObjectName, doom

CONTENT_TYPE: Final = "application/jsonl"
FILE_NAME: Final = "transcript.jsonl"

_ID: Final = "trs"
"""Prefix of the ids that the audit log shows: the API names transcripts by conversation."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Something that was said."""

    position: int
    speaker: str
    content: str
    occurred_at: datetime


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation, written down."""

    id: UUID
    session_id: str
    size_bytes: int
    sha256: bytes
    turns: int
    version_id: str | None
    created_at: datetime


class Transcripts:
    """Keeps one transcript of each conversation of a user."""

    def __init__(
        self, database: Database, blobs: Blobs, doomed: DoomedObjects, url_lifetime: timedelta
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._doomed = doomed
        self.url_lifetime = url_lifetime

    async def write(
        self, caller: Caller, session_id: str, turns: Iterable[Turn], now: datetime
    ) -> Transcript:
        """Write a transcript and return it; one of the same conversation is replaced.

        May be repeated: the same turns are not written twice.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            StoreUnavailable: S3 or PostgreSQL does not answer.
        """
        lines = [_line(turn) for turn in turns]
        data = b"".join(lines)
        sha256 = hashlib.sha256(data).digest()
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            there = await _find(connection, caller, session_id)
        if there is not None and there.sha256 == sha256:
            return there
        name = _object_name(caller, ids.new_id())
        version_id = await self._blobs.put(name.key, data, CONTENT_TYPE)
        written = Transcript(name.id, session_id, len(data), sha256, len(lines), version_id, now)
        replaced = await self._store(caller, written)
        await self._doomed.remove(caller, replaced)
        return written

    async def get(self, caller: Caller, session_id: str) -> tuple[Transcript, str]:
        """Return a transcript and the URL to GET its bytes from.

        Raises:
            NotFound: The conversation has none, or is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            transcript = await _find(connection, caller, session_id)
        if transcript is None:
            raise NotFound("transcript")
        url = self._blobs.download_url(
            _object_name(caller, transcript.id).key,
            self.url_lifetime,
            file_name=FILE_NAME,
            version_id=transcript.version_id,
        )
        return transcript, url

    async def delete(self, caller: Caller, session_id: str) -> None:
        """Delete a transcript with its bytes.

        Raises:
            NotFound: The conversation has none, or is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            deleted = await connection.fetchval(
                """
                DELETE FROM transcripts
                 WHERE tenant_id = $1 AND user_id = $2 AND session_id = $3
                RETURNING id
                """,
                caller.tenant_id,
                caller.user_id,
                session_id,
            )
            if deleted is None:
                raise NotFound("transcript")
            name = _object_name(caller, deleted)
            await doom(connection, [name])
            await audit.record(connection, caller, "transcript.delete", ids.show(_ID, deleted))
        await self._doomed.remove(caller, [name])

    async def _store(self, caller: Caller, written: Transcript) -> list[ObjectName]:
        """Store a transcript whose object is there, and return the doomed object of the last one.

        Two that are stored first at the same time leave the object of one to the sweep.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            there = await _find(connection, caller, written.session_id, lock="FOR UPDATE")
            await connection.execute(
                """
                INSERT INTO transcripts (tenant_id, user_id, session_id, id, version_id,
                                         size_bytes, sha256, turns, created_at)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
                    ON CONFLICT (user_id, session_id) DO UPDATE
                   SET id = $4, version_id = $5, size_bytes = $6, sha256 = $7, turns = $8,
                       created_at = $9
                """,
                caller.tenant_id,
                caller.user_id,
                written.session_id,
                written.id,
                written.version_id,
                written.size_bytes,
                written.sha256,
                written.turns,
                written.created_at,
            )
            replaced = [_object_name(caller, there.id)] if there else []
            await doom(connection, replaced)
            await audit.record(connection, caller, "transcript.create", shown(written))
        return replaced


def shown(transcript: Transcript) -> str:
    """Return the id of a transcript as the audit log shows it."""
    return ids.show(_ID, transcript.id)


async def _find(
    connection: Connection, caller: Caller, session_id: str, *, lock: str = ""
) -> Transcript | None:
    row = await connection.fetchrow(
        f"""
        SELECT id, session_id, size_bytes, sha256, turns, version_id, created_at
          FROM transcripts
         WHERE tenant_id = $1 AND user_id = $2 AND session_id = $3
        {lock}
        """,  # noqa: S608 - a constant
        caller.tenant_id,
        caller.user_id,
        session_id,
    )
    return _transcript(row) if row else None


def _object_name(caller: Caller, transcript_id: UUID) -> ObjectName:
    return ObjectName(Kind.TRANSCRIPT, caller, transcript_id)


def _line(turn: Turn) -> bytes:
    record = {
        "position": turn.position,
        "speaker": turn.speaker,
        "content": turn.content,
        "occurTime": turn.occurred_at.isoformat(),
    }
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _transcript(row: asyncpg.Record) -> Transcript:
    return Transcript(
        id=row["id"],
        session_id=row["session_id"],
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        turns=row["turns"],
        version_id=row["version_id"],
        created_at=row["created_at"],
    )
