"""Promotion: short-term memories become durable under their ids, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.maintenance.v1 import maintenance_pb2 as maintenance
from kimberly.maintenance.v1 import maintenance_pb2_grpc as maintenance_rpc
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from server.database import Database
from server.memory.earning import fresh_score, has_earned
from server.memory.embedding_search import EmbeddingSearch
from server.memory.model import Change, Filter, Memory, Source, Tier
from server.memory.promotion import Promotion
from server.memory.questions import Question
from server.memory.retrieval import Answer, Retrieval
from server.memory.search_store import SearchStore, Words
from server.memory.sensitive import Opener
from server.memory.shared_store import SharedStore
from server.memory.short_term import Remembered, ShortTermStore
from server.memory.short_term_bodies import Kept
from server.preferences import PRESETS, USUAL_WEIGHTS, ScoringPreset
from tests.conftest import FakeClock, as_worker, bearer, data_keys_of, new_caller
from tests.deciding import withdraw
from tests.memory.calls import Stub, archive, change, create, versions
from tests.refusals import refusal_of
from workers import scoring
from workers.promotion import PROMOTE, Promoting
from workers.stream import Task

SHORT, LONG, PERMANENT = pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM, pb.TIER_PERMANENT
TASK = Task("job_1", 1, PROMOTE, {}, 1)


async def keep(memories: Stub, caller: Caller, content: str, **fields: Any) -> pb.Memory:
    return await create(memories, caller, content, tier=SHORT, **fields)


async def rate(memories: Stub, caller: Caller, memory: pb.Memory, **fields: Any) -> pb.Memory:
    request = pb.GiveFeedbackRequest(id=memory.id, **fields)
    return (await memories.GiveFeedback(request, metadata=bearer(caller))).memory


async def get(memories: Stub, caller: Caller, memory: pb.Memory) -> pb.Memory:
    request = pb.GetMemoryRequest(id=memory.id)
    return (await memories.GetMemory(request, metadata=bearer(caller))).memory


async def listed(memories: Stub, caller: Caller, **fields: Any) -> list[tuple[str, int]]:
    answer = await memories.ListMemories(pb.ListMemoriesRequest(**fields), metadata=bearer(caller))
    return [(memory.content, memory.tier) for memory in answer.memories]


async def delete(memories: Stub, caller: Caller, memory: pb.Memory) -> None:
    request = pb.DeleteMemoryRequest(id=memory.id)
    await memories.DeleteMemory(request, metadata=bearer(caller))


def copy_of(caller: Caller, memory: pb.Memory) -> str:
    """Return the key of what Redis has of a memory."""
    digits = memory.id.removeprefix("mem_")
    return f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:short:{digits}"


@pytest.fixture
def promotion(database: Database, short_term: ShortTermStore) -> Promotion:
    return Promotion(database, short_term)


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
    await choose(owner, caller, long_term_bytes=100)
    refused = await refusal_of(change(memories, caller, memory, tier=LONG))
    assert refused.reason == "QUOTA_EXCEEDED"
    assert await listed(memories, caller) == [("x" * 121, SHORT)]


async def choose(owner: asyncpg.Connection, caller: Caller, **settings: int) -> None:
    names = "".join(f", {name}" for name in settings)
    values = "".join(f", {value}" for value in settings.values())
    await owner.execute(
        f"""
        INSERT INTO settings (tenant_id, user_id, language, scoring_preset, relevance_to_goals,
                              emotional_weight, predictive_value, recency_frequency, version{names})
        VALUES ($1, $2, 'english', 'balanced', 0.4, 0.3, 0.2, 0.1, 1{values})
        """,
        caller.tenant_id,
        caller.user_id,
    )


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


# --- what earns it


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("feedback", [None, 0.2, 0.6, 0.8, 1.0])
@pytest.mark.parametrize(("use_count", "useful_count"), [(0, 0), (3, 0), (25, 0), (0, 1), (0, 4)])
def test_score_is_the_scorer_s_of_a_memory_seen_just_now(
    clock: FakeClock,
    preset: ScoringPreset,
    feedback: float | None,
    use_count: int,
    useful_count: int,
) -> None:
    kept = of(clock, feedback=feedback, use_count=use_count, useful_count=useful_count)
    nan = np.array([np.nan])
    signals = scoring.Signals(
        days_since_last_seen=np.array([0.0]),
        use_count=np.array([use_count]),
        retrieved_count=np.array([0]),
        useful_count=np.array([useful_count]),
        feedback=nan if feedback is None else np.array([feedback]),
        sentiment=nan,
        goal_match=nan,
        weights=np.array([PRESETS[preset]]),
    )
    expected = float(scoring.score(signals).score[0])
    assert fresh_score(kept, PRESETS[preset]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("known", "earned"),
    [
        ({}, False),
        ({"feedback": 0.8}, True),
        ({"feedback": 0.6}, False),
        ({"useful_count": 1}, True),
        ({"use_count": 9}, False),
        ({"use_count": 10}, True),
        ({"feedback": 0.2, "use_count": 10}, False),
        ({"is_protected": True}, True),
    ],
)
def test_what_earns_it_by_the_usual_weights(
    clock: FakeClock, known: dict[str, Any], earned: bool
) -> None:
    assert has_earned(of(clock, **known), USUAL_WEIGHTS) is earned


def of(clock: FakeClock, useful_count: int = 0, **known: Any) -> Kept:
    memory = Memory(
        id=UUID(int=0),
        tier=Tier.SHORT_TERM,
        content="tea",
        tags=(),
        source=Source.CHAT,
        session_id="",
        session_position=None,
        speaker="",
        occurred_at=clock.now,
        size_bytes=3,
        content_hash=b"",
        version=1,
        created_at=clock.now,
        updated_at=clock.now,
        last_seen_at=clock.now,
        use_count=0,
    )
    return Kept(replace(memory, **known), useful_count)


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


# --- every night


async def run(channel: grpc.aio.Channel) -> int:
    promoting = Promoting(channel, metadata=as_worker(), page_size=50)
    return int((await promoting.promote(TASK))["promoted"])


async def test_nightly_run_promotes_what_has_earned_it_of_every_user(
    memories: Stub,
    maintenance_channel: grpc.aio.Channel,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    callers = [await new_caller(database) for _ in range(7)]
    for caller in callers:
        good = await keep(memories, caller, "good")
        await keep(memories, caller, "dull")
        await rate(memories, caller, good, thumbs_up=True)
    assert await run(maintenance_channel) == 7
    for caller in callers:
        assert await listed(memories, caller) == [("dull", SHORT), ("good", LONG)]
    assert await run(maintenance_channel) == 0
    actors = await owner.fetch("SELECT actor FROM audit_events WHERE action = 'memory.promote'")
    assert [row["actor"] for row in actors] == ["system"] * 7


async def test_user_who_withdrew_consent_is_passed_over(
    memories: Stub,
    maintenance_channel: grpc.aio.Channel,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    other = await new_caller(database)
    for whose in (caller, other):
        await rate(memories, whose, await keep(memories, whose, "good"), thumbs_up=True)
    await withdraw(database, caller)
    assert await run(maintenance_channel) == 1
    assert await listed(memories, caller) == [("good", SHORT)]
    assert await listed(memories, other) == [("good", LONG)]


async def test_the_best_are_promoted_as_long_as_there_is_room(
    memories: Stub, maintenance_channel: grpc.aio.Channel, caller: Caller, owner: asyncpg.Connection
) -> None:
    # Long-term memories may overrun by a fifth.
    await choose(owner, caller, long_term_bytes=100)
    for content, rating in (("a" * 50, 4), ("b" * 50, 5), ("c" * 60, 4), ("d" * 10, 4)):
        await rate(memories, caller, await keep(memories, caller, content), rating=rating)
    assert await run(maintenance_channel) == 3
    kept = {content[0] for content, tier in await listed(memories, caller) if tier == LONG}
    assert kept in ({"a", "b", "d"}, {"b", "c", "d"})


async def test_text_that_the_long_term_has_counts_there_as_seen(
    memories: Stub, maintenance_channel: grpc.aio.Channel, caller: Caller
) -> None:
    durable = await create(memories, caller, "tea")
    short = await keep(memories, caller, "tea")
    await rate(memories, caller, short, rating=5)
    assert await run(maintenance_channel) == 1
    assert await listed(memories, caller) == [("tea", LONG)]
    seen = await get(memories, caller, durable)
    assert (seen.use_count, seen.feedback) == (1, 1)


async def test_exits_are_forgotten_when_no_copy_can_be_left(
    memories: Stub, maintenance_channel: grpc.aio.Channel, caller: Caller, owner: asyncpg.Connection
) -> None:
    for content in ("old", "new"):
        await delete(memories, caller, await keep(memories, caller, content))
    await owner.execute(
        """
        UPDATE short_term_exits SET left_at = now() - interval '8 days 1 minute'
         WHERE memory_id = (SELECT min(memory_id::text)::uuid FROM short_term_exits)
        """
    )
    await run(maintenance_channel)
    assert await owner.fetchval("SELECT count(*) FROM short_term_exits") == 1


async def test_only_workers_may_promote_for_others(
    maintenance_channel: grpc.aio.Channel, caller: Caller
) -> None:
    stub = maintenance_rpc.MaintenanceServiceStub(maintenance_channel)
    request = maintenance.PromoteShortTermRequest()
    for metadata in (bearer(caller), ()):
        refused = await refusal_of(stub.PromoteShortTerm(request, metadata=metadata))
        assert refused.code in (
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.UNAUTHENTICATED,
        )
    refused = await refusal_of(
        stub.PromoteShortTerm(
            maintenance.PromoteShortTermRequest(page_token="x"), metadata=as_worker()
        )
    )
    assert refused.reason == "PAGE_TOKEN_INVALID"


async def test_more_than_one_page_is_promoted_in_one_go(
    memories: Stub, caller: Caller, promotion: Promotion, clock: FakeClock
) -> None:
    for number in range(120):
        await keep(memories, caller, f"tea {number}", protected=True)
    assert await promotion.promote_earned(caller, clock()) == 120
    assert await promotion.promote_earned(caller, clock()) == 0
