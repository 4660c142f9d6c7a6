"""Hot statements reach one user's rows by an index, however many rows others have."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from server.caller import Caller
from server.database import Database, open_pool
from server.memory.embedding_search import EmbeddingSearch
from server.memory.embeddings import read_embedding
from server.memory.model import Filter
from server.memory.search_store import SearchStore
from server.memory.store import MemoryStore
from tests.conftest import Urls, new_caller
from tests.memory.crowds import embed, fill, graph_made_anew
from tests.memory.meanings import decide

OTHERS = 20
THEIRS = 1_000
DIMENSION = 64
QUESTION = read_embedding("tiny", [1.0] * DIMENSION, "embedding")


@dataclass(frozen=True, slots=True)
class Scan:
    """How a plan reaches a table."""

    kind: str
    table: str
    index: str


class Watched:
    """A database of one connection, so that its statements can be noted and explained."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self.database = Database(pool)

    async def scans(self, caller: Caller, part: str, call: Awaitable[object]) -> set[Scan]:
        """Return how the statement of a call reaches tables that has this part in its text."""
        noted: list[Any] = []
        async with self._pool.acquire() as connection:
            only = connection._con
        with only.query_logger(noted.append):
            await call
        (statement,) = {one.query: one for one in noted if part in one.query}.values()
        settings = [one.query for one in noted if "hnsw." in one.query][:1]
        async with self.database.transaction(caller) as connection:
            for setting in settings if part == "in_graph AS" else ():
                await connection.execute(setting)
            plan = await connection.fetchval(
                f"EXPLAIN (FORMAT json) {statement.query}", *statement.args
            )
        return set(_scans(json.loads(plan)[0]["Plan"]))


def _scans(plan: dict[str, Any]) -> Iterator[Scan]:
    if "Relation Name" in plan:
        yield Scan(plan["Node Type"], plan["Relation Name"], plan.get("Index Name", ""))
    if plan["Node Type"] == "Bitmap Index Scan":
        yield Scan(plan["Node Type"], "", plan["Index Name"])
    for child in plan.get("Plans", ()):
        yield from _scans(child)


@pytest_asyncio.fixture
async def watched(urls: Urls) -> AsyncIterator[Watched]:
    pool = await open_pool(urls.application, size=1, name="plans")
    yield Watched(pool)
    await pool.close()


@pytest_asyncio.fixture(params=[10, 600])
async def caller(
    database: Database, owner: asyncpg.Connection, request: pytest.FixtureRequest
) -> Caller:
    """A user with few memories among others with many; all have vectors."""
    async with graph_made_anew(owner, DIMENSION):
        for _ in range(OTHERS):
            other = await new_caller(database)
            await fill(owner, other, THEIRS)
            await embed(owner, other, "tiny", DIMENSION, in_graph=False)
        caller = await new_caller(database)
        await decide(database, caller, "memory.embed", granted=True)
        await fill(owner, caller, request.param)
        await embed(owner, caller, "tiny", DIMENSION, in_graph=False)
    await owner.execute("ANALYZE")
    return caller


def indexes(scans: set[Scan]) -> set[str]:
    """Return the indexes that are used; no table may be read as a whole."""
    assert not [scan for scan in scans if scan.kind == "Seq Scan"], scans
    return {scan.index for scan in scans if scan.index}


async def test_memory_page_and_words_are_found_by_the_users_own_index(
    watched: Watched, caller: Caller, owner: asyncpg.Connection
) -> None:
    search = SearchStore(watched.database)
    newest = await owner.fetchval("SELECT id FROM memories WHERE user_id = $1", caller.user_id)
    keys = {"memories_pkey", "memory_scores_pkey"}
    for part, call in [
        ("FROM memories", MemoryStore(watched.database).get(caller, newest)),
        ("FROM memories", search.page(caller, Filter(), before=None, limit=20)),
        ("AS lexical", search.query(caller, {1: 1.0, 5: 2.0}, Filter(), 50)),
        ("SELECT terms", search.profile(caller)),
    ]:
        assert indexes(await watched.scans(caller, part, call)) <= keys


async def test_scanned_vectors_are_found_by_the_users_own_index(
    watched: Watched, caller: Caller
) -> None:
    call = EmbeddingSearch(watched.database).nearest(caller, QUESTION, Filter(), 100)
    used = indexes(await watched.scans(caller, "compared AS", call))
    assert used <= {
        "embeddings_pkey",
        "embeddings_by_memory",
        "memories_pkey",
        "memory_scores_pkey",
    }
    assert {"memories_pkey", "memory_scores_pkey"} < used


async def test_vectors_beyond_the_scanned_ones_are_found_by_the_graph(
    watched: Watched, caller: Caller, owner: asyncpg.Connection
) -> None:
    async with graph_made_anew(owner, DIMENSION):
        await owner.execute("UPDATE embeddings SET in_graph = true")
        await owner.execute("UPDATE embedding_models SET in_graph = true")
    await owner.execute("ANALYZE embeddings")
    call = EmbeddingSearch(watched.database).nearest(caller, QUESTION, Filter(), 100)
    used = indexes(await watched.scans(caller, "in_graph AS", call))
    assert f"embeddings_graph_{DIMENSION}" in used
