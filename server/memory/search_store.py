"""Finding memories in Postgres: by page and by words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

from server import consent, ids
from server.caller import Caller
from server.database import Database
from server.errors import ConsentMissing
from server.memory import filters, ranking
from server.memory.conversation import sparse
from server.memory.model import Candidate, Filter, Memory
from server.memory.rows import (
    CANDIDATE_ARRAYS,
    CANDIDATE_COLUMNS,
    CANDIDATE_NAMES,
    MEMORY_COLUMNS,
    SCORE_COLUMNS,
    candidates_from,
    memory_from,
)
from server.preferences import Preferences, preferences

_SAMPLE = 4_096
"""How many of a user's memories the word frequencies are taken from."""


# What a user's memories and settings are at, and whether they may be looked at.
_STANDING: Final = """
    consented('memory.store') AS may_store,
    coalesce((SELECT data_version
                FROM memory_usage
               WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id), 0)
        AS data_version,
    coalesce((SELECT version
                FROM settings
               WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id), 0)
        AS settings_version
"""

# The rest of the memories whose ids are `wanted_id`, one by one.
_WHOLE: Final = f"""
    CROSS JOIN LATERAL (
         SELECT {MEMORY_COLUMNS}
           FROM memories
          WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
            AND id = wanted_id AND archived_at IS NULL
         OFFSET 0
         ) AS memory
    CROSS JOIN LATERAL (
         SELECT {SCORE_COLUMNS}
           FROM memory_scores
          WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
            AND memory_id = wanted_id
         OFFSET 0
         ) AS scores
"""  # noqa: S608 - constants

_IN_THE_FIRST_ROW: Final = ", ".join(
    f"CASE WHEN coalesce(place, 1) = 1 THEN {array} END AS {array}" for array in CANDIDATE_NAMES
)

# Rows of that, the first with the candidates as arrays; each with one of the memories that come
# whole, the best by their words. All of it is one snapshot and one round trip.
# The words are compared once for each row; all else is worked out for the few that are left. Scores
# are looked up one by one (LATERAL, kept apart by OFFSET 0): of a user whom the statistics have not
# met yet the planner expects one row, and would compare every memory with every score.
_QUERY: Final = f"""
    SELECT standing.*, whole.*, {_IN_THE_FIRST_ROW}
      FROM (SELECT {_STANDING} OFFSET 0) AS standing
      CROSS JOIN LATERAL (
           SELECT {CANDIDATE_ARRAYS}
             FROM (
                  SELECT {CANDIDATE_COLUMNS}, -distance AS amount
                    FROM (
                         SELECT *
                           FROM (
                                SELECT id, speaker, session_id, occurred_at, size_bytes, tags,
                                       terms <#> $3 AS distance
                                  FROM memories
                                 WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
                                   AND may_store AND archived_at IS NULL AND {{passing}}
                                OFFSET 0
                                ) AS compared
                          WHERE distance < 0
                          ORDER BY distance, id
                          LIMIT $4
                         ) AS best
                  ) AS memory
             CROSS JOIN LATERAL (
                  SELECT score
                    FROM memory_scores
                   WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
                     AND memory_id = memory.id
                  OFFSET 0
                  ) AS scores
           ) AS candidate
      LEFT JOIN LATERAL (
           SELECT place, memory.*, scores.*
             FROM unnest(ids[1:$5]) WITH ORDINALITY AS wanted (wanted_id, place)
             {_WHOLE}
           ) AS whole ON true
"""  # noqa: S608 - constants


class Versions(NamedTuple):
    """What an answer depends on, besides the question, the time and the short term."""

    data: int
    """Of the user's memories."""
    settings: int


@dataclass(frozen=True, slots=True)
class Words:
    """What the words of a question brought."""

    candidates: Sequence[Candidate]
    versions: Versions
    _whole: Mapping[UUID, Mapping[str, Any]] = field(default_factory=dict)

    def memories(self, memory_ids: Iterable[UUID]) -> dict[UUID, Memory]:
        """Return those of some memories that came whole."""
        rows = {one: self._whole[one] for one in memory_ids if one in self._whole}
        return {one: memory_from(row) for one, row in rows.items()}


class SearchStore:
    """Finds memories of one user at a time. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, caller: Caller, which: Filter, *, before: UUID | None, limit: int
    ) -> list[Memory]:
        """Return memories with ids below `before`, highest first, at most `limit`."""
        passing, parameters = filters.passing(which, 6)
        async with self._database.transaction(caller, in_index_order=True) as connection:
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
                   AND memory.id < $3 AND (archived_at IS NOT NULL) = $4 AND {passing}
                 ORDER BY memory.id DESC
                 LIMIT $5
                """,  # noqa: S608 - constants
                caller.tenant_id,
                caller.user_id,
                before or ids.ABOVE_ALL,
                which.archived,
                limit,
                *parameters,
            )
        return [memory_from(row) for row in rows]

    async def profile(self, caller: Caller) -> tuple[ranking.Lexicon, Preferences]:
        """Return the word frequencies of a user's newest memories, and what they chose."""
        async with self._database.transaction(caller, in_index_order=True) as connection:
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
        self,
        caller: Caller,
        terms: Mapping[int, float],
        which: Filter,
        limit: int,
        whole: int = 0,
    ) -> Words:
        """Return the memories that the weighted terms match best, at most `limit`.

        Args:
            caller: Whose memories.
            terms: What is looked for.
            which: Which of them are looked at.
            limit: How many are wanted.
            whole: How many of them come with all that there is of them, the best.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
        """
        passing, parameters = filters.passing(which, 6)
        rows = await self._database.fetch(
            caller,
            _QUERY.format(passing=passing),
            sparse(terms),
            # Postgres does not even begin to look for 0 memories.
            limit if terms and which.durable_tiers else 0,
            whole,
            *parameters,
        )
        first = min(rows, key=lambda row: row["place"] or 0)
        if not first["may_store"]:
            raise ConsentMissing(consent.MEMORY_STORE)
        return Words(
            candidates_from(first),
            _versions_from(first),
            {row["id"]: row for row in rows if row["place"]},
        )

    async def versions(self, caller: Caller, *, with_vectors: bool) -> Versions:
        """Return what answers to the caller depend on, if there may be any.

        Args:
            caller: Who asks.
            with_vectors: Whether the meaning of memories counts.

        Raises:
            ConsentMissing: The user has not consented to memory.store, or to memory.embed where
                the meaning counts.
        """
        (row,) = await self._database.fetch(
            caller, f"SELECT {_STANDING}, consented('memory.embed') AS may_embed"
        )
        if not row["may_store"]:
            raise ConsentMissing(consent.MEMORY_STORE)
        if with_vectors and not row["may_embed"]:
            raise ConsentMissing(consent.MEMORY_EMBED)
        return _versions_from(row)

    async def fetch(self, caller: Caller, memory_ids: Sequence[UUID]) -> dict[UUID, Memory]:
        """Return those of some memories that are active, in no order."""
        if not memory_ids:
            return {}
        rows = await self._database.fetch(
            caller,
            f"""
            SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}
              FROM unnest($3::uuid[]) AS wanted (wanted_id) {_WHOLE}
            """,  # noqa: S608 - constants
            memory_ids,
        )
        return {row["id"]: memory_from(row) for row in rows}


def _versions_from(row: Mapping[str, Any]) -> Versions:
    return Versions(row["data_version"], row["settings_version"])
