"""Hot statements reach one user's rows by an index, however many rows others have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio

from local.postgres import APPLICATION, SUPERUSER, SYSTEM
from local.servers import Stores
from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase, open_pool
from server.memory.conversation import Place, Surroundings
from server.memory.embedding_search import EmbeddingSearch
from server.memory.embeddings import read_embedding
from server.memory.model import Filter, Tier
from server.memory.retrieval_counts import RetrievalCounts
from server.memory.search_store import SearchStore
from server.memory.shared_store import SharedStore
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from server.preferences import Language
from tests.conftest import data_keys_of, new_caller
from tests.deciding import write_decision
from tests.memory.crowds import crowd, database_for, embed, fill, graph_made_anew
from tests.memory.explained import Plan, explained

OTHERS = 1_000
THEIRS = 500
IN_GRAPH = 20
"""So many of the others have their vectors in the graph."""
SIZES = (10, 600)
MODEL = "tiny"
DIMENSION = 64
QUESTION = read_embedding(MODEL, [1.0] * DIMENSION, "embedding")
WORDS = {1: 1.0, 5: 2.0}
ALL = Filter()
FILTERS = {
    "of all": ALL,
    "by tag": Filter(tags=("rare",)),
    "by tier": Filter(tiers=frozenset({Tier.PERMANENT})),
    "by session": Filter(session_id="talk"),
    "by time": Filter(
        occurred_after=datetime(2026, 1, 1, tzinfo=UTC),
        occurred_before=datetime(2100, 1, 1, tzinfo=UTC),
    ),
}


class Watched:
    """A database of one connection, so that its statements can be noted and explained."""

    def __init__(self, pool: asyncpg.Pool, system: asyncpg.Pool) -> None:
        self.pool = pool
        self.database = Database(pool)
        self.system_pool = system
        self.system = SystemDatabase(system)

    async def plan(self, part: str, call: Awaitable[object]) -> Plan:
        """Return the plan of the statement of a call that has this part in its text."""
        return await explained(self.pool, part, call)


@pytest_asyncio.fixture(scope="module")
async def name(stores: Stores) -> AsyncIterator[str]:
    """The database of this module."""
    async with database_for(stores, "plans") as name:
        yield name


@pytest_asyncio.fixture(scope="module")
async def watched(stores: Stores, name: str) -> AsyncIterator[Watched]:
    pools = [
        await open_pool(stores.postgres.dsn(role, name), size=1, name="plans")
        for role in (APPLICATION, SYSTEM)
    ]
    yield Watched(*pools)
    for pool in pools:
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
    """Make a user whose memories have vectors and are shown to the tenant."""
    caller = await new_caller(watched.database)
    await write_decision(watched.database, caller, "memory.embed", granted=True)
    await fill(superuser, caller, memories, scope="shared")
    await embed(superuser, caller, MODEL, DIMENSION, in_graph=in_graph)
    return caller


LOOPS = {"Nested Loop"}
OWN = {"memories_pkey", "memory_scores_pkey", "memories_by_session", "memories_by_active_content"}
"""Indexes that lead to the rows of one user."""
Calls = dict[str, tuple[str, Callable[[], Awaitable[object]]]]
"""What a call is named here: what only its statement has in its text, and the call."""


async def calls_of(watched: Watched, caller: Caller) -> Calls:
    """Return the calls that lead by keys and words to memories."""
    search = SearchStore(watched.database)
    newest = [memory.id for memory in await search.page(caller, Filter(), before=None, limit=10)]
    colleague = Caller(caller.tenant_id, uuid4())
    calls: Calls = {
        "get": (
            "FROM memories",
            lambda: MemoryStore(watched.database, data_keys_of(watched.database)).get(
                caller, newest[0]
            ),
        ),
        "page": ("FROM memories", lambda: search.page(caller, Filter(), before=None, limit=20)),
        "fetch": ("wanted_id", lambda: search.fetch(caller, newest)),
        "versions": ("may_embed", lambda: search.versions(caller, with_vectors=True)),
        "profile": ("SELECT terms", lambda: search.profile(caller)),
        "shared": (
            "shown_memories",
            lambda: SharedStore(watched.database).query(
                colleague, WORDS, Filter(), 50, Language.ENGLISH
            ),
        ),
        "surroundings": ("AS near", lambda: _surroundings(watched, caller)),
    }
    for name, which in FILTERS.items():
        calls[f"query {name}"] = ("AS amount", partial(search.query, caller, WORDS, which, 50, 20))
    return calls


async def _surroundings(watched: Watched, caller: Caller) -> None:
    async with watched.database.transaction(caller) as connection:
        await Surroundings.of(connection, caller, [Place("talk", 5)])


async def plans_of(watched: Watched, caller: Caller) -> dict[str, Plan]:
    """Return the plans of the statements that lead by keys and words to memories."""
    calls = await calls_of(watched, caller)
    return {name: await watched.plan(part, call()) for name, (part, call) in calls.items()}


async def plan_of_meaning(
    watched: Watched,
    caller: Caller,
    part: str,
    which: Filter = ALL,
    *,
    always_by_graph: bool = True,
) -> Plan:
    search = EmbeddingSearch(watched.database, always_by_graph=always_by_graph)
    return await watched.plan(part, search.nearest(caller, QUESTION, which, 100))


async def plan_of_counting(
    watched: Watched, short_term: ShortTermStore, callers: Iterable[Caller]
) -> Plan:
    """Return the plan of the statement that counts what queries returned, of many users."""
    counts = RetrievalCounts(watched.system, short_term)
    for caller in callers:
        for memory in await SearchStore(watched.database).page(caller, ALL, before=None, limit=100):
            counts.note(caller, [ids.show(ids.MEMORY, memory.id)], [])
    return await explained(watched.system_pool, "UPDATE memory_scores", counts.flush())


PAGES = {"Seq Scan memories", "Seq Scan memory_scores"}
IN_TEN_ROWS = {
    "get": PAGES,
    "page": {"Index Scan memories_pkey", "Seq Scan memory_scores"},
    "fetch": PAGES,
    "versions": set(),
    "profile": {"Index Scan memories_pkey"},
    "shared": {"Seq Scan memories"},
    "surroundings": {"Seq Scan memories"},
    **{f"query {name}": PAGES for name in FILTERS},
    **{f"meaning {name}": {*PAGES, "Seq Scan embeddings"} for name in FILTERS},
    "counting": {"Seq Scan memory_scores"},
}
"""A table of one page is read as it is: an index leads to it in two."""


async def test_tables_of_ten_rows_are_read_as_they_are_and_sorted_only_where_asked(
    watched: Watched, superuser: asyncpg.Connection, short_term: ShortTermStore
) -> None:
    caller = await _user(watched, superuser, 10, in_graph=False)
    await superuser.execute("ANALYZE")
    plans = await plans_of(watched, caller)
    for name, which in FILTERS.items():
        plans[f"meaning {name}"] = await plan_of_meaning(watched, caller, "compared AS", which)
    plans["counting"] = await plan_of_counting(watched, short_term, [caller])
    assert {name: plan.scans for name, plan in plans.items()} == IN_TEN_ROWS
    assert {name: plan.joins for name, plan in plans.items() if plan.joins - LOOPS} == {}
    assert {name: plan.buffers for name, plan in plans.items() if plan.buffers > 60} == {}


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
        plan = await watched.plan("FROM memories", call)
        assert plan.indexes == {"memories_pkey", "memory_scores_pkey"}
        assert plan.buffers <= 150


KEYS = {"Index Scan memories_pkey", "Index Scan memory_scores_pkey"}
OF_WORDS = {
    "get": KEYS,
    "page": KEYS,
    "fetch": KEYS,
    "versions": set(),
    "profile": {"Index Scan memories_pkey"},
    "shared": {"Index Scan memories_by_scope"},
    "surroundings": {"Index Scan memories_by_session"},
    "query of all": KEYS,
    "query by tag": KEYS,
    "query by tier": KEYS,
    "query by session": {*KEYS, "Index Scan memories_by_session"},
    "query by time": KEYS,
}


@pytest.mark.parametrize("place", range(len(SIZES)))
async def test_keys_and_words_reach_memories_by_the_users_own_index(
    watched: Watched, crowded: Crowded, place: int
) -> None:
    plans = await plans_of(watched, crowded.scanned[place])
    size = SIZES[place]
    found = min(size, 50)
    # A memory is looked up in four pages, and its score in four; words are compared in all. Of
    # each that is shared, its user's consent is looked up.
    pages = {
        "get": 20,
        "page": 120,
        "fetch": 120,
        "versions": 30,
        "surroundings": 20,
        "profile": 50 + size,
        "shared": 50 + 4 * size,
        **{f"query {name}": 50 + size + 8 * found for name in FILTERS},
    }
    assert {name: plan.scans for name, plan in plans.items()} == OF_WORDS
    assert {name: plan.joins for name, plan in plans.items() if plan.joins - LOOPS} == {}
    for name, plan in plans.items():
        assert {*plan.indexes} <= {*OWN, "memories_by_scope"}, name
        assert plan.buffers <= pages[name], name


OF_MEANING = {*KEYS, "Index Scan embeddings_by_memory"}


@pytest.mark.parametrize("filtered", FILTERS)
@pytest.mark.parametrize("place", range(len(SIZES)))
async def test_scanned_vectors_are_reached_by_the_users_own_index(
    watched: Watched, crowded: Crowded, place: int, filtered: str
) -> None:
    caller = crowded.scanned[place]
    plan = await plan_of_meaning(watched, caller, "compared AS", FILTERS[filtered])
    assert (plan.scans, plan.joins) == (OF_MEANING, LOOPS)
    # A memory is looked up in four pages; the nearest hundred once more, with their scores.
    assert plan.buffers <= 50 + 5 * SIZES[place] + 8 * min(SIZES[place], 100)


@pytest.mark.parametrize("filtered", FILTERS)
@pytest.mark.parametrize("place", range(len(SIZES)))
async def test_vectors_beyond_the_scanned_ones_are_reached_by_the_graph(
    watched: Watched, crowded: Crowded, place: int, filtered: str
) -> None:
    caller = crowded.in_graph[place]
    plan = await plan_of_meaning(watched, caller, "in_graph AS", FILTERS[filtered])
    by_graph = {f"Index Scan embeddings_graph_{DIMENSION}", "Index Scan memories_by_session"}
    assert (plan.scans, plan.joins) == ({*OF_MEANING, *by_graph}, LOOPS)
    assert plan.buffers <= 30_000


@pytest.mark.parametrize("filtered", FILTERS)
@pytest.mark.parametrize("place", range(len(SIZES)))
async def test_where_others_fill_the_graph_only_ones_own_vectors_are_compared(
    watched: Watched, crowded: Crowded, place: int, filtered: str
) -> None:
    caller = crowded.in_graph[place]
    plan = await plan_of_meaning(
        watched, caller, "in_graph AS", FILTERS[filtered], always_by_graph=False
    )
    assert f"embeddings_graph_{DIMENSION}" not in {node.index for node in plan.ran if node.rows}
    assert plan.buffers <= 100 + 20 * SIZES[place] + 8 * min(SIZES[place], 100)


TOO_FEW = [(0, name) for name in FILTERS] + [(1, f"by {one}") for one in ("tag", "tier", "session")]
"""Who has ten memories is not found a hundred, nor is who has 600 by these filters."""


@pytest.mark.parametrize(("place", "filtered"), TOO_FEW)
async def test_where_the_graph_yields_too_little_the_users_own_index_reaches_every_vector(
    watched: Watched, crowded: Crowded, place: int, filtered: str
) -> None:
    caller = crowded.in_graph[place]
    plan = await plan_of_meaning(watched, caller, "consented('memory.embed')", FILTERS[filtered])
    assert (plan.scans, plan.joins) == (OF_MEANING, LOOPS)
    assert plan.buffers <= 50 + 5 * SIZES[place] + 8 * min(SIZES[place], 100)


async def test_counts_of_many_users_are_written_row_by_row(
    watched: Watched, crowded: Crowded, short_term: ShortTermStore
) -> None:
    users = [*crowded.scanned, *crowded.in_graph]
    plan = await plan_of_counting(watched, short_term, users)
    assert (plan.scans, plan.joins) == ({"Index Scan memory_scores_pkey"}, LOOPS)
    # A row is found twice by four pages, and written to one.
    assert plan.buffers <= 50 + 12 * sum(min(size, 100) for size in SIZES) * 2
