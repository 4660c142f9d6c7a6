"""Hot statements reach one user's rows by an index, however many rows others have."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio

from local.postgres import APPLICATION, OWNER, SUPERUSER
from local.servers import Stores
from server.caller import Caller
from server.database import Database, open_pool
from server.memory.embedding_search import EmbeddingSearch
from server.memory.embeddings import read_embedding
from server.memory.model import Filter
from server.memory.search_store import SearchStore
from server.memory.store import MemoryStore
from server.migrate import migrate, read_migrations
from tests.conftest import data_keys_of, new_caller
from tests.memory.crowds import crowd, embed, fill, graph_made_anew
from tests.memory.meanings import decide

OTHERS = 1_000
THEIRS = 500
IN_GRAPH = 20
"""So many of the others have their vectors in the graph."""
SIZES = (10, 600)
MODEL = "tiny"
DIMENSION = 64
QUESTION = read_embedding(MODEL, [1.0] * DIMENSION, "embedding")
LARGE = {"memories", "memory_scores", "embeddings"}


@dataclass(frozen=True, slots=True)
class Scan:
    """How a plan reaches a table."""

    kind: str
    table: str
    index: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How a statement was run, and how it is run once its plan fits all parameters."""

    scans: set[Scan]
    buffers: int
    """Pages of 8 KiB that were looked at."""

    @property
    def indexes(self) -> set[str]:
        """The indexes of large tables that are used; none of these is read as a whole."""
        assert not [scan for scan in self.scans if scan.kind == "Seq Scan" and scan.table in LARGE]
        return {scan.index for scan in self.scans if scan.table in LARGE | {""} and scan.index}


class Watched:
    """A database of one connection, so that its statements can be noted and explained."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self.database = Database(pool)

    async def plan(self, caller: Caller, part: str, call: Awaitable[object]) -> Plan:
        """Return the plan of the statement of a call that has this part in its text."""
        noted: list[Any] = []
        async with self._pool.acquire() as connection:
            only = connection._con
        with only.query_logger(noted.append):
            await call
        (statement,) = {one.query: one for one in noted if part in one.query}.values()
        settings = [one.query for one in noted if "hnsw." in one.query][:1]
        in_order = any("enable_sort" in one.query for one in noted)
        async with self.database.transaction(caller, in_index_order=in_order) as connection:
            for setting in settings:
                await connection.execute(setting)
            run = await connection.fetchval(
                f"EXPLAIN (ANALYZE, FORMAT json) {statement.query}", *statement.args
            )
            await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            await connection.execute(f"PREPARE hot AS {statement.query}")
            nulls = ", ".join(["NULL"] * len(statement.args))
            any_time = await connection.fetchval(f"EXPLAIN (FORMAT json) EXECUTE hot ({nulls})")
            await connection.execute("DEALLOCATE hot")
        ran = json.loads(run)[0]["Plan"]
        return Plan(
            {*_scans(ran), *_scans(json.loads(any_time)[0]["Plan"])},
            ran["Shared Hit Blocks"] + ran["Shared Read Blocks"],
        )


def _scans(plan: dict[str, Any]) -> Iterator[Scan]:
    if "Relation Name" in plan:
        yield Scan(plan["Node Type"], plan["Relation Name"], plan.get("Index Name", ""))
    if plan["Node Type"] == "Bitmap Index Scan":
        yield Scan(plan["Node Type"], "", plan["Index Name"])
    for child in plan.get("Plans", ()):
        yield from _scans(child)


@pytest_asyncio.fixture(scope="module")
async def name(stores: Stores) -> AsyncIterator[str]:
    """A database of this module: filling one takes seconds, and so would emptying it."""
    name = "plans"
    await stores.postgres.provision(name)
    owner = await asyncpg.connect(stores.postgres.dsn(OWNER, name))
    await migrate(owner, read_migrations())
    await owner.close()
    yield name
    superuser = await asyncpg.connect(stores.postgres.dsn(SUPERUSER, "postgres"))
    await superuser.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await superuser.close()


@pytest_asyncio.fixture(scope="module")
async def watched(stores: Stores, name: str) -> AsyncIterator[Watched]:
    pool = await open_pool(stores.postgres.dsn(APPLICATION, name), size=1, name="plans")
    yield Watched(pool)
    await pool.close()


@pytest_asyncio.fixture(scope="module")
async def superuser(stores: Stores, name: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(stores.postgres.dsn(SUPERUSER, name))
    yield connection
    await connection.close()


@dataclass(frozen=True, slots=True)
class Crowded:
    """Users with as many memories as `SIZES` say, among half a million; all have vectors."""

    scanned: tuple[Caller, ...]
    """Their vectors are in no graph."""
    in_graph: tuple[Caller, ...]


@pytest_asyncio.fixture(scope="module")
async def crowded(watched: Watched, superuser: asyncpg.Connection) -> Crowded:
    async with graph_made_anew(superuser, DIMENSION):
        others = await crowd(superuser, OTHERS, THEIRS, MODEL)
        scanned = [await _user(watched, superuser, size, in_graph=False) for size in SIZES]
        in_graph = [await _user(watched, superuser, size, in_graph=True) for size in SIZES]
        await superuser.execute(
            "UPDATE embeddings SET in_graph = true WHERE user_id = ANY ($1)", others[:IN_GRAPH]
        )
    await superuser.execute("ANALYZE")
    return Crowded(tuple(scanned), tuple(in_graph))


async def _user(
    watched: Watched, superuser: asyncpg.Connection, memories: int, *, in_graph: bool
) -> Caller:
    caller = await new_caller(watched.database)
    await decide(watched.database, caller, "memory.embed", granted=True)
    await fill(superuser, caller, memories)
    await embed(superuser, caller, MODEL, DIMENSION, in_graph=in_graph)
    return caller


async def plans_of(watched: Watched, caller: Caller) -> dict[str, Plan]:
    """Return the plans of the statements that keys and words lead to memories."""
    search = SearchStore(watched.database)
    newest = [memory.id for memory in await search.page(caller, Filter(), before=None, limit=10)]
    calls: dict[str, tuple[str, Callable[[], Awaitable[object]]]] = {
        "get": (
            "FROM memories",
            lambda: MemoryStore(watched.database, data_keys_of(watched.database)).get(
                caller, newest[0]
            ),
        ),
        "page": ("FROM memories", lambda: search.page(caller, Filter(), before=None, limit=20)),
        "query": ("AS amount", lambda: search.query(caller, {1: 1.0, 5: 2.0}, Filter(), 50)),
        "fetch": ("wanted_id", lambda: search.fetch(caller, newest)),
        "versions": ("may_embed", lambda: search.versions(caller, with_vectors=True)),
        "profile": ("SELECT terms", lambda: search.profile(caller)),
    }
    return {name: await watched.plan(caller, part, call()) for name, (part, call) in calls.items()}


async def plan_of_meaning(watched: Watched, caller: Caller, part: str) -> Plan:
    call = EmbeddingSearch(watched.database).nearest(caller, QUESTION, Filter(), 100)
    return await watched.plan(caller, part, call)


async def test_in_tables_of_ten_rows_few_pages_are_looked_at(
    watched: Watched, superuser: asyncpg.Connection
) -> None:
    caller = await _user(watched, superuser, 10, in_graph=False)
    await superuser.execute("ANALYZE")
    plans = await plans_of(watched, caller)
    plans["meaning"] = await plan_of_meaning(watched, caller, "compared AS")
    # Of such tables there is one page, and an index leads to it in two.
    assert {name: plan.buffers for name, plan in plans.items() if plan.buffers > 150} == {}


async def test_a_page_of_who_has_much_more_than_others_reads_no_more_than_the_page(
    watched: Watched, superuser: asyncpg.Connection
) -> None:
    # The planner knows what the average user has, and would read and sort as much of anybody's.
    for _ in range(300):
        await fill(superuser, Caller(uuid4(), uuid4()), 10)
    caller = await new_caller(watched.database)
    await fill(superuser, caller, 3_000, is_known=False)
    search = SearchStore(watched.database)
    many = await search.page(caller, Filter(), before=None, limit=2_000)
    for before in (None, many[-1].id):
        call = search.page(caller, Filter(), before=before, limit=20)
        plan = await watched.plan(caller, "FROM memories", call)
        assert plan.indexes == {"memories_pkey", "memory_scores_pkey"}
        assert plan.buffers <= 150


@pytest.mark.parametrize("place", range(len(SIZES)))
async def test_keys_and_words_reach_memories_by_the_users_own_index(
    watched: Watched, crowded: Crowded, place: int
) -> None:
    plans = await plans_of(watched, crowded.scanned[place])
    size = SIZES[place]
    pages = {
        "get": 20,
        "page": 120,
        "query": 50 + size,
        "fetch": 120,
        "versions": 30,
        "profile": 50 + size,
    }
    for name, plan in plans.items():
        assert plan.indexes <= {"memories_pkey", "memory_scores_pkey"}, name
        assert plan.buffers <= pages[name], name


@pytest.mark.parametrize("place", range(len(SIZES)))
async def test_scanned_vectors_are_reached_by_the_users_own_index(
    watched: Watched, crowded: Crowded, place: int
) -> None:
    plan = await plan_of_meaning(watched, crowded.scanned[place], "compared AS")
    keys = {"memories_pkey", "memory_scores_pkey"}
    assert keys < plan.indexes <= {*keys, "embeddings_pkey", "embeddings_by_memory"}
    # A memory is looked up in four pages; the nearest hundred once more, with their scores.
    assert plan.buffers <= 50 + 5 * SIZES[place] + 8 * min(SIZES[place], 100)


@pytest.mark.parametrize("place", range(len(SIZES)))
async def test_vectors_beyond_the_scanned_ones_are_reached_by_the_graph(
    watched: Watched, crowded: Crowded, place: int
) -> None:
    plan = await plan_of_meaning(watched, crowded.in_graph[place], "in_graph AS")
    assert f"embeddings_graph_{DIMENSION}" in plan.indexes
    assert plan.buffers <= 30_000
