"""Promotion: short-term memories become durable under their ids, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from server.database import Database
from server.memory.embedding_search import EmbeddingSearch
from server.memory.model import Change, Filter, Tier
from server.memory.promotion import Promotion
from server.memory.questions import Question
from server.memory.retrieval import Answer, Retrieval
from server.memory.search_store import SearchStore, Words
from server.memory.sensitive import Opener
from server.memory.shared_store import SharedStore
from server.memory.short_term import Remembered, ShortTermStore
from tests.conftest import FakeClock, bearer, data_keys_of
from tests.deciding import write_settings
from tests.memory.calls import (
    Stub,
    archive,
    change,
    create,
    delete,
    get,
    keep,
    listed,
    rate,
    versions,
)
from tests.refusals import refusal_of

SHORT, LONG, PERMANENT = pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM, pb.TIER_PERMANENT


def copy_of(caller: Caller, memory: pb.Memory) -> str:
    """Return the key of what Redis has of a memory."""
    digits = memory.id.removeprefix("mem_")
    return f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:short:{digits}"


# --- by its user


@pytest.mark.parametrize("tier", [LONG, PERMANENT])
async def test_promoted_memory_keeps_all_it_was(
    memories: Stub,
    caller: Caller,
    clock: FakeClock,
    owner: asyncpg.Connection,
    redis: Redis,
    tier: pb.Tier.ValueType,
) -> None:
    memory = await keep(
        memories,
        caller,
        "tea",
        tags=["b", "a", "x\x1fy"],
        channels=["voice"],
        source=pb.SOURCE_UPLOAD,
        session_id="s",
        session_position=3,
        speaker="Ann",
        scope=pb.SCOPE_SHARED,
        protected=True,
    )
    await keep(memories, caller, "tea", session_id="s", session_position=3)
    clock.advance(minutes=1)
    second = await change(memories, caller, memory, content="green tea")
    await rate(memories, caller, memory, rating=4, useful=True)
    short = await get(memories, caller, memory)
    told = await versions(memories, caller, memory)
    clock.advance(minutes=1)
    promoted = await change(memories, caller, memory, tier=tier)

    expected = pb.Memory()
    expected.CopyFrom(short)
    expected.ClearField("expire_time")
    expected.tier, expected.version, expected.etag = tier, 3, "v3"
    expected.update_time.FromDatetime(clock.now)
    assert promoted == expected == await get(memories, caller, memory)
    assert (promoted.use_count, promoted.create_time) == (1, memory.create_time)
    newest, *older = await versions(memories, caller, memory)
    assert (newest.version, newest.tier) == (3, tier)
    for was, before in zip(older, told, strict=True):
        before.ClearField("expire_time")
        assert was == before
    assert [was.content for was in older] == ["green tea", "tea"]
    assert second.version == 2
    useful = await owner.fetchval("SELECT useful_count FROM memory_scores")
    assert useful == 1
    assert not await redis.exists(copy_of(caller, memory))
    actions = [row["action"] for row in await owner.fetch("SELECT action FROM audit_events")]
    assert actions[-1] == "memory.promote"


async def test_promotion_can_change_the_rest_too(memories: Stub, caller: Caller) -> None:
    memory = await keep(memories, caller, "tea", tags=["a"])
    promoted = await change(memories, caller, memory, tier=LONG, content="coffee", tags=["b"])
    assert (promoted.content, list(promoted.tags), promoted.version) == ("coffee", ["b"], 2)
    assert [was.content for was in await versions(memories, caller, memory)] == ["coffee", "tea"]


async def test_stale_etag_promotes_nothing(memories: Stub, caller: Caller) -> None:
    memory = await keep(memories, caller, "tea")
    await change(memories, caller, memory, content="coffee")
    request = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, tier=LONG, etag=memory.etag),
        update_mask=FieldMask(paths=["tier"]),
    )
    refused = await refusal_of(memories.UpdateMemory(request, metadata=bearer(caller)))
    assert refused.reason == "ETAG_MISMATCH"
    assert await listed(memories, caller) == [("coffee", SHORT)]


async def test_short_term_memory_stays_short_term_if_that_is_asked_for(
    memories: Stub, caller: Caller
) -> None:
    memory = await keep(memories, caller, "tea")
    changed = await change(memories, caller, memory, tier=SHORT, content="coffee")
    assert (changed.tier, changed.content) == (SHORT, "coffee")
    await change(memories, caller, memory, tier=LONG)
    refused = await refusal_of(change(memories, caller, memory, tier=SHORT))
    assert refused.fields == ("memory.tier",)


async def test_text_that_the_new_tier_has_is_refused(memories: Stub, caller: Caller) -> None:
    await create(memories, caller, "tea")
    memory = await keep(memories, caller, "tea")
    refused = await refusal_of(change(memories, caller, memory, tier=LONG))
    assert refused.reason == "RESOURCE_EXISTS"
    assert await listed(memories, caller) == [("tea", SHORT), ("tea", LONG)]
    assert (await change(memories, caller, memory, tier=PERMANENT)).tier == PERMANENT


async def test_what_does_not_fit_stays_short_term(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await keep(memories, caller, "x" * 121)
    await write_settings(owner, caller, long_term_bytes=100)
    refused = await refusal_of(change(memories, caller, memory, tier=LONG))
    assert refused.reason == "QUOTA_EXCEEDED"
    assert await listed(memories, caller) == [("x" * 121, SHORT)]


# --- crashes between Postgres and Redis


@pytest_asyncio.fixture
async def left_behind(
    memories: Stub, caller: Caller, redis: Redis
) -> AsyncIterator[tuple[pb.Memory, pb.Memory]]:
    """A memory that was promoted while Redis forgot that its copy went: before, and after."""
    memory = await keep(memories, caller, "kiwi", session_id="s", session_position=0)
    prefix = f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:"
    dumped = [
        (name, await redis.pexpiretime(name), await dump(redis, name))
        async for name in redis.scan_iter(f"{prefix}*")
    ]
    promoted = await change(memories, caller, memory, tier=LONG)
    for name, expiry, value in dumped:
        await restore(redis, name, expiry, value)
    yield memory, promoted


async def dump(redis: Redis, name: bytes) -> Any:
    """Return what a key holds: DUMP and RESTORE are not for services."""
    if await redis.type(name) == b"hash":
        return await redis.hgetall(name)
    if await redis.type(name) == b"zset":
        return await redis.zrange(name, 0, -1, withscores=True)
    return await redis.get(name)


async def restore(redis: Redis, name: bytes, expiry: int, value: Any) -> None:
    await redis.delete(name)
    if isinstance(value, bytes):
        await redis.set(name, value)
    elif isinstance(value, dict):
        await redis.hset(name, mapping=value)
    else:
        await redis.zadd(name, dict(value))
    await redis.pexpireat(name, expiry)


async def test_copy_that_stayed_is_no_second_memory(
    memories: Stub, caller: Caller, left_behind: tuple[pb.Memory, pb.Memory], redis: Redis
) -> None:
    memory, promoted = left_behind
    assert await redis.exists(copy_of(caller, memory))
    assert await get(memories, caller, memory) == promoted
    assert await listed(memories, caller) == [("kiwi", LONG)]
    assert not await redis.exists(copy_of(caller, memory))


@pytest.mark.parametrize("tiers", [[], [SHORT]])
async def test_copy_that_stayed_is_no_second_answer(
    memories: Stub,
    caller: Caller,
    left_behind: tuple[pb.Memory, pb.Memory],
    tiers: Sequence[pb.Tier.ValueType],
) -> None:
    request = pb.QueryMemoriesRequest(query="kiwi", tiers=tiers)
    answer = await memories.QueryMemories(request, metadata=bearer(caller))
    assert [match.memory.tier for match in answer.matches] == ([] if tiers else [LONG])


async def test_copy_that_stayed_does_not_bring_back_what_was_deleted_or_archived(
    memories: Stub, caller: Caller, left_behind: tuple[pb.Memory, pb.Memory], redis: Redis
) -> None:
    memory, _ = left_behind
    await archive(memories, caller, memory)
    assert await listed(memories, caller) == []
    await delete(memories, caller, memory)
    assert (await refusal_of(get(memories, caller, memory))).code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("first", ["get", "change", "rate", "end", "create", "promote"])
async def test_copy_that_stayed_is_never_written_to(
    memories: Stub,
    caller: Caller,
    left_behind: tuple[pb.Memory, pb.Memory],
    redis: Redis,
    promotion: Promotion,
    clock: FakeClock,
    first: str,
) -> None:
    memory, _ = left_behind
    match first:
        case "get":
            await delete(memories, caller, memory)
            await refusal_of(get(memories, caller, memory))
        case "change":
            changed = await change(memories, caller, memory, content="mango")
            assert (changed.tier, changed.content) == (LONG, "mango")
        case "rate":
            assert (await rate(memories, caller, memory, rating=5)).tier == LONG
        case "end":
            ended = await memories.EndSession(
                pb.EndSessionRequest(session_id="s", keep=pb.SESSION_KEEP_ALL),
                metadata=bearer(caller),
            )
            assert (ended.promoted, ended.dropped) == (0, 0)
        case "create":
            again = await keep(memories, caller, "kiwi", session_id="s", session_position=0)
            assert again.id != memory.id
        case "promote":
            assert await promotion.promote_earned(caller, clock()) == 0
    if first not in ("change", "rate"):
        assert not await redis.exists(copy_of(caller, memory))


async def test_write_that_waits_for_a_promotion_is_made_to_the_durable_memory(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await keep(memories, caller, "tea")
    await owner.execute("BEGIN; LOCK TABLE memory_versions IN EXCLUSIVE MODE")
    promoting = asyncio.create_task(change(memories, caller, memory, tier=LONG))
    await waiting(owner, 1)
    writing = asyncio.create_task(rate(memories, caller, memory, rating=5))
    await waiting(owner, 2)
    await owner.execute("COMMIT")
    await promoting
    rated = await writing
    assert (rated.tier, rated.feedback) == (LONG, 1)
    assert (await get(memories, caller, memory)).feedback == 1


async def waiting(owner: asyncpg.Connection, count: int) -> None:
    """Return when so many transactions wait for locks."""
    async with asyncio.timeout(30):
        while await owner.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < count:
            await owner.execute("SELECT pg_sleep(0.01)")


async def test_writes_and_promotions_at_once_lose_nothing(memories: Stub, caller: Caller) -> None:
    """Whatever was acknowledged is there: in a version, or in the feedback."""
    kept = [await keep(memories, caller, f"tea {number}") for number in range(10)]
    answers = await asyncio.gather(
        *(change(memories, caller, memory, content=f"{memory.content} a") for memory in kept),
        *(change(memories, caller, memory, tier=LONG) for memory in kept),
        *(rate(memories, caller, memory, rating=5) for memory in kept),
        *(change(memories, caller, memory, content=f"{memory.content} b") for memory in kept),
    )
    assert len(answers) == 40
    for memory in kept:
        told = await versions(memories, caller, memory)
        assert [was.version for was in told] == [4, 3, 2, 1]
        contents = {was.content for was in told}
        assert contents == {memory.content, f"{memory.content} a", f"{memory.content} b"}
        assert (told[0].tier, told[0].feedback) == (LONG, 1)


# --- what is asked meanwhile


class Held(SearchStore):
    """Durable memories, of which the first look is told only when something else has happened."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.looked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.looks = 0

    async def query(self, *arguments: Any, **named: Any) -> Words:
        self.looks += 1
        words = await super().query(*arguments, **named)
        self.looked.set()
        await self.go_on.wait()
        return words


class Later(ShortTermStore):
    """Short-term memories that are looked at only when something else has happened."""

    def __init__(self, redis: Redis, database: Database) -> None:
        super().__init__(redis, database, timedelta(days=1))
        self.go_on = asyncio.Event()

    async def query(self, *arguments: Any, **named: Any) -> Remembered:
        await self.go_on.wait()
        return await super().query(*arguments, **named)


class Stuck(ShortTermStore):
    """Short-term memories whose copies stay when they leave, as when Redis does not answer."""

    async def remove(self, caller: Caller, memory_ids: Sequence[UUID]) -> None:
        pass


async def ask_for_tea(
    caller: Caller,
    database: Database,
    durable: SearchStore,
    short: ShortTermStore,
    clock: FakeClock,
) -> Answer:
    """Ask, with a minute for whatever happens meanwhile."""
    embeddings, shared = EmbeddingSearch(database), SharedStore(database)
    opener = Opener(data_keys_of(database))
    retrieval = Retrieval(durable, embeddings, short, shared, opener, clock)
    until = asyncio.get_running_loop().time() + 60
    return await retrieval.query(caller, Question("tea", Filter(), clock()), until)


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("copy_stays", [True, False])
async def test_what_becomes_durable_between_two_looks_is_found(
    memories: Stub,
    caller: Caller,
    database: Database,
    redis: Redis,
    clock: FakeClock,
    copy_stays: bool,
    is_known: bool,
) -> None:
    memory = await keep(memories, caller, "tea")
    durable, short = Held(database), Later(redis, database)
    if is_known:
        await short.find(caller, Filter(), before=None)
    asking = asyncio.create_task(ask_for_tea(caller, database, durable, short, clock))
    await durable.looked.wait()
    here = Stuck if copy_stays else ShortTermStore
    leaving = Promotion(database, here(redis, database, timedelta(days=1)))
    memory_id = ids.parse(ids.MEMORY, memory.id, "id")
    await leaving.promote(caller, memory_id, Change(tier=Tier.LONG_TERM), clock())
    short.go_on.set()
    durable.go_on.set()
    answer = await asking
    assert [(one.memory.content, one.memory.tier) for one in answer.matches] == [
        ("tea", Tier.LONG_TERM)
    ]
    assert durable.looks == 2


async def test_nothing_is_looked_at_twice_where_nothing_moved(
    memories: Stub, caller: Caller, database: Database, redis: Redis, clock: FakeClock
) -> None:
    await keep(memories, caller, "tea")
    await create(memories, caller, "more tea")
    durable = Held(database)
    durable.go_on.set()
    short = ShortTermStore(redis, database, timedelta(days=1))
    for _ in range(2):
        answer = await ask_for_tea(caller, database, durable, short, clock)
        assert sorted(one.memory.content for one in answer.matches) == ["more tea", "tea"]
    assert durable.looks == 2
