"""Memories read anew in Postgres: their terms, in the language that their user chose.

Those of sensitive memories too: they have some if their user wants them to be found, else none.
What is said below of the language holds for that choice as well.

One pass in the order of ids is enough. Who writes memories holds the user's language by a shared
lock until the commit (language_to_write_in), and a change of the language waits for them and they
for it. So whatever is written in the language of before is there when the change is, and with it
the job that reads it anew; all that is written later is in the language of after. To note the
language with every memory instead would take a second pass, and a wait for writers all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg
import structlog
from pgvector import SparseVector

from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Connection, Database
from server.errors import ContentUnreadable
from server.memory.conversation import NO_TERMS, Place, Surroundings, store_terms
from server.memory.sensitive import Sealing
from server.preferences import Language

log = structlog.get_logger()

_PAGE_BYTES: Final = 256 * 1024
"""How much text a page may hold: the stems of it are found between two turns of the loop."""
_FIRST: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Reindexed:
    """A page that was read anew."""

    count: int
    last: UUID | None
    """The memory to go on after; None when nothing is left."""


_NOTHING_LEFT: Final = Reindexed(0, None)


class ReindexStore:
    """Reads the memories of one user at a time anew. Repeating a page changes nothing.

    Locks in the order of MemoryStore: conversations, memories, the user's usage.
    """

    def __init__(self, database: Database, keys: DataKeys) -> None:
        self._database = database
        self._keys = keys

    async def reindex(
        self, caller: Caller, settings_version: int, after: UUID | None, limit: int
    ) -> Reindexed:
        """Make the terms of the next memories anew, with those of the turns around them.

        Without consent to memory.store too: what is kept stays findable should it come back.
        Sealed texts get terms if their user wants them found, and lose them if not; those that do
        not open have none.

        Args:
            caller: Whose memories they are.
            settings_version: The version that brought the choice. Of an earlier one nothing is
                left to do: the job of the later one does it.
            after: The last memory of the page before.
            limit: How many memories at most.

        Raises:
            StoreUnavailable: Sealed texts are to be read, and the key manager does not answer.
        """
        key = await self._key(caller)
        async with self._database.transaction(caller) as connection:
            language = Language(await connection.fetchval("SELECT language_to_write_in()"))
            if await _language_version(connection, caller) != settings_version:
                return _NOTHING_LEFT
            places = await _next(connection, caller, after or _FIRST, limit)
            if not places:
                return _NOTHING_LEFT
            turns = [place for place in places.values() if place]
            around = await Surroundings.of(connection, caller, turns, language)
            sealing = Sealing(caller, language, is_indexed=True, key=key) if key else None
            terms = {
                row["id"]: around.terms(row["content"], places[row["id"]])
                if row["sealed"] is None
                else _terms_of_sealed(row, sealing)
                for row in await _texts(connection, caller, list(places))
            }
            await store_terms(connection, caller, terms)
            await _tell_queries(connection, caller)
        return Reindexed(len(terms), max(places))

    async def _key(self, caller: Caller) -> bytes | None:
        """Return the key of a user who wants sensitive memories found, if there is one.

        Another choice after this look has a version of its own.
        """
        if not await self._database.fetch(
            caller,
            """
            SELECT true
              FROM settings
             WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id AND index_sensitive
            """,
        ):
            return None
        try:
            return await self._keys.existing_key_of(caller)
        except ContentUnreadable:
            return None


async def _language_version(connection: Connection, caller: Caller) -> int | None:
    version: int | None = await connection.fetchval(
        "SELECT language_version FROM settings WHERE tenant_id = $1 AND user_id = $2",
        caller.tenant_id,
        caller.user_id,
    )
    return version


async def _next(
    connection: Connection, caller: Caller, after: UUID, limit: int
) -> dict[UUID, Place | None]:
    """Return the next memories and where they stand, as many as have little enough text."""
    rows = await connection.fetch(
        """
        SELECT id, session_id, session_position
          FROM (
               SELECT id, session_id, session_position,
                      sum(size_bytes) OVER (ORDER BY id) - size_bytes AS bytes_before
                 FROM memories
                WHERE tenant_id = $1 AND user_id = $2 AND id > $3
                ORDER BY id
                LIMIT $4
               ) AS page
         WHERE bytes_before < $5
        """,
        caller.tenant_id,
        caller.user_id,
        after,
        limit,
        _PAGE_BYTES,
    )
    return {row["id"]: _place(row) for row in rows}


def _place(row: asyncpg.Record) -> Place | None:
    if row["session_position"] is None:
        return None
    return Place(row["session_id"], row["session_position"])


async def _texts(
    connection: Connection, caller: Caller, memory_ids: Sequence[UUID]
) -> list[asyncpg.Record]:
    """Return what the memories say, and keep it so until the commit."""
    rows: list[asyncpg.Record] = await connection.fetch(
        """
        SELECT id, content, sealed
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = ANY ($3)
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        memory_ids,
    )
    return rows


def _terms_of_sealed(row: asyncpg.Record, sealing: Sealing | None) -> SparseVector:
    if sealing is None:
        return NO_TERMS
    try:
        return sealing.terms_of(sealing.open(row["id"], row["sealed"]))
    except ContentUnreadable as error:
        log.warning("sealed text not indexed", error=str(error))
        return NO_TERMS


async def _tell_queries(connection: Connection, caller: Caller) -> None:
    """Say that queries may now find something else."""
    await connection.execute(
        """
        UPDATE memory_usage
           SET data_version = data_version + 1
         WHERE tenant_id = $1 AND user_id = $2
        """,
        caller.tenant_id,
        caller.user_id,
    )
