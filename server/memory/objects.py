"""Objects of a user in S3: their keys, and how they go when their rows are gone.

A transaction that deletes rows records the keys of their objects, so that no crash after the
commit loses one. Who deleted removes them at once if S3 answers; the sweep removes what is left.
"""

import asyncio
import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self
from uuid import UUID

import structlog

from server.blobs import Blobs
from server.caller import Caller
from server.database import Connection, Database
from server.errors import StoreUnavailable

log = structlog.get_logger()

_PATIENCE_SECONDS = 3.0
_KEY = re.compile(
    r"(attachments|transcripts|exports)/([0-9a-f]{32})/([0-9a-f]{32})/([0-9a-f]{32})\Z"
)


class Kind(enum.StrEnum):
    """What an object holds."""

    ATTACHMENT = "attachments"
    TRANSCRIPT = "transcripts"
    EXPORT = "exports"


@dataclass(frozen=True, slots=True)
class ObjectName:
    """Whose object it is, and which: made by the server, nothing in it is the client's."""

    kind: Kind
    owner: Caller
    id: UUID

    @property
    def key(self) -> str:
        """The key in S3."""
        owner = self.owner
        return f"{self.kind}/{owner.tenant_id.hex}/{owner.user_id.hex}/{self.id.hex}"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        """Read a key; None if it is not of this kind of object."""
        match = _KEY.match(key)
        if match is None:
            return None
        kind, tenant, user, resource = match.groups()
        return cls(Kind(kind), Caller(UUID(tenant), UUID(user)), UUID(resource))


async def doom(connection: Connection, names: Sequence[ObjectName]) -> None:
    """Record that objects must go, to be committed with the deletion of their rows."""
    await connection.execute(
        """
        INSERT INTO doomed_objects (object_key, tenant_id, user_id)
        SELECT * FROM unnest($1::text[], $2::uuid[], $3::uuid[])
            ON CONFLICT DO NOTHING
        """,
        [name.key for name in names],
        [name.owner.tenant_id for name in names],
        [name.owner.user_id for name in names],
    )


class DoomedObjects:
    """Removes objects that a committed transaction has doomed."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    async def remove(self, caller: Caller, names: Sequence[ObjectName]) -> None:
        """Remove objects of a user now, or leave them to the sweep when that takes too long.

        The rows are gone already and the objects recorded, so that this never fails: a crash or
        a silent S3 only makes it later.
        """
        if not names:
            return
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                for name in names:
                    await self._blobs.erase(name.key)
                await self._forget(caller, [name.key for name in names])
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("objects left to the sweep", count=len(names), error=repr(error))

    async def _forget(self, caller: Caller, keys: list[str]) -> None:
        async with self._database.transaction(caller) as connection:
            await connection.execute(
                """
                DELETE FROM doomed_objects
                 WHERE tenant_id = $1 AND user_id = $2 AND object_key = ANY ($3)
                """,
                caller.tenant_id,
                caller.user_id,
                keys,
            )
