"""Finding memories in Postgres by what they mean."""

from functools import cache
from typing import Final

import asyncpg
from pgvector import HalfVector

from server import consent
from server.caller import Caller
from server.database import Connection, Database
from server.memory import ranking
from server.memory.conversation import REACH
from server.memory.embeddings import Embedding, check_dimension
from server.memory.model import Filter, Near
from server.memory.rows import MEMORY_COLUMNS, SCORE_COLUMNS, memory_from

# A sum over the turn, one over those within one place and one over those within two, so weighted
# that each turn counts in all as its words do in the lexical leg.
_OWN: Final = ranking.NEIGHBOURHOOD[0] - ranking.NEIGHBOURHOOD[1]
_BESIDE: Final = ranking.NEIGHBOURHOOD[1] - ranking.NEIGHBOURHOOD[2]
_AROUND: Final = ranking.NEIGHBOURHOOD[2]

# Without iterative scans a graph yields its nearest vectors of all users and no more. Strict order
# drops what is found late: it recalled 0.81 to 0.96 of the nearest 10 where relaxed order, sorted
# afterwards, recalled all. Nor may the planner sort all vectors of the user instead: they are many.
_GRAPH_SETTINGS: Final = """
    SET LOCAL hnsw.iterative_scan = relaxed_order;
    SET LOCAL hnsw.max_scan_tuples = 20000;
    SET LOCAL hnsw.ef_search = 200;
    SET LOCAL enable_sort = off
"""

_PASSES: Final = """
    tier = ANY ($5) AND tags @> $6 AND ($7 = '' OR session_id = $7)
    AND ($8::timestamptz IS NULL OR occurred_at >= $8)
    AND ($9::timestamptz IS NULL OR occurred_at < $9)
"""
# Rows are looked up one by one (LATERAL, kept apart by OFFSET 0): of a user whom the statistics
# have not met yet the planner expects one row, and would compare every vector with every memory.
_VECTORS: Final = """
    embeddings AS embedding
    CROSS JOIN LATERAL (
        SELECT id, tier, tags, session_id, session_position, occurred_at
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = embedding.memory_id
           AND content_hash = embedding.content_hash AND archived_at IS NULL
        OFFSET 0
    ) AS memory
"""
_OF_MODEL: Final = "embedding.tenant_id = $1 AND embedding.user_id = $2 AND embedding.model = $3"

_SMOOTHED: Final = f"""
    compared AS (
        SELECT memory.id, session_id, session_position, -(vector <#> $4) AS similarity,
               {_PASSES} AS passes
          FROM {_VECTORS}
         WHERE {_OF_MODEL} AND {{condition}}
    ), smoothed AS (
        SELECT id, passes,
               ($11 * similarity + $12 * sum(similarity) OVER beside
                                 + $13 * sum(similarity) OVER around)
               / ($11 + $12 * count(*) OVER beside + $13 * count(*) OVER around) AS similarity
          FROM compared
        WINDOW talk AS (PARTITION BY session_id, CASE WHEN session_position IS NULL THEN id END
                            ORDER BY session_position),
               beside AS (talk RANGE BETWEEN 1 PRECEDING AND 1 FOLLOWING),
               around AS (talk RANGE BETWEEN 2 PRECEDING AND 2 FOLLOWING)
    ), nearest AS (
        SELECT id AS nearest_id, similarity
          FROM smoothed
         WHERE passes
         ORDER BY similarity DESC, id
         LIMIT $10
    )
    SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}, similarity, {{reached}} AS reached
      FROM nearest
      CROSS JOIN LATERAL (
            SELECT {MEMORY_COLUMNS}
              FROM memories
             WHERE tenant_id = $1 AND user_id = $2 AND id = nearest_id
            OFFSET 0
           ) AS memory
      CROSS JOIN LATERAL (
            SELECT {SCORE_COLUMNS}
              FROM memory_scores
             WHERE tenant_id = $1 AND user_id = $2 AND memory_id = nearest_id
            OFFSET 0
           ) AS scores
     ORDER BY similarity DESC, id
"""  # noqa: S608 - put together from constants

_SCAN: Final = "WITH" + _SMOOTHED.format(condition="true", reached="0")


@cache
def _graph_query(dimension: int) -> str:
    """Return the query that takes candidates from a graph, then looks at the turns around them."""
    smoothed = _SMOOTHED.format(
        condition="embedding.memory_id = ANY (ARRAY(SELECT id FROM candidate))",
        reached="(SELECT count(*) FROM in_graph)",
    )
    return f"""
    WITH in_graph AS MATERIALIZED (
        SELECT memory.id, session_id, session_position
          FROM {_VECTORS}
         WHERE {_OF_MODEL} AND in_graph AND dimension = {dimension} AND {_PASSES}
         ORDER BY vector::halfvec({dimension}) <#> $4::halfvec({dimension})
         LIMIT $10
    ), outside AS MATERIALIZED (
        SELECT memory.id, session_id, session_position
          FROM {_VECTORS}
         WHERE {_OF_MODEL} AND NOT in_graph AND {_PASSES}
         ORDER BY vector <#> $4
         LIMIT $10
    ), found AS (
        SELECT * FROM in_graph UNION ALL SELECT * FROM outside
    ), candidate AS (
        SELECT id FROM found
         UNION
        SELECT memory.id
          FROM found
          JOIN memories AS memory
            ON memory.tenant_id = $1 AND memory.user_id = $2
           AND memory.session_id <> '' AND memory.session_id = found.session_id
           AND memory.session_position BETWEEN found.session_position - {2 * REACH}
                                           AND found.session_position + {2 * REACH}
    ), {smoothed}
    """  # noqa: S608 - put together from constants and an integer


class EmbeddingSearch:
    """Finds memories of one user at a time by vectors. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def nearest(
        self, caller: Caller, embedding: Embedding, which: Filter, limit: int
    ) -> list[Near]:
        """Return the memories that are nearest in meaning, nearest first.

        A turn counts together with the turns around it: its similarity is the mean of their
        cosines, weighted as their words are. Memories without a vector of the model are left out.

        Raises:
            ConsentMissing: The user has not consented to memory.embed.
            InvalidArgument: The vector has another dimension than those of its model.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_EMBED)
            model = await _model(connection, caller, embedding.model)
            if model is None or not which.durable_tiers:
                return []
            check_dimension(embedding, model["dimension"], "embedding.values")
            arguments = _arguments(caller, embedding, which, limit)
            rows: list[asyncpg.Record] = []
            if model["in_graph"]:
                rows = await _search_graph(connection, embedding.dimension, arguments)
            if not rows or rows[0]["reached"] < limit:
                # The graph gave up, or there are no more: only a look at every vector can tell.
                rows = await connection.fetch(_SCAN, *arguments)
        return [Near(memory_from(row), row["similarity"]) for row in rows]


def _arguments(
    caller: Caller, embedding: Embedding, which: Filter, limit: int
) -> tuple[object, ...]:
    return (
        caller.tenant_id,
        caller.user_id,
        embedding.model,
        HalfVector(embedding.values),
        which.durable_tiers,
        list(which.tags),
        which.session_id,
        which.occurred_after,
        which.occurred_before,
        limit,
        _OWN,
        _BESIDE,
        _AROUND,
    )


async def _model(connection: Connection, caller: Caller, model: str) -> asyncpg.Record | None:
    return await connection.fetchrow(
        """
        SELECT dimension, in_graph
          FROM embedding_models
         WHERE tenant_id = $1 AND user_id = $2 AND model = $3
        """,
        caller.tenant_id,
        caller.user_id,
        model,
    )


async def _search_graph(
    connection: Connection, dimension: int, arguments: tuple[object, ...]
) -> list[asyncpg.Record]:
    await connection.execute(_GRAPH_SETTINGS)
    rows: list[asyncpg.Record] = await connection.fetch(_graph_query(dimension), *arguments)
    await connection.execute("SET LOCAL enable_sort = on")
    return rows
