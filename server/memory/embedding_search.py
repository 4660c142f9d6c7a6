"""Finding memories in Postgres by what they mean."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import asyncpg
from pgvector import HalfVector

from server import consent
from server.caller import Caller
from server.database import Database
from server.errors import ConsentMissing
from server.memory import filters, ranking
from server.memory.conversation import REACH
from server.memory.embeddings import Embedding, check_dimension
from server.memory.metrics import SEARCH_SECONDS
from server.memory.model import Candidate, Filter
from server.memory.rows import CANDIDATE_ARRAYS, CANDIDATE_COLUMNS, candidates_from

# A sum over the turn, one over those within one place and one over those within two, so weighted
# that each turn counts in all as its words do in the lexical leg.
_OWN: Final = ranking.NEIGHBOURHOOD[0] - ranking.NEIGHBOURHOOD[1]
_BESIDE: Final = ranking.NEIGHBOURHOOD[1] - ranking.NEIGHBOURHOOD[2]
_AROUND: Final = ranking.NEIGHBOURHOOD[2]

# A graph knows each turn alone; the best with their neighbours are not all among the best alone.
# The more turns there are, the more of them stand in between: of turns that have nothing to do with
# each other, 5 √n lead to 0.99 of the best twenty, of 5 000 turns as of 100 000. Fewer than twice
# what is wanted are not worth a look.
_DEPTH_OF_ROOT: Final = 5
_DEPTH_OF_LIMIT: Final = 2

# What it costs to meet a vector in a graph, whosever it is: so many times what it costs to compare
# one of the user's that are read in a row.
_PRICE_OF_MEETING: Final = 15

# Without iterative scans a graph yields its nearest vectors of all users and no more. Strict order
# drops what is found late: it recalled 0.81 to 0.96 of the nearest 10 where relaxed order, sorted
# afterwards, recalled all. Nor may the planner sort all vectors of the user instead: they are many.
_GRAPH_SETTINGS: Final = """
    SET LOCAL hnsw.iterative_scan = relaxed_order;
    SET LOCAL hnsw.max_scan_tuples = 20000;
    SET LOCAL hnsw.ef_search = 200;
    SET LOCAL enable_sort = off
"""

# Rows are looked up one by one (LATERAL, kept apart by OFFSET 0): of a user whom the statistics
# have not met yet the planner expects one row, and would compare every vector with every memory.
_MEMORY: Final = """
    CROSS JOIN LATERAL (
        SELECT id, tier, tags, session_id, session_position, occurred_at
          FROM memories
         WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
           AND id = embedding.memory_id
           AND content_hash = embedding.content_hash AND archived_at IS NULL
        OFFSET 0
    ) AS memory
"""
_VECTORS: Final = f"embeddings AS embedding {_MEMORY}"
_OF_MODEL: Final = """
    embedding.tenant_id = caller.tenant_id AND embedding.user_id = caller.user_id
    AND embedding.model = $3
"""

# Materialized: otherwise each of the windows compares the vectors again, and sorts them.
_SMOOTHED: Final = f"""
    compared AS MATERIALIZED (
        SELECT memory.id, session_id, session_position, -(vector <#> $4) AS similarity,
               {{passing}} AS passes
          FROM {_VECTORS}
         WHERE {_OF_MODEL} AND {{condition}}
    ), smoothed AS (
        SELECT id, passes,
               ($6 * similarity + $7 * sum(similarity) OVER beside
                                + $8 * sum(similarity) OVER around)
               / ($6 + $7 * count(*) OVER beside + $8 * count(*) OVER around) AS similarity
          FROM compared
        WINDOW talk AS (PARTITION BY session_id, CASE WHEN session_position IS NULL THEN id END
                            ORDER BY session_position),
               beside AS (talk RANGE BETWEEN 1 PRECEDING AND 1 FOLLOWING),
               around AS (talk RANGE BETWEEN 2 PRECEDING AND 2 FOLLOWING)
    ), nearest AS (
        SELECT id AS nearest_id, similarity AS amount
          FROM smoothed
         WHERE passes
         ORDER BY similarity DESC, id
         LIMIT $5
    )
    SELECT {CANDIDATE_ARRAYS}, {{reached}} AS reached
      FROM nearest
      CROSS JOIN LATERAL (
            SELECT {CANDIDATE_COLUMNS}
              FROM memories
             WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id AND id = nearest_id
            OFFSET 0
           ) AS memory
      CROSS JOIN LATERAL (
            SELECT score
              FROM memory_scores
             WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
               AND memory_id = nearest_id
            OFFSET 0
           ) AS scores
"""  # noqa: S608 - put together from constants


@cache
def _scan_query(passing: str) -> str:
    """Return the query that looks at every vector.

    It brings one row: what is known of the model, and beside it the candidates, if a look at every
    vector is what finds them and the vectors can be compared.
    """
    smoothed = _SMOOTHED.format(
        passing=passing,
        condition="known.may_embed AND known.dimension = $9 AND (NOT known.in_graph OR $10)",
        reached="NULL",
    )
    return f"""
    SELECT known.*, candidate.*
      FROM (
           SELECT consented('memory.embed') AS may_embed, data_version, memories,
                  model.dimension, model.in_graph,
                  (SELECT reltuples
                     FROM pg_class
                    WHERE oid = to_regclass('embeddings_graph_' || model.dimension))
                      AS graph_vectors
             FROM (SELECT coalesce(max(data_version), 0) AS data_version,
                          coalesce(max(long_term_count + permanent_count), 0) AS memories
                     FROM memory_usage
                    WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id) AS usage
             LEFT JOIN embedding_models AS model
               ON model.tenant_id = caller.tenant_id AND model.user_id = caller.user_id
              AND model.model = $3
           OFFSET 0
           ) AS known
      CROSS JOIN LATERAL (
           WITH {smoothed}
           ) AS candidate
    """  # noqa: S608 - put together from constants


@cache
def _candidates_query(dimension: int, passing: str) -> str:
    """Return the query that looks for candidates, then at the turns around them.

    Vectors outside of the graph are compared one by one; so are all of them, unless $10 is true.
    Their distances are sorted without them, which takes no file.
    """
    # Those further off are compared for the sake of these: what is around them is not known.
    near = "memory.id = ANY (ARRAY(SELECT id FROM candidate WHERE is_near))"
    smoothed = _SMOOTHED.format(
        passing=f"{passing} AND {near}",
        condition="embedding.memory_id = ANY (ARRAY(SELECT id FROM candidate))",
        reached="(SELECT count(*) FROM in_graph)",
    )
    return f"""
    SELECT found.*
      FROM (VALUES ($1::uuid, $2::uuid)) AS caller (tenant_id, user_id), LATERAL (
    WITH in_graph AS MATERIALIZED (
        SELECT memory.id, session_id, session_position
          FROM {_VECTORS}
         WHERE {_OF_MODEL} AND $10 AND in_graph AND dimension = {dimension} AND {passing}
         ORDER BY vector::halfvec({dimension}) <#> $4::halfvec({dimension})
         LIMIT $9
    ), outside AS MATERIALIZED (
        SELECT memory.id, session_id, session_position
          FROM (
               SELECT memory_id, content_hash, vector <#> $4 AS distance
                 FROM embeddings AS embedding
                WHERE {_OF_MODEL} AND (NOT in_graph OR NOT $10)
                ORDER BY distance
               OFFSET 0
               ) AS embedding
          {_MEMORY}
         WHERE {passing}
         ORDER BY distance
         LIMIT $9
    ), found AS (
        SELECT * FROM in_graph UNION ALL SELECT * FROM outside
    ), candidate AS (
        SELECT id, true AS is_near FROM found
         UNION
        SELECT memory.id,
               abs(memory.session_position - found.session_position) <= {REACH} AS is_near
          FROM found
          JOIN memories AS memory
            ON memory.tenant_id = caller.tenant_id AND memory.user_id = caller.user_id
           AND memory.session_id <> '' AND memory.session_id = found.session_id
           AND memory.session_position BETWEEN found.session_position - {2 * REACH}
                                           AND found.session_position + {2 * REACH}
    ), {smoothed}
    ) AS found
    """  # noqa: S608 - put together from constants and an integer


@dataclass(frozen=True, slots=True)
class Nearest:
    """What the meaning of a question brought."""

    candidates: Sequence[Candidate]
    data_version: int
    """Of the user's memories, or an older one."""


class EmbeddingSearch:
    """Finds memories of one user at a time by vectors."""

    def __init__(self, database: Database, *, always_by_graph: bool = False) -> None:
        """Search vectors that are in a graph by it, always or where that is cheaper than a scan."""
        self._database = database
        self._always_by_graph = always_by_graph

    async def nearest(
        self, caller: Caller, embedding: Embedding, which: Filter, limit: int
    ) -> Nearest:
        """Return the memories that are nearest in meaning, at most `limit`.

        A turn counts together with the turns around it: its similarity is the mean of their
        cosines, weighted as their words are. Memories without a vector of the model are left out.

        Raises:
            ConsentMissing: The user has not consented to memory.embed.
            InvalidArgument: The vector has another dimension than those of its model.
        """
        started = time.perf_counter()
        scanned = await self._scan(caller, embedding, which, limit, despite_graph=False)
        version = scanned["data_version"]
        if scanned["dimension"] is None or not which.durable_tiers:
            return Nearest((), version)
        check_dimension(embedding, scanned["dimension"], "embedding.values")
        if not scanned["in_graph"]:
            SEARCH_SECONDS.labels("exact").observe(time.perf_counter() - started)
            return Nearest(candidates_from(scanned), version)
        found = await self._narrowed(caller, embedding, which, limit, scanned)
        return Nearest(candidates_from(found), version)

    async def _narrowed(
        self,
        caller: Caller,
        embedding: Embedding,
        which: Filter,
        limit: int,
        known: Mapping[str, Any],
    ) -> asyncpg.Record:
        """Find candidates in the way that costs less, and look at the turns around them."""
        asked = caller, embedding, which, limit
        depth = _depth(known["memories"], limit)
        if self._always_by_graph or _is_graph_cheaper(depth, known):
            with SEARCH_SECONDS.labels("index").time():
                found = await self._search(*asked, depth, by_graph=True)
            if found["reached"] >= depth:
                return found
            # The graph gave up, or there are no more: only a look at every vector can tell.
            with SEARCH_SECONDS.labels("exact").time():
                return await self._scan(*asked, despite_graph=True)
        with SEARCH_SECONDS.labels("exact").time():
            return await self._search(*asked, depth, by_graph=False)

    async def _scan(
        self,
        caller: Caller,
        embedding: Embedding,
        which: Filter,
        limit: int,
        *,
        despite_graph: bool,
    ) -> asyncpg.Record:
        """Look at every vector, unless some are in a graph or the dimension is not the model's."""
        passing, parameters = filters.passing(which, 11)
        (row,) = await self._database.fetch(
            caller,
            _scan_query(passing),
            *_arguments(embedding, limit),
            embedding.dimension,
            despite_graph,
            *parameters,
        )
        if not row["may_embed"]:
            raise ConsentMissing(consent.MEMORY_EMBED)
        return row

    async def _search(
        self,
        caller: Caller,
        embedding: Embedding,
        which: Filter,
        limit: int,
        depth: int,
        *,
        by_graph: bool,
    ) -> asyncpg.Record:
        """Look at the `depth` nearest turns and those around them."""
        passing, parameters = filters.passing(which, 11)
        async with self._database.transaction(caller) as connection:
            await connection.execute(_GRAPH_SETTINGS)
            return await connection.fetchrow(
                _candidates_query(embedding.dimension, passing),
                caller.tenant_id,
                caller.user_id,
                *_arguments(embedding, limit),
                depth,
                by_graph,
                *parameters,
            )


def _depth(memories: int, limit: int) -> int:
    """Return how many of the user's nearest vectors a graph is asked for."""
    return max(_DEPTH_OF_LIMIT * limit, math.ceil(_DEPTH_OF_ROOT * math.sqrt(memories)))


def _is_graph_cheaper(depth: int, known: Mapping[str, Any]) -> bool:
    """Tell whether a graph yields `depth` vectors at less cost than a look at all of a user's.

    The fewer of the graph's vectors are the user's, the more of others are met on the way.
    """
    memories: int = known["memories"]
    met: float = depth * (known["graph_vectors"] or 0) / max(memories, 1)
    return _PRICE_OF_MEETING * met < memories


def _arguments(embedding: Embedding, limit: int) -> tuple[object, ...]:
    return (embedding.model, HalfVector(embedding.values), limit, _OWN, _BESIDE, _AROUND)
