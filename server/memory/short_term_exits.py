"""Memories that leave the short term: who may change them meanwhile, and that they have left.

Whoever writes short-term memories of a user holds a lock of the user's shared until the commit,
and whoever promotes or deletes some takes it alone: what is promoted is what was written last.
What has left is noted in the transaction that takes it away. A copy that Redis keeps for want of
an answer, or has again after a crash, is told from a memory by that note.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final
from uuid import UUID

import asyncpg

from server.caller import Caller
from server.database import Connection, Database
from server.errors import StoreUnavailable

LONGEST_LIFE: Final = timedelta(days=8)
"""No copy in Redis lives longer: after that an exit need not be remembered."""


async def begin_writing_short_term(connection: Connection, caller: Caller) -> None:
    """Wait until none of the user's memories is leaving, and let none leave until the commit.

    Raises:
        StoreUnavailable: That takes too long.
    """
    await _lock(connection, caller, "pg_advisory_xact_lock_shared")


async def begin_leaving(connection: Connection, caller: Caller) -> None:
    """Wait until none of the user's memories is being written, and let none be until the commit.

    Raises:
        StoreUnavailable: That takes too long.
    """
    await _lock(connection, caller, "pg_advisory_xact_lock")


async def leave(connection: Connection, caller: Caller, memory_ids: Sequence[UUID]) -> None:
    """Note that memories have left once the transaction has committed.

    Their copies are to be removed after that.
    """
    await connection.execute(
        """
        INSERT INTO short_term_exits (tenant_id, user_id, memory_id)
        SELECT $1, $2, memory_id FROM unnest($3::uuid[]) AS memory_id
            ON CONFLICT DO NOTHING
        """,
        caller.tenant_id,
        caller.user_id,
        list(memory_ids),
    )


async def left(connection: Connection, caller: Caller, memory_ids: Sequence[UUID]) -> set[UUID]:
    """Return which of some memories have left, as the running transaction sees it."""
    if not memory_ids:
        return set()
    rows = await connection.fetch(
        """
        SELECT memory_id
          FROM short_term_exits
         WHERE tenant_id = $1 AND user_id = $2 AND memory_id = ANY ($3)
        """,
        caller.tenant_id,
        caller.user_id,
        list(memory_ids),
    )
    return {row["memory_id"] for row in rows}


async def left_by_now(
    database: Database, caller: Caller, memory_ids: Sequence[UUID]
) -> tuple[set[UUID], int]:
    """Return which of some memories have left, and the data version by then, in one round trip."""
    (row,) = await database.fetch(
        caller,
        """
        SELECT ARRAY(SELECT memory_id
                       FROM short_term_exits
                      WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
                        AND memory_id = ANY ($3)) AS memory_ids,
               coalesce((SELECT data_version
                           FROM memory_usage
                          WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id), 0)
                   AS data_version
        """,
        list(memory_ids),
    )
    return set(row["memory_ids"]), row["data_version"]


async def _lock(connection: Connection, caller: Caller, function: str) -> None:
    try:
        await connection.execute(
            f"SELECT {function}(hashtextextended($1, 0))", f"short_term/{caller.user_id}"
        )
    except asyncpg.LockNotAvailableError as error:
        raise StoreUnavailable("the short-term tier") from error
