"""Rows of many users, made in the database: what one user's queries must find their way through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import UUID, uuid4

import asyncpg

from local.postgres import OWNER, SUPERUSER
from local.servers import Stores
from server.caller import Caller
from server.migrate import migrate, read_migrations

FIRST_TURN = datetime(2026, 1, 1, tzinfo=UTC)
"""When the first turn of all talks occurred."""


@asynccontextmanager
async def database_for(stores: Stores, module: str) -> AsyncIterator[str]:
    """Make a database for the tests of a module: to fill one takes seconds, so would emptying it.

    Yields its name.
    """
    await stores.postgres.provision(module)
    owner = await asyncpg.connect(stores.postgres.dsn(OWNER, module))
    await migrate(owner, read_migrations())
    await owner.close()
    yield module
    superuser = await asyncpg.connect(stores.postgres.dsn(SUPERUSER, "postgres"))
    await superuser.execute(f"DROP DATABASE {module} WITH (FORCE)")
    await superuser.close()


async def fill(
    owner: asyncpg.Connection,
    caller: Caller,
    memories: int,
    *,
    talks: bool = True,
    is_known: bool = True,
    scope: str = "private",
) -> None:
    """Give a user memories of three words each; a fifth of them are the turns of a talk.

    Args:
        owner: A connection past row-level security.
        caller: The user.
        memories: How many.
        talks: Whether there are turns among them.
        is_known: Whether the planner is told.
        scope: Who may see them.
    """
    await owner.execute(
        """
        WITH made AS (
            INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source, session_id,
                                  session_position, occurred_at, size_bytes, content_hash,
                                  created_at, updated_at, scope, terms)
            SELECT $1, $2, gen_random_uuid(), 'long_term', 'number ' || n, '{}', 'chat',
                   CASE WHEN $4 AND n % 5 = 0 THEN 'talk' ELSE '' END,
                   CASE WHEN $4 AND n % 5 = 0 THEN n END,
                   now(), 100, sha256(n::text::bytea), now(), now(), $5,
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
        scope,
    )
    if is_known:
        await owner.execute("ANALYZE memories, memory_scores")


async def talk(owner: asyncpg.Connection, caller: Caller, turns: int) -> None:
    """Give a user memories that are the turns of talks, 40 of each, one after the other.

    A tenth has the tag "tenth", a quarter is permanent, and each occurred a minute after the one
    before.

    Args:
        owner: A connection past row-level security.
        caller: The user.
        turns: How many.
    """
    await owner.execute(
        """
        WITH made AS (
            INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source, session_id,
                                  session_position, occurred_at, size_bytes, content_hash,
                                  created_at, updated_at, terms)
            SELECT $1, $2, gen_random_uuid(),
                   CASE WHEN n % 4 = 0 THEN 'permanent' ELSE 'long_term' END, 'number ' || n,
                   CASE WHEN n % 10 = 0 THEN '{tenth}' ELSE '{}' END::text[], 'chat',
                   'talk ' || n / 40, n % 40, $4::timestamptz + n * interval '1 minute', 100,
                   sha256(n::text::bytea), now(), now(),
                   format('{%s:1}/1000000000', n % 1000 + 1)::sparsevec
              FROM generate_series(0, $3 - 1) AS n
            RETURNING id
        )
        INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at)
        SELECT $1, $2, id, now() FROM made
        """,
        caller.tenant_id,
        caller.user_id,
        turns,
        FIRST_TURN,
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
    """Give every memory of a user a random direction: the same ones after the same setseed."""
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
          FROM (SELECT id, content_hash FROM memories
                 WHERE user_id = $2 ORDER BY occurred_at, content_hash OFFSET 0) AS memories
        """,
        caller.tenant_id,
        caller.user_id,
        model,
        dimension,
        in_graph,
    )
    await owner.execute("ANALYZE embeddings")


async def crowd(owner: asyncpg.Connection, users: int, each: int, model: str) -> list[UUID]:
    """Give new users memories with vectors of 64 numbers, a million in a quarter of a minute.

    One of 50 memories is shared.

    Returns:
        Their ids.
    """
    whose = sorted(uuid4() for _ in range(users))
    # As a replica, so that neither quotas nor foreign keys are looked at for each of them.
    await owner.execute("SET session_replication_role = replica")
    for statement in _CROWD:
        await owner.execute(statement, whose, each, model)
    await owner.execute("RESET session_replication_role")
    return whose


# Each takes users, memories of each, and model; none of it is worked out for a row that can be
# looked up in an array.
_WHOSE = "SELECT whose FROM unnest($1::uuid[]) AS whose WHERE $2 > 0 AND $3 <> ''"
_CROWD = (
    f"""
    INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
    SELECT whose, whose, purpose, 1, true
      FROM ({_WHOSE}) AS others, unnest(ARRAY['memory.store', 'memory.embed']) AS purpose
    """,
    f"INSERT INTO memory_usage (tenant_id, user_id) SELECT whose, whose FROM ({_WHOSE}) AS others",
    """
    INSERT INTO embedding_models (tenant_id, user_id, model, dimension)
    SELECT whose, whose, $3, 64 FROM unnest($1::uuid[]) AS whose WHERE $2 > 0
    """,
    """
    INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source, session_id,
                          session_position, occurred_at, size_bytes, content_hash, created_at,
                          updated_at, scope, terms)
    SELECT whose[n / $2 + 1], whose[n / $2 + 1],
           ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'long_term',
           'number ' || n, '{}', 'chat', CASE WHEN n % 5 = 0 THEN 'talk' ELSE '' END,
           CASE WHEN n % 5 = 0 THEN n END, now(), 100, sha256(n::text::bytea), now(), now(),
           CASE WHEN n % 50 = 0 THEN 'shared' ELSE 'private' END, terms[n % 1000 + 1]
      FROM generate_series(0, $2 * cardinality($1::uuid[]) - 1) AS n,
           (SELECT $1::uuid[] AS whose,
                   ARRAY(SELECT format('{%s:1,%s:1,%s:1}/1000000000', n + 1, n % 999 + 1001,
                                       n % 998 + 2001)::sparsevec
                           FROM generate_series(0, 999) AS n) AS terms) AS made
     WHERE $3 <> ''
    """,
    """
    INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at)
    SELECT tenant_id, user_id, id, now()
      FROM memories WHERE user_id = ANY ($1) AND $2 > 0 AND $3 <> ''
    """,
    """
    INSERT INTO embeddings (tenant_id, user_id, model, memory_id, dimension, in_graph,
                            content_hash, vector)
    SELECT tenant_id, user_id, $3, id, 64, false, content_hash,
           vectors[get_byte(content_hash, 0) + 1]
      FROM memories,
           (SELECT ARRAY(SELECT (SELECT l2_normalize(array_agg(random_normal())::vector)
                                   FROM generate_series(1, 64) WHERE n > 0)::halfvec
                           FROM generate_series(1, 256) AS n) AS vectors) AS made
     WHERE user_id = ANY ($1) AND $2 > 0
    """,
)
