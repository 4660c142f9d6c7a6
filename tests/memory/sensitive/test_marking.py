"""A memory that is marked later takes along all that was known of it."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import asyncpg
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from server.database import Database
from server.memory import store as store_module
from server.memory.answers import Answers
from tests.conftest import bearer
from tests.deciding import write_decision
from tests.memory.calls import Stub, change, create, get, values_in, versions
from tests.memory.meanings import ask, of, texts, upload
from tests.memory.sensitive.secret import AGAIN, SECRET, assert_no_trace, keep, whole_database
from tests.memory.test_batch import create_all
from tests.memory.test_sessions import append, transcript, write_down
from tests.refusals import refusal_of


async def test_marking_later_takes_along_all_that_was_known_of_it(
    memories: Stub,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
    redis: Redis,
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "_VERSIONS_AT_ONCE", 2)
    await write_decision(database, caller, "memory.embed", granted=True)
    request = pb.CreateMemoryRequest(
        memory=pb.Memory(content=SECRET, session_id="visit", session_position=1),
        request_id="once",
    )
    kept = (await memories.CreateMemory(request, metadata=bearer(caller))).memory
    await create(memories, caller, "How are you?", session_id="visit", session_position=0)
    for tags in (["a"], ["b"], ["c"], ["d"]):
        await change(memories, caller, kept, tags=tags)
    await change(memories, caller, kept, content=AGAIN)
    await upload(memories, caller, of(kept, (1, 0)))
    await owner.execute("UPDATE memory_scores SET sentiment = 0.1")
    assert texts(await ask(memories, caller, "psoriasis"))
    await answers.flush()
    marked = await change(memories, caller, kept, sensitive=True)
    assert (marked.content, marked.sensitive, marked.content_hash) == (AGAIN, True, "")
    await assert_no_trace(owner, redis, caller)
    assert texts(await ask(memories, caller, "psoriasis")) == []
    assert [was.content for was in await versions(memories, caller, kept)] == [
        AGAIN,
        AGAIN,
        *[SECRET] * 5,
    ]
    assert await owner.fetchval("SELECT count(*) FROM embeddings") == 0
    row = await owner.fetchrow(
        "SELECT sentiment, text_version FROM memory_scores ORDER BY memory_id LIMIT 1"
    )
    assert tuple(row) == (None, 7)
    refusal = await refusal_of(memories.CreateMemory(request, metadata=bearer(caller)))
    assert refusal.reason == "REQUEST_ID_REUSED"


async def test_turn_of_a_conversation_that_is_marked_is_no_longer_told_by_its_request(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    """One may try out what the short turns of a request said."""
    turns = [pb.SessionTurn(content=content) for content in ("Well?", SECRET)]
    request = pb.AppendToSessionRequest(session_id="visit", turns=turns, request_id="once")
    answer = await memories.AppendToSession(request, metadata=bearer(caller))
    fingerprint = await owner.fetchval("SELECT fingerprint FROM requests")
    _, memory = answer.memories
    await change(memories, caller, memory, tier=pb.TIER_LONG_TERM)
    assert await owner.fetchval("SELECT fingerprint FROM requests") == fingerprint
    await change(memories, caller, memory, sensitive=True)
    assert await owner.fetchval("SELECT fingerprint FROM requests") != fingerprint


async def test_copy_that_the_short_term_kept_goes(
    memories: Stub, caller: Caller, redis: Redis
) -> None:
    memory = await create(memories, caller, SECRET, tier=pb.TIER_SHORT_TERM)
    user = f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:"
    expiries: Any = await redis.zrange(f"{user}shorts", 0, -1, withscores=True)
    (key,) = [key async for key in redis.scan_iter(f"{user}short:*")]
    copy: Any = await redis.hgetall(key)
    await change(memories, caller, memory, tier=pb.TIER_LONG_TERM)
    await redis.hset(key, mapping=copy)
    await redis.zadd(f"{user}shorts", dict(expiries))
    assert b"soriasis" in await values_in(redis, caller)
    await change(memories, caller, memory, sensitive=True)
    assert b"soriasis" not in await values_in(redis, caller)


async def test_batch_that_made_a_marked_memory_tells_no_longer_what_it_said(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    plain = await create_all(memories, caller, "tea at four", SECRET, request_id="plain")
    sealed = pb.Memory(content=AGAIN, sensitive=True)
    assert (await create_all(memories, caller, sealed, request_id="sealed"))[0].memory.sensitive
    again = await create_all(memories, caller, sealed, request_id="sealed")
    assert [(result.memory.content, result.created) for result in again] == [(AGAIN, False)]
    claims = "SELECT request_id, fingerprint FROM requests WHERE method = 'BatchCreateMemories'"
    before = dict(tuple(row) for row in await owner.fetch(claims))
    await change(memories, caller, plain[1].memory, sensitive=True)
    after = dict(tuple(row) for row in await owner.fetch(claims))
    assert [name for name in before if before[name] != after[name]] == ["plain"]
    assert SECRET not in await whole_database(owner)


async def test_transcript_leaves_it_out(memories: Stub, caller: Caller) -> None:
    first, second = await append(memories, caller, "How are you?", SECRET)
    await change(memories, caller, second, tier=pb.TIER_LONG_TERM)
    await change(memories, caller, second, sensitive=True)
    await write_down(memories, caller)
    assert await transcript(memories, caller) == [(0, first.content)]


async def test_unmarked_memory_is_plain_again_and_its_past_stays_sealed(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    kept = await keep(memories, caller, session_id="visit", session_position=1)
    await create(memories, caller, "How are you?", session_id="visit", session_position=0)
    await change(memories, caller, kept, content=AGAIN)
    plain = await change(memories, caller, kept, sensitive=False)
    assert (plain.content, plain.sensitive) == (AGAIN, False)
    assert plain.content_hash == hashlib.sha256(AGAIN.encode()).hexdigest()
    found = texts(await ask(memories, caller, "psoriasis"))
    assert found == [AGAIN, "How are you?"], "its neighbour is found by its words again"
    stored = await whole_database(owner)
    assert AGAIN in stored
    assert SECRET not in stored
    told = await versions(memories, caller, kept)
    assert [(was.content, was.sensitive) for was in told] == [
        (AGAIN, False),
        (AGAIN, True),
        (SECRET, True),
    ]


async def test_marking_and_rewriting_at_once_end_sealed(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    for number in range(10):
        memory = await create(memories, caller, f"{SECRET} {number}")
        await asyncio.gather(
            change(memories, caller, memory, sensitive=True),
            change(memories, caller, memory, content=f"{AGAIN} {number}"),
            change(memories, caller, memory, tags=["health"]),
        )
        ended = await get(memories, caller, memory)
        assert (ended.content, ended.sensitive) == (f"{AGAIN} {number}", True)
    stored = await whole_database(owner)
    assert SECRET not in stored
    assert AGAIN not in stored


async def test_vector_that_is_being_kept_goes_when_its_memory_is_marked(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    await write_decision(database, caller, "memory.embed", granted=True)
    memory = await create(memories, caller, SECRET)
    await upload(memories, caller, of(await create(memories, caller, "tea"), (0, 1)))
    async with owner.transaction():
        await owner.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('embeddings ' || $1, 0))",
            str(caller.user_id),
        )
        marking = asyncio.create_task(change(memories, caller, memory, sensitive=True))
        await owner.execute(
            """
            INSERT INTO embeddings (tenant_id, user_id, model, memory_id, dimension, in_graph,
                                    content_hash, vector)
            SELECT tenant_id, user_id, 'tiny', id, 2, false, content_hash, '[1,0]'
              FROM memories WHERE content = $1
            """,
            SECRET,
        )
        await asyncio.sleep(0.1)
        assert not marking.done()
    assert (await marking).sensitive
    assert await owner.fetchval("SELECT count(*) FROM embeddings") == 1
