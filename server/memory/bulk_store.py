"""Reading many memories at once in Postgres: some by their ids, and all in order."""

from collections.abc import Iterable, Sequence
from typing import Final
from uuid import UUID

from server import audit, ids
from server.caller import Caller
from server.database import Database
from server.memory.model import Memory, Tier
from server.memory.rows import MEMORY_COLUMNS, SCORE_COLUMNS, memory_from

# LATERAL and OFFSET 0 for the reason that SearchStore gives.
_OWN: Final = f"""
    SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}
      FROM memories AS memory
      CROSS JOIN LATERAL (
           SELECT {SCORE_COLUMNS}
             FROM memory_scores
            WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
              AND memory_id = memory.id
           OFFSET 0
           ) AS scores
     WHERE memory.tenant_id = caller.tenant_id AND memory.user_id = caller.user_id
"""  # noqa: S608 - put together from constants


class BulkStore:
    """Reads memories of one user at a time, archived ones too."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def some(self, caller: Caller, memory_ids: Sequence[UUID]) -> list[Memory]:
        """Return those of the memories that are there."""
        rows = await self._database.fetch(
            caller, f"{_OWN} AND memory.id = ANY ($3)", list(memory_ids)
        )
        return [memory_from(row) for row in rows]

    async def page(
        self, caller: Caller, tiers: Iterable[Tier], *, after: UUID, until: UUID, limit: int
    ) -> list[Memory]:
        """Return memories with ids above `after` up to `until`, lowest first, at most `limit`."""
        rows = await self._database.fetch(
            caller,
            f"""
            {_OWN} AND memory.id > $3 AND memory.id <= $4 AND tier = ANY ($5)
             ORDER BY memory.id
             LIMIT $6
            """,
            after,
            until,
            [tier.value for tier in tiers],
            limit,
        )
        return [memory_from(row) for row in rows]

    async def note_export(self, caller: Caller) -> None:
        """Say in the audit log that everything is read."""
        async with self._database.transaction(caller) as connection:
            await audit.record(
                connection, caller, "memory.export", ids.show(ids.USER, caller.user_id)
            )
