"""What queries returned is counted, without a write for each of them."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server.cache import Redis, prefix_of
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.memory.answers import Answers
from server.memory.promotion import Promotion
from server.memory.retrieval_counts import RetrievalCounts
from server.memory.short_term import ShortTermStore
from tests.conftest import FakeClock, bearer
from tests.faults.reach import until
from tests.memory.calls import Stub, change, create, keep
from tests.memory.meanings import ask


async def counted(owner: asyncpg.Connection) -> dict[str, int]:
    rows = await owner.fetch(
        """
        SELECT content, retrieved_count
          FROM memories JOIN memory_scores AS scores
            ON scores.user_id = memories.user_id AND memory_id = id
        """
    )
    return {row["content"]: row["retrieved_count"] for row in rows}


async def test_every_answer_counts_kept_ones_too(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    answers: Answers,
    counts: RetrievalCounts,
) -> None:
    for text in ("tea at four", "tea at five", "coffee"):
        await create(memories, caller, text)
    await create(memories, caller, "tea now", tier=pb.TIER_SHORT_TERM)
    for question in ("tea", "tea", "four"):
        await ask(memories, caller, question)
        await answers.flush()
    assert set((await counted(owner)).values()) == {0}
    await counts.flush()
    expected = {"tea at four": 3, "tea at five": 2, "coffee": 0}
    assert await counted(owner) == expected
    await counts.flush()
    assert await counted(owner) == expected


async def test_deleted_memories_hold_up_no_count(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, counts: RetrievalCounts
) -> None:
    doomed = await create(memories, caller, "tea at four")
    await create(memories, caller, "tea at five")
    await ask(memories, caller, "tea")
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=doomed.id), metadata=bearer(caller))
    await counts.flush()
    assert await counted(owner) == {"tea at five": 1}


async def test_counts_are_written_every_few_seconds_and_at_the_end(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    system_database: SystemDatabase,
    short_term: ShortTermStore,
) -> None:
    memory = await create(memories, caller, "tea at four")
    counts = RetrievalCounts(system_database, short_term, every_seconds=0.01)
    running = asyncio.create_task(counts.run())
    counts.note(caller, [memory.id], [])

    async def is_written() -> bool:
        return await counted(owner) == {"tea at four": 1}

    await until(is_written, 30)
    counts.note(caller, [memory.id], [])
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await counted(owner) == {"tea at four": 2}


async def test_counts_wait_for_a_database_that_is_out_of_reach(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, counts: RetrievalCounts
) -> None:
    await create(memories, caller, "tea at four")
    await ask(memories, caller, "tea")
    await owner.execute("ALTER ROLE kimberly_system CONNECTION LIMIT 0")
    try:
        await owner.execute(
            """
            SELECT pg_terminate_backend(pid, timeout => 10000) FROM pg_stat_activity
             WHERE usename = 'kimberly_system'
            """
        )
        await counts.flush()
        assert await counted(owner) == {"tea at four": 0}
    finally:
        await owner.execute("ALTER ROLE kimberly_system CONNECTION LIMIT -1")

    async def is_written() -> bool:
        # The pool may have more connections that ended, and learns of each by using it.
        await counts.flush()
        return await counted(owner) == {"tea at four": 1}

    await until(is_written, 30)


async def test_row_that_is_locked_is_waited_for(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    counts: RetrievalCounts,
) -> None:
    memory = await create(memories, caller, "tea at four")
    await ask(memories, caller, "tea")
    async with owner.transaction():
        await owner.execute("SELECT FROM memory_scores FOR UPDATE")
        flushing = asyncio.create_task(counts.flush())
        await asyncio.sleep(0.05)
        # What is counted meanwhile is for the next time.
        counts.note(caller, [memory.id], [])
        assert not flushing.done()
    await flushing
    assert await counted(owner) == {"tea at four": 1}
    await counts.flush()
    assert await counted(owner) == {"tea at four": 2}


async def test_counts_that_are_being_written_when_it_ends_are_not_lost(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    system_database: SystemDatabase,
    short_term: ShortTermStore,
) -> None:
    memory = await create(memories, caller, "tea at four")
    counts = RetrievalCounts(system_database, short_term, every_seconds=0.01)

    async def is_waiting() -> bool:
        return bool(await owner.fetchval("SELECT true FROM pg_locks WHERE NOT granted LIMIT 1"))

    async with owner.transaction():
        await owner.execute("SELECT FROM memory_scores FOR UPDATE")
        counts.note(caller, [memory.id], [])
        running = asyncio.create_task(counts.run())
        await until(is_waiting, 30)
        counts.note(caller, [memory.id], [])
        running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await counted(owner) == {"tea at four": 2}


async def test_counts_of_short_term_memories_go_along_with_their_promotion(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, counts: RetrievalCounts
) -> None:
    memory = await keep(memories, caller, "tea at four")
    await keep(memories, caller, "tea at five")
    for _ in range(2):
        await ask(memories, caller, "tea")
        await counts.flush()
    await ask(memories, caller, "four")
    await counts.flush()
    await change(memories, caller, memory, tier=pb.TIER_LONG_TERM)
    assert await counted(owner) == {"tea at four": 3}
    await ask(memories, caller, "tea")
    await counts.flush()
    assert await counted(owner) == {"tea at four": 4}


async def test_count_of_what_is_promoted_before_it_is_written_finds_it(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, counts: RetrievalCounts
) -> None:
    memory = await keep(memories, caller, "tea at four")
    await ask(memories, caller, "tea")
    await change(memories, caller, memory, tier=pb.TIER_LONG_TERM)
    await counts.flush()
    assert await counted(owner) == {"tea at four": 1}


async def test_counting_short_term_memories_makes_no_answer_stale(
    memories: Stub, caller: Caller, redis: Redis, counts: RetrievalCounts
) -> None:
    await keep(memories, caller, "tea at four")
    version = f"{prefix_of(caller)}shorts-version"
    before = await redis.get(version)
    await ask(memories, caller, "tea")
    await counts.flush()
    assert await redis.get(version) == before is not None


async def test_count_of_a_short_term_memory_that_is_gone_is_dropped(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    redis: Redis,
    counts: RetrievalCounts,
) -> None:
    memory = await keep(memories, caller, "tea at four")
    await ask(memories, caller, "tea")
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))
    await counts.flush()
    assert await counted(owner) == {}
    assert not [key async for key in redis.scan_iter(f"{prefix_of(caller)}short:*")]


async def test_counts_go_to_the_memory_that_has_the_same_text_already(
    memories: Stub,
    caller: Caller,
    owner: asyncpg.Connection,
    counts: RetrievalCounts,
    database: Database,
    short_term: ShortTermStore,
    clock: FakeClock,
) -> None:
    memory = await keep(memories, caller, "tea at four")
    await ask(memories, caller, "tea")
    await counts.flush()
    feedback = pb.GiveFeedbackRequest(id=memory.id, useful=True)
    await memories.GiveFeedback(feedback, metadata=bearer(caller))
    await create(memories, caller, "tea at four")
    await ask(memories, caller, "tea")
    await counts.flush()
    assert await Promotion(database, short_term).promote_earned(caller, clock.now) == 1
    # Once as a short-term memory alone, and then both at a time.
    assert await counted(owner) == {"tea at four": 3}
    assert await owner.fetchval("SELECT useful_count FROM memory_scores") == 1
