"""Among the turns of many users' talks a graph finds what looking at every vector finds.

What is nearest is worked out here by NumPy, from the vectors and the rule that a turn counts as
twice itself, once each turn beside it and half of those after: nothing of the product is asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from local.postgres import APPLICATION, SUPERUSER
from local.servers import Stores
from server.caller import Caller
from server.database import Database, open_pool
from server.memory.embedding_search import EmbeddingSearch, Nearest
from server.memory.embeddings import Embedding, read_embedding
from server.memory.lifecycle_store import LifecycleStore
from server.memory.model import Change, Filter, Tier
from server.memory.store import MemoryStore
from tests.conftest import data_keys_of, new_caller
from tests.deciding import write_decision
from tests.memory.crowds import FIRST_TURN, database_for, embed, graph_made_anew, talk
from tests.memory.explained import explained

MODEL = "tiny"
DIMENSION = 64
K = 10
LIMIT = 100
"""So many candidates an answer of ten is made of."""
QUESTIONS = 15
SIZES = {"0.1 %": 20, "1 %": 200, "10 %": 2_000, "others": 17_780}
IN_GRAPH = ("0.1 %", "1 %", "10 %")
SCANNED = "in no graph"
MOST = "others"
BESIDE = {0: 2.0, 1: 1.0, 2: 0.5}
"""What a turn counts that is so many places away."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a talk."""

    id: UUID
    session: str
    position: int
    minute: int
    is_tenth: bool
    tier: str


@dataclass(frozen=True, slots=True)
class Asker:
    """A user, and all that an exact search is made of."""

    caller: Caller
    turns: tuple[Turn, ...]
    vectors: Array
    """A row each turn."""

    def nearness(self, question: Array) -> dict[UUID, float]:
        """Return how near each turn is: the weighted mean over it and the turns around it."""
        own = dict(zip(self.turns, self.vectors @ question, strict=True))
        at = {(turn.session, turn.position): turn for turn in self.turns}
        near = {}
        for turn in self.turns:
            around = [
                (weight, own[at[turn.session, turn.position + way]])
                for distance, weight in BESIDE.items()
                for way in {distance, -distance}
                if (turn.session, turn.position + way) in at
            ]
            total = sum(weight for weight, _ in around)
            near[turn.id] = sum(weight * cosine for weight, cosine in around) / total
        return near


Passing = Callable[[Turn], bool]
FILTERS: dict[str, tuple[Filter, Passing]] = {
    "none": (Filter(), lambda turn: True),
    "tag": (Filter(tags=("tenth",)), lambda turn: turn.is_tenth),
    "tier": (
        Filter(tiers=frozenset({Tier.PERMANENT, Tier.SHORT_TERM})),
        lambda turn: turn.tier == "permanent",
    ),
    "session": (Filter(session_id="talk 0"), lambda turn: turn.session == "talk 0"),
    "time": (
        Filter(
            occurred_after=FIRST_TURN + timedelta(minutes=5),
            occurred_before=FIRST_TURN + timedelta(minutes=150),
        ),
        lambda turn: 5 <= turn.minute < 150,
    ),
    "all of them": (
        Filter(
            tiers=frozenset({Tier.LONG_TERM}),
            tags=("tenth",),
            occurred_before=FIRST_TURN + timedelta(minutes=1_000),
        ),
        lambda turn: turn.tier == "long_term" and turn.is_tenth and turn.minute < 1_000,
    ),
}


@pytest_asyncio.fixture(scope="module")
async def name(stores: Stores) -> AsyncIterator[str]:
    """The database of this module."""
    async with database_for(stores, "recall") as name:
        yield name


@pytest_asyncio.fixture(scope="module")
async def pool(stores: Stores, name: str) -> AsyncIterator[asyncpg.Pool]:
    """One connection, so that its statements can be explained."""
    pool = await open_pool(stores.postgres.dsn(APPLICATION, name), size=1, name="recall")
    yield pool
    await pool.close()


@pytest_asyncio.fixture(scope="module")
async def superuser(stores: Stores, name: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(stores.postgres.dsn(SUPERUSER, name))
    yield connection
    await connection.close()


@pytest_asyncio.fixture(scope="module")
async def askers(pool: asyncpg.Pool, superuser: asyncpg.Connection) -> dict[str, Asker]:
    """Users of all sizes, whose vectors are in one graph."""
    database = Database(pool)
    callers = {}
    await superuser.execute("SELECT setseed(0.5)")
    async with graph_made_anew(superuser, DIMENSION):
        for name, size in (*SIZES.items(), (SCANNED, 200)):
            caller = callers[name] = await new_caller(database)
            await write_decision(database, caller, "memory.embed", granted=True)
            await talk(superuser, caller, size)
            await embed(superuser, caller, MODEL, DIMENSION, in_graph=name != SCANNED)
    await superuser.execute("ANALYZE")
    asking = (*IN_GRAPH, MOST, SCANNED)
    return {name: await _asker(superuser, callers[name]) for name in asking}


async def _asker(superuser: asyncpg.Connection, caller: Caller) -> Asker:
    rows = await superuser.fetch(
        """
        SELECT id, session_id, session_position, occurred_at, tags, tier,
               vector::real[]::double precision[] AS vector
          FROM memories JOIN embeddings ON memory_id = id AND embeddings.user_id = memories.user_id
         WHERE memories.user_id = $1
        """,
        caller.user_id,
    )
    turns = tuple(
        Turn(
            row["id"],
            row["session_id"],
            row["session_position"],
            (row["occurred_at"] - FIRST_TURN) // timedelta(minutes=1),
            "tenth" in row["tags"],
            row["tier"],
        )
        for row in rows
    )
    return Asker(caller, turns, np.array([row["vector"] for row in rows]))


def questions() -> Iterable[tuple[Embedding, Array]]:
    dice = np.random.default_rng(7)
    for _ in range(QUESTIONS):
        embedding = read_embedding(MODEL, list(dice.normal(size=DIMENSION)), "embedding")
        # As precise as it is asked: of two turns as near as that, either may come first.
        yield embedding, np.array(embedding.values, np.float16).astype(np.float64)


def searches(method: str) -> float:
    """Return how often vectors were compared in this way."""
    name = "vector_index_search_seconds_count"
    return REGISTRY.get_sample_value(name, {"method": method}) or 0.0


def best(near: dict[UUID, float], ids: Iterable[UUID]) -> list[UUID]:
    return sorted(ids, key=lambda one: (-near[one], one))[:K]


def judge(asker: Asker, found: Nearest, question: Array, passes: Passing) -> float:
    """Return what share of the nearest ten was found, having checked all that was."""
    near = asker.nearness(question)
    passing = {turn.id for turn in asker.turns if passes(turn)}
    amounts = {one.id: one.amount for one in found.candidates}
    assert len(amounts) == len(found.candidates) == min(LIMIT, len(passing))
    assert amounts.keys() <= passing
    for memory_id, amount in amounts.items():
        assert amount == pytest.approx(near[memory_id], abs=2e-3)
    wanted = best(near, passing)
    return len(set(best(amounts, amounts)) & set(wanted)) / len(wanted)


async def recall(
    search: EmbeddingSearch, asker: Asker, which: Filter, passes: Passing = lambda turn: True
) -> float:
    """Ask every question, and return what share of the nearest ten is found."""
    shares = []
    for embedding, question in questions():
        found = await search.nearest(asker.caller, embedding, which, LIMIT)
        shares.append(judge(asker, found, question, passes))
    return float(np.mean(shares))


@pytest.mark.parametrize("filtered", FILTERS)
@pytest.mark.parametrize("share", IN_GRAPH)
async def test_the_nearest_turns_are_found_whatever_share_of_the_graph_is_ones_own(
    pool: asyncpg.Pool, askers: dict[str, Asker], share: str, filtered: str
) -> None:
    by_graph = searches("index")
    search = EmbeddingSearch(Database(pool), always_by_graph=True)
    assert await recall(search, askers[share], *FILTERS[filtered]) >= 0.98
    assert searches("index") == by_graph + QUESTIONS


@pytest.mark.parametrize("filtered", FILTERS)
@pytest.mark.parametrize("share", IN_GRAPH)
async def test_the_nearest_turns_are_found_where_others_fill_the_graph(
    pool: asyncpg.Pool, askers: dict[str, Asker], share: str, filtered: str
) -> None:
    by_graph = searches("index")
    search = EmbeddingSearch(Database(pool))
    assert await recall(search, askers[share], *FILTERS[filtered]) >= 0.98
    # Too many of theirs would be met on the way.
    assert searches("index") == by_graph


async def test_the_nearest_turns_are_found_by_a_graph_that_is_mostly_ones_own(
    pool: asyncpg.Pool, askers: dict[str, Asker]
) -> None:
    by_graph = searches("index")
    search = EmbeddingSearch(Database(pool))
    assert await recall(search, askers[MOST], *FILTERS["none"]) >= 0.98
    assert searches("index") == by_graph + QUESTIONS


@pytest.mark.parametrize("filtered", FILTERS)
async def test_the_nearest_turns_are_found_by_looking_at_every_vector(
    pool: asyncpg.Pool, askers: dict[str, Asker], filtered: str
) -> None:
    by_graph = searches("index")
    search = EmbeddingSearch(Database(pool))
    assert await recall(search, askers[SCANNED], *FILTERS[filtered]) == 1
    assert searches("index") == by_graph


@pytest.mark.parametrize("share", ["1 %", "10 %"])
async def test_the_graph_is_searched_on_until_there_are_enough_of_the_users_own(
    pool: asyncpg.Pool, askers: dict[str, Asker], share: str
) -> None:
    embedding, _ = next(iter(questions()))
    exact = searches("exact")
    search = EmbeddingSearch(Database(pool), always_by_graph=True)
    call = search.nearest(askers[share].caller, embedding, Filter(), LIMIT)
    plan = await explained(pool, "in_graph AS", call)
    assert searches("exact") == exact
    (scan,) = (node for node in plan.ran if node.index == f"embeddings_graph_{DIMENSION}")
    # The first look yields as many as hnsw.ef_search says: 200, of which too few are the user's.
    assert scan.rows > 200


async def test_who_has_less_than_was_asked_for_is_answered_by_looking_at_every_vector(
    pool: asyncpg.Pool, askers: dict[str, Asker]
) -> None:
    embedding, _ = next(iter(questions()))
    exact = searches("exact")
    caller = askers["0.1 %"].caller
    search = EmbeddingSearch(Database(pool), always_by_graph=True)
    call = search.nearest(caller, embedding, Filter(), LIMIT)
    plan = await explained(pool, "consented('memory.embed')", call)
    assert searches("exact") == exact + 1
    assert f"embeddings_graph_{DIMENSION}" not in plan.indexes


async def test_what_is_archived_sensitive_or_deleted_neither_comes_nor_counts_for_others(
    pool: asyncpg.Pool, askers: dict[str, Asker]
) -> None:
    database, asker = Database(pool), askers["10 %"]
    caller, now = asker.caller, datetime.now(UTC)
    await write_decision(database, caller, "memory.sensitive", granted=True)
    store, lifecycle = MemoryStore(database, data_keys_of(database)), LifecycleStore(database)
    gone: set[UUID] = set()
    for _, question in questions():
        near = asker.nearness(question)
        first, second, third = best(near, near.keys() - gone)[:3]
        await lifecycle.archive(caller, first, None, now)
        await store.update(caller, second, Change(is_sensitive=True), now)
        await store.delete(caller, third)
        gone |= {first, second, third}
    left = [place for place, turn in enumerate(asker.turns) if turn.id not in gone]
    rest = Asker(caller, tuple(asker.turns[place] for place in left), asker.vectors[left])
    assert await recall(EmbeddingSearch(database), rest, Filter()) >= 0.98
