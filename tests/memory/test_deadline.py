"""A deadline bounds what is done for a call: what is late is left out, and the answer says so."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller
from server.database import Database
from server.memory.legs import PATIENCE_SECONDS, patience_ends
from tests.conftest import bearer, new_caller
from tests.deciding import write_decision
from tests.in_time import first_in_time
from tests.memory.calls import Stub, create
from tests.memory.embedding_calls import choose
from tests.memory.meanings import of, texts, upload

pytestmark = pytest.mark.alone
HALF_A_SECOND = 0.5
ASKED = pb.QueryMemoriesRequest(
    query="olive", embedding=pb.QueryEmbedding(model="tiny", values=[1, 0]), include_shared=True
)


@pytest.fixture
def patience_seconds() -> float:
    """That of production."""
    return PATIENCE_SECONDS


@pytest_asyncio.fixture
async def caller(database: Database, memories: Stub) -> Caller:
    """A user with a memory that has a vector, and with somebody who shares one."""
    caller = await new_caller(database)
    await write_decision(database, caller, "memory.embed", granted=True)
    await upload(memories, caller, of(await create(memories, caller, "olive tree"), (1, 0)))
    colleague = Caller(caller.tenant_id, ids.new_id())
    await write_decision(database, colleague, "memory.store", granted=True)
    await create(memories, colleague, "olive oil", scope=pb.SCOPE_SHARED)
    return caller


async def asked(memories: Stub, caller: Caller, seconds: float) -> pb.QueryMemoriesResponse:
    async def ask() -> pb.QueryMemoriesResponse:
        return await memories.QueryMemories(ASKED, metadata=bearer(caller), timeout=seconds)

    return await first_in_time(seconds, ask)


@asynccontextmanager
async def held(owner: asyncpg.Connection, statement: str) -> AsyncIterator[None]:
    """Keep what a statement locks from everybody else, and leave all as it was."""
    transaction = owner.transaction()
    await transaction.start()
    await owner.execute(statement)
    try:
        yield
    finally:
        await transaction.rollback()


async def waiting_for(owner: asyncpg.Connection, table: str) -> int:
    """Return the process of PostgreSQL that waits for a table, as soon as one does."""
    async with asyncio.timeout(10):
        while True:
            pid: int | None = await owner.fetchval(
                "SELECT pid FROM pg_locks WHERE relation = $1::regclass AND NOT granted", table
            )
            if pid:
                return pid


def late(answer: pb.QueryMemoriesResponse) -> dict[str, bool]:
    return {
        "semantic": answer.semantic_late,
        "short_term": answer.short_term_late,
        "shared": answer.shared_late,
    }


IN_TIME = {"semantic": False, "short_term": False, "shared": False}


@pytest.mark.parametrize("seconds_left", [0.02, 0.4, 1.2, 60.0, None])
def test_what_is_late_is_late_before_the_call_is(seconds_left: float | None) -> None:
    ends = patience_ends(100.0, seconds_left)
    assert 100.0 < ends <= 100.0 + PATIENCE_SECONDS
    if seconds_left is not None:
        assert ends < 100.0 + seconds_left


async def test_answer_in_time_has_all_of_it(memories: Stub, caller: Caller) -> None:
    answer = await asked(memories, caller, 5)
    assert late(answer) == IN_TIME
    assert sorted(texts(answer)) == ["olive oil", "olive tree"]


async def test_what_others_share_is_left_out_when_it_is_late(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    # Of what a query reads, only the view is locked: all else is there.
    async with held(owner, "ALTER VIEW shown_memories SET (security_barrier = true)"):
        answer = await asked(memories, caller, HALF_A_SECOND)
    assert late(answer) == IN_TIME | {"shared": True}
    assert [(match.memory.content, match.semantic) for match in answer.matches] == [
        ("olive tree", 1.0)
    ]
    assert late(await asked(memories, caller, 5)) == IN_TIME


@pytest.mark.parametrize("seconds", [HALF_A_SECOND, 5])
async def test_late_vectors_leave_the_answer_to_the_words(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, seconds: float
) -> None:
    async with held(owner, "LOCK TABLE embeddings"):
        answer = await asked(memories, caller, seconds)
    assert late(answer) == IN_TIME | {"semantic": True}
    found = [(match.memory.content, match.semantic, match.reason) for match in answer.matches]
    assert sorted(found) == [("olive oil", 0, "shares olive"), ("olive tree", 0, "shares olive")]
    answer = await asked(memories, caller, 5)
    assert late(answer) == IN_TIME
    assert {match.memory.content: match.semantic for match in answer.matches}["olive tree"] == 1


async def test_all_that_is_late_is_given_up_at_one_instant(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    both = "ALTER VIEW shown_memories SET (security_barrier = true); LOCK TABLE embeddings"
    async with held(owner, both):
        started = time.monotonic()
        answer = await asked(memories, caller, 10)
        took = time.monotonic() - started
    assert late(answer) == IN_TIME | {"semantic": True, "shared": True}
    assert PATIENCE_SECONDS <= took < 2 * PATIENCE_SECONDS
    assert texts(answer) == ["olive tree"]


async def test_look_that_begins_anew_has_no_more_time_than_is_left(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    await asked(memories, caller, 5)

    async def ask() -> pb.QueryMemoriesResponse:
        # Another process changes the settings: what this one remembers of them is out of date,
        # which it learns by the first look.
        await choose(database, caller)
        return await memories.QueryMemories(ASKED, metadata=bearer(caller), timeout=HALF_A_SECOND)

    async with held(owner, "LOCK TABLE embeddings"):
        answer = await first_in_time(5, ask)
    assert late(answer) == IN_TIME | {"semantic": True}


async def test_leg_that_cannot_even_be_cancelled_is_left_behind(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    async with held(owner, "LOCK TABLE embeddings"):
        asking = asyncio.ensure_future(asked(memories, caller, 2 * PATIENCE_SECONDS))
        pid = await waiting_for(owner, "embeddings")
        os.kill(pid, signal.SIGSTOP)
        try:
            answer = await asking
        finally:
            os.kill(pid, signal.SIGCONT)
    assert late(answer) == IN_TIME | {"semantic": True}
    assert late(await asked(memories, caller, 5)) == IN_TIME
