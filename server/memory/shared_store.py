"""Memories that others of the tenant show, in Postgres: read, listed, found by words."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final
from uuid import UUID

import asyncpg

from server import ids
from server.caller import Caller
from server.database import Database
from server.errors import NotFound
from server.memory import filters, ranking
from server.memory.conversation import sparse
from server.memory.model import Filter, Found, Memory
from server.memory.rows import MEMORY_COLUMNS, memory_from
from server.preferences import Language

# How a memory is used and scored is its user's matter: others see what it says.
_COLUMNS: Final = f"""
    {MEMORY_COLUMNS}, user_id, updated_at AS last_seen_at, 0 AS use_count, NULL AS feedback,
    NULL AS scored_at
"""
_SHOWN: Final = """
    FROM shown_memories WHERE user_id <> $1 AND (scope = 'public' OR acting_agent() IS NULL)
"""
"""What is shared is for the people of the tenant, what is public for their agents too."""
_LOOKED_AT: Final = 2
"""How many times as many rows are looked at as are wanted: some have none of the words."""


class SharedStore:
    """Finds memories of others that a caller may see. Every method is one transaction.

    Only active memories of durable tiers are shown, as long as their user consents to
    memory.store.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, caller: Caller, memory_id: UUID) -> Memory:
        """Return a memory that someone else shows.

        Raises:
            NotFound: There is none, or it is not shown to the caller.
        """
        async with self._database.transaction(caller) as connection:
            row = await connection.fetchrow(
                f"SELECT {_COLUMNS} {_SHOWN} AND id = $2",
                caller.user_id,
                memory_id,
            )
        if row is None:
            raise NotFound("memory")
        return _memory(row)

    async def page(
        self, caller: Caller, which: Filter, *, before: UUID | None, limit: int
    ) -> list[Memory]:
        """Return memories with ids below `before`, highest first, at most `limit`."""
        passing, parameters = filters.passing(which, 4)
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} {_SHOWN} AND id < $2 AND {passing}
                 ORDER BY id DESC
                 LIMIT $3
                """,
                caller.user_id,
                before or ids.ABOVE_ALL,
                limit,
                *parameters,
            )
        return [_memory(row) for row in rows]

    async def query(
        self,
        caller: Caller,
        terms: Mapping[int, float],
        which: Filter,
        limit: int,
        language: Language,
    ) -> list[Found]:
        """Return the memories that the weighted terms match best, best first.

        A turn is matched by what it says alone: that the turns around it match, which its user
        keeps to themselves, would tell what those say.
        """
        if not terms:
            return []
        passing, parameters = filters.passing(which, 4)
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} {_SHOWN} AND {passing}
                   AND (terms <#> $2) < 0
                 ORDER BY terms <#> $2, id
                 LIMIT $3
                """,
                caller.user_id,
                sparse(terms),
                limit * _LOOKED_AT,
                *parameters,
            )
        found = (Found(memory, _match(terms, memory, language)) for memory in map(_memory, rows))
        by_match = sorted(found, key=lambda one: -one.lexical)
        return [one for one in by_match[:limit] if one.lexical > 0]


def _match(terms: Mapping[int, float], memory: Memory, language: Language) -> float:
    return ranking.score(terms, ranking.weights(memory.content, language=language))


def _memory(row: asyncpg.Record) -> Memory:
    return replace(memory_from(row), owner_id=row["user_id"])
