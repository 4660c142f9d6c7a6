"""Memories that others of the tenant show, in Postgres: read, listed, found by words."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final
from uuid import UUID

import asyncpg

from server.caller import Caller
from server.database import Connection, Database
from server.errors import NotFound
from server.memory.conversation import sparse
from server.memory.model import Filter, Found, Memory
from server.memory.rows import MEMORY_COLUMNS, memory_from

# How a memory is used and scored is its user's matter: others see what it says.
_COLUMNS: Final = f"""
    {MEMORY_COLUMNS}, user_id, updated_at AS last_seen_at, 0 AS use_count, NULL AS feedback,
    NULL AS scored_at
"""
_SHOWN: Final = """
      FROM memories AS memory
     WHERE tenant_id = $1 AND user_id <> $2 AND scope <> 'private' AND archived_at IS NULL
       AND (SELECT granted
              FROM consents
             WHERE tenant_id = $1 AND user_id = memory.user_id AND purpose = 'memory.store'
             ORDER BY version DESC
             LIMIT 1)
"""
_PASSES: Final = """
       AND tier = ANY ($3) AND tags @> $4 AND ($5 = '' OR session_id = $5)
       AND ($6::timestamptz IS NULL OR occurred_at >= $6)
       AND ($7::timestamptz IS NULL OR occurred_at < $7)
"""


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
            await _reach(connection)
            row = await connection.fetchrow(
                f"SELECT {_COLUMNS} {_SHOWN} AND id = $3",
                caller.tenant_id,
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
        async with self._database.transaction(caller) as connection:
            await _reach(connection)
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS} {_SHOWN} {_PASSES}
                   AND ($8::uuid IS NULL OR id < $8)
                 ORDER BY id DESC
                 LIMIT $9
                """,
                *_arguments(caller, which),
                before,
                limit,
            )
        return [_memory(row) for row in rows]

    async def query(
        self, caller: Caller, terms: Mapping[int, float], which: Filter, limit: int
    ) -> list[Found]:
        """Return the memories that the weighted terms match best, best first."""
        if not terms:
            return []
        async with self._database.transaction(caller) as connection:
            await _reach(connection)
            rows = await connection.fetch(
                f"""
                SELECT {_COLUMNS}, -(terms <#> $8) AS lexical {_SHOWN} {_PASSES}
                   AND (terms <#> $8) < 0
                 ORDER BY terms <#> $8, id
                 LIMIT $9
                """,
                *_arguments(caller, which),
                sparse(terms),
                limit,
            )
        return [Found(_memory(row), row["lexical"]) for row in rows]


async def _reach(connection: Connection) -> None:
    await connection.execute("SET LOCAL kimberly.reach = 'tenant'")


def _arguments(caller: Caller, which: Filter) -> tuple[object, ...]:
    return (
        caller.tenant_id,
        caller.user_id,
        which.durable_tiers,
        list(which.tags),
        which.session_id,
        which.occurred_after,
        which.occurred_before,
    )


def _memory(row: asyncpg.Record) -> Memory:
    return replace(memory_from(row), owner_id=row["user_id"])
