"""Rows of many users, made in the database: what one user's queries must find their way through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from server.caller import Caller


async def fill(
    owner: asyncpg.Connection, caller: Caller, memories: int, *, talks: bool = True
) -> None:
    """Give a user memories of three words each; a fifth of them are the turns of a talk."""
    await owner.execute(
        """
        WITH made AS (
            INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source, session_id,
                                  session_position, occurred_at, size_bytes, content_hash,
                                  created_at, updated_at, terms)
            SELECT $1, $2, gen_random_uuid(), 'long_term', 'number ' || n, '{}', 'chat',
                   CASE WHEN $4 AND n % 5 = 0 THEN 'talk' ELSE '' END,
                   CASE WHEN $4 AND n % 5 = 0 THEN n END,
                   now(), 100, sha256(n::text::bytea), now(), now(),
                   format('{%s:1,%s:1,%s:1}/1000000000', n % 1000 + 1, n % 999 + 1001,
                          n % 998 + 2001)::sparsevec
              FROM generate_series(1, $3) AS n
            RETURNING id
        )
        INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at)
        SELECT $1, $2, id, now() FROM made
        """,
        caller.tenant_id,
        caller.user_id,
        memories,
        talks,
    )
    await owner.execute("ANALYZE memories, memory_scores")


@asynccontextmanager
async def graph_made_anew(owner: asyncpg.Connection, dimension: int) -> AsyncIterator[None]:
    """Leave a graph alone until all vectors are there: to make it at once is ten times as fast."""
    name = f"embeddings_graph_{dimension}"
    definition = await owner.fetchval("SELECT pg_get_indexdef($1::text::regclass)", name)
    await owner.execute(f"DROP INDEX {name}")
    try:
        yield
    finally:
        await owner.execute(definition)


async def embed(
    owner: asyncpg.Connection, caller: Caller, model: str, dimension: int, *, in_graph: bool
) -> None:
    """Give every memory of a user a random direction."""
    await owner.execute(
        """
        INSERT INTO embedding_models (tenant_id, user_id, model, dimension, in_graph)
        VALUES ($1, $2, $3, $4, $5)
        """,
        caller.tenant_id,
        caller.user_id,
        model,
        dimension,
        in_graph,
    )
    await owner.execute(
        """
        INSERT INTO embeddings (tenant_id, user_id, model, memory_id, dimension, in_graph,
                                content_hash, vector)
        SELECT $1, $2, $3, id, $4, $5, content_hash,
               (SELECT l2_normalize(array_agg(random_normal())::vector)
                  FROM generate_series(1, $4) WHERE id IS NOT NULL)::halfvec
          FROM memories
         WHERE user_id = $2
        """,
        caller.tenant_id,
        caller.user_id,
        model,
        dimension,
        in_graph,
    )
    await owner.execute("ANALYZE embeddings")
