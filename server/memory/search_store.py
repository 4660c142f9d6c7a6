"""Finding memories in Postgres: by page and by words."""

from collections.abc import Mapping
from uuid import UUID

from server import consent
from server.caller import Caller
from server.database import Database
from server.memory import ranking
from server.memory.conversation import sparse
from server.memory.model import Filter, Found, Memory
from server.memory.rows import MEMORY_COLUMNS, SCORE_COLUMNS, memory_from
from server.preferences import Preferences, preferences

_SAMPLE = 4_096
"""How many of a user's memories the word frequencies are taken from."""


class SearchStore:
    """Finds memories of one user at a time. Every method is one transaction.

    Scores are looked up for each memory (LATERAL, kept apart by OFFSET 0): of a user whom the
    statistics have not met yet the planner expects one row, and would compare every memory with
    every score.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, caller: Caller, which: Filter, *, before: UUID | None, limit: int
    ) -> list[Memory]:
        """Return memories with ids below `before`, highest first, at most `limit`."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                f"""
                SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}
                  FROM memories AS memory
                  CROSS JOIN LATERAL (
                       SELECT {SCORE_COLUMNS}
                         FROM memory_scores
                        WHERE tenant_id = $1 AND user_id = $2 AND memory_id = memory.id
                       OFFSET 0
                       ) AS scores
                 WHERE memory.tenant_id = $1 AND memory.user_id = $2
                   AND ($3::uuid IS NULL OR memory.id < $3)
                   AND tier = ANY ($4)
                   AND tags @> $5
                   AND ($6 = '' OR session_id = $6)
                   AND ($7::timestamptz IS NULL OR occurred_at >= $7)
                   AND ($8::timestamptz IS NULL OR occurred_at < $8)
                   AND (archived_at IS NOT NULL) = $9
                 ORDER BY memory.id DESC
                 LIMIT $10
                """,  # noqa: S608 - constants
                caller.tenant_id,
                caller.user_id,
                before,
                which.durable_tiers,
                list(which.tags),
                which.session_id,
                which.occurred_after,
                which.occurred_before,
                which.archived,
                limit,
            )
        return [memory_from(row) for row in rows]

    async def profile(self, caller: Caller) -> tuple[ranking.Lexicon, Preferences]:
        """Return the word frequencies of a user's newest memories, and what they chose."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT terms
                  FROM memories
                 WHERE tenant_id = $1 AND user_id = $2
                 ORDER BY id DESC
                 LIMIT $3
                """,
                caller.tenant_id,
                caller.user_id,
                _SAMPLE,
            )
            chosen = await preferences(connection, caller)
        lexicon = ranking.Lexicon.of(row["terms"].indices() for row in rows)
        return lexicon, chosen

    async def query(
        self, caller: Caller, terms: Mapping[int, float], which: Filter, limit: int
    ) -> list[Found]:
        """Return the memories that the weighted terms match best, best first.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
        """
        rows = []
        if terms and which.durable_tiers:
            rows = await self._database.fetch(
                caller,
                f"""
                SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}, lexical
                  FROM (
                        SELECT *, -(terms <#> $3) AS lexical
                          FROM memories
                         WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
                           AND consented('memory.store')
                           AND archived_at IS NULL
                           AND tier = ANY ($4)
                           AND tags @> $5
                           AND ($6 = '' OR session_id = $6)
                           AND ($7::timestamptz IS NULL OR occurred_at >= $7)
                           AND ($8::timestamptz IS NULL OR occurred_at < $8)
                           AND (terms <#> $3) < 0
                         ORDER BY terms <#> $3, id
                         LIMIT $9
                       ) AS memory
                  CROSS JOIN LATERAL (
                       SELECT {SCORE_COLUMNS}
                         FROM memory_scores
                        WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
                          AND memory_id = memory.id
                       OFFSET 0
                       ) AS scores
                 ORDER BY lexical DESC, id
                """,  # noqa: S608 - constants
                sparse(terms),
                which.durable_tiers,
                list(which.tags),
                which.session_id,
                which.occurred_after,
                which.occurred_before,
                limit,
            )
        if not rows:  # for want of matches, or of consent?
            async with self._database.transaction(caller) as connection:
                await consent.require(connection, consent.MEMORY_STORE)
        return [Found(memory_from(row), row["lexical"]) for row in rows]
