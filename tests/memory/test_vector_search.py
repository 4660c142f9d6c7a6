"""A graph that all users share finds for each of them what looking at every vector finds."""

from __future__ import annotations

import random

import asyncpg
import pytest
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from tests.conftest import new_caller
from tests.deciding import write_decision
from tests.memory.calls import create
from tests.memory.crowds import embed, fill, graph_made_anew
from tests.memory.meanings import ask, of, texts, upload

DIMENSION = 64
K = 10
QUESTIONS = 20


async def someone(database: Database) -> Caller:
    caller = await new_caller(database)
    await write_decision(database, caller, "memory.embed", granted=True)
    return caller


async def exactly(
    owner: asyncpg.Connection, caller: Caller, values: list[float], session_id: str = ""
) -> list[str]:
    """Return what stands nearest, by looking at every vector of the user."""
    rows = await owner.fetch(
        """
        SELECT content
          FROM embeddings JOIN memories ON id = memory_id AND memories.user_id = $1
         WHERE embeddings.user_id = $1 AND ($4 = '' OR session_id = $4)
         ORDER BY vector <#> $2::text::halfvec
         LIMIT $3
        """,
        caller.user_id,
        str(values),
        K,
        session_id,
    )
    return [row["content"] for row in rows]


async def test_users_of_any_share_of_the_graph_find_what_is_nearest(
    memories: rpc.MemoryServiceAsyncStub, database: Database, owner: asyncpg.Connection
) -> None:
    dice = random.Random(7)
    sizes = {"0.1 %": 20, "1 %": 200, "10 %": 2_000, "others": 17_780}
    users = {name: await someone(database) for name in sizes}
    await owner.execute("SELECT setseed(0.5)")
    async with graph_made_anew(owner, DIMENSION):
        for name, size in sizes.items():
            await fill(owner, users[name], size, talks=False)
            await embed(owner, users[name], "tiny", DIMENSION, in_graph=True)
    for name in ("0.1 %", "1 %", "10 %"):
        recalled = 0.0
        for _ in range(QUESTIONS):
            values = [dice.gauss(0, 1) for _ in range(DIMENSION)]
            found = texts(await ask(memories, users[name], "", values))
            assert len(found) == K
            recalled += len(set(found) & set(await exactly(owner, users[name], values))) / K
        assert recalled / QUESTIONS >= 0.98, name


async def test_filter_that_few_pass_still_fills_the_answer(
    memories: rpc.MemoryServiceAsyncStub, database: Database, owner: asyncpg.Connection
) -> None:
    caller = await someone(database)
    await fill(owner, caller, 3_000, talks=False)
    await owner.execute(
        "UPDATE memories SET session_id = 'rare' WHERE get_byte(content_hash, 0) < 3"
    )
    async with graph_made_anew(owner, DIMENSION):
        await embed(owner, caller, "tiny", DIMENSION, in_graph=True)
    values = [1.0] * DIMENSION
    answer = await ask(memories, caller, "", values, session_id="rare", top_k=K)
    rare = await exactly(owner, caller, values, "rare")
    assert len(rare) == K
    assert texts(answer) == rare


class TestSmallScan:
    """With only two vectors scanned, the others go into the graph."""

    @pytest.fixture
    def scanned(self) -> int:
        return 2

    async def test_scanned_vectors_and_those_of_the_graph_are_one_set(
        self, memories: rpc.MemoryServiceAsyncStub, database: Database, owner: asyncpg.Connection
    ) -> None:
        caller = await someone(database)
        made = [await create(memories, caller, f"number {n}") for n in range(6)]
        for start in range(0, 6, 3):
            batch = made[start : start + 3]
            await upload(
                memories,
                caller,
                *(of(m, [1.0, float(made.index(m))] + [0.0] * 62) for m in batch),
            )
        flags = await owner.fetch("SELECT in_graph FROM embeddings ORDER BY in_graph")
        assert [row["in_graph"] for row in flags] == [False] * 2 + [True] * 4
        found = texts(await ask(memories, caller, "", [1.0] + [0.0] * 63))
        assert found == [f"number {n}" for n in range(6)]

    async def test_unusual_dimensions_are_in_no_graph(
        self, memories: rpc.MemoryServiceAsyncStub, database: Database, owner: asyncpg.Connection
    ) -> None:
        caller = await someone(database)
        made = [await create(memories, caller, f"number {n}") for n in range(4)]
        await upload(memories, caller, *(of(m, [1.0, 0.0, made.index(m)]) for m in made))
        assert not await owner.fetchval("SELECT bool_or(in_graph) FROM embeddings")
        assert len(texts(await ask(memories, caller, "", [1.0, 0.0, 0.0]))) == 4
