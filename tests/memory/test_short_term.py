"""The short-term tier: everything a memory has, versions, feedback, quota, lifetime, search."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb

from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from server.database import Database
from server.errors import InvalidArgument
from server.memory import ranking
from server.memory.insertion import new_memory
from server.memory.model import Change, Draft, Filter, Source, Tier
from server.memory.short_term import ShortTermStore
from server.memory.short_term_bodies import body_of
from server.memory.short_term_cache import Snapshot, Snapshots
from server.preferences import Language
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import withdraw, write_settings
from tests.memory.calls import Stub, change, delete, get, keep, short_term_used, versions
from tests.refusals import refusal_of

SHORT = pb.TIER_SHORT_TERM


@pytest.fixture(autouse=True)
async def plans(owner: asyncpg.Connection) -> AsyncIterator[None]:
    """Give the plans their sizes back: no other test resets them."""
    before = await owner.fetchval("SELECT short_term_bytes FROM plans WHERE name = 'free'")
    yield
    await limit(owner, before)


async def limit(owner: asyncpg.Connection, size: int) -> None:
    """Shrink the short term of the free plan, so that a test need not write much."""
    await owner.execute("UPDATE plans SET short_term_bytes = $1 WHERE name = 'free'", size)


def key(caller: Caller, name: str) -> str:
    return f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:{name}"


async def listed(memories: Stub, caller: Caller, **fields: Any) -> list[str]:
    request = pb.ListMemoriesRequest(**fields)
    answer = await memories.ListMemories(request, metadata=bearer(caller))
    return [memory.content for memory in answer.memories]


# --- everything a memory has


async def test_short_term_memory_has_every_field(
    memories: Stub, caller: Caller, clock: FakeClock
) -> None:
    created = await keep(
        memories,
        caller,
        "Ann likes tea",
        tags=["b", "a"],
        channels=["voice", "email"],
        source=pb.SOURCE_UPLOAD,
        session_id="s1",
        session_position=7,
        speaker="Ann",
        scope=pb.SCOPE_SHARED,
        protected=True,
    )
    assert await get(memories, caller, created) == created
    assert (list(created.channels), created.scope) == (["email", "voice"], pb.SCOPE_SHARED)
    assert (created.protected, created.author) == (True, pb.AUTHOR_USER)
    assert (created.consent_version, created.state) == (1, pb.MEMORY_STATE_ACTIVE)
    assert created.create_time.ToDatetime(tzinfo=UTC) == clock.now


async def test_channels_and_scope_can_be_changed(memories: Stub, caller: Caller) -> None:
    memory = await keep(memories, caller, "tea", channels=["voice"])
    changed = await change(memories, caller, memory, channels=["email"], scope=pb.SCOPE_PUBLIC)
    assert (list(changed.channels), changed.scope) == (["email"], pb.SCOPE_PUBLIC)
    assert await get(memories, caller, memory) == changed


async def test_memory_that_an_earlier_release_wrote_is_read(
    memories: Stub, caller: Caller, redis: Redis
) -> None:
    memory = await keep(memories, caller, "tea")
    name = key(caller, f"short:{memory.id.removeprefix('mem_')}")
    body = json.loads(await redis.hget(name, "body") or b"")
    for field in ("channels", "scope", "protected", "created_by", "consent_version"):
        del body[field]
    await redis.hset(name, "body", json.dumps(body))
    await redis.hdel(name, "place")
    await redis.delete(key(caller, "short-sizes"))
    old = await get(memories, caller, memory)
    assert (old.content, old.scope, old.consent_version) == ("tea", pb.SCOPE_PRIVATE, 0)
    assert (await change(memories, caller, memory, content="green tea")).version == 2
    assert await short_term_used(memories, caller) == (len("green tea"), 1)
    await delete(memories, caller, memory)
    assert await short_term_used(memories, caller) == (0, 0)


async def test_what_is_sensitive_never_reaches_redis(
    short_term: ShortTermStore, memories: Stub, caller: Caller, clock: FakeClock, redis: Redis
) -> None:
    draft = Draft(Tier.SHORT_TERM, "PIN 4711", (), Source.CHAT, "", None, "", None)
    with pytest.raises(InvalidArgument, match="encrypted"):
        await short_term.create(caller, replace(draft, is_sensitive=True), "", clock())
    assert [name async for name in redis.scan_iter(key(caller, "*"))] == []
    kept, _ = await short_term.create(caller, draft, "", clock())
    with pytest.raises(InvalidArgument, match="encrypted"):
        await short_term.update(caller, kept.id, Change(is_sensitive=True), clock())


# --- versions


async def test_every_change_keeps_the_version_before_it(
    memories: Stub, caller: Caller, clock: FakeClock
) -> None:
    memory = await keep(memories, caller, "first", tags=["a"], channels=["voice"])
    told = [memory]
    for fields in ({"content": "second"}, {"tags": ["b"]}, {"scope": pb.SCOPE_SHARED}):
        clock.advance(minutes=1)
        told.append(await change(memories, caller, memory, **fields))
    assert await versions(memories, caller, memory) == told[::-1]
    pages, token = [], ""
    while True:
        page = await memories.ListMemoryVersions(
            pb.ListMemoryVersionsRequest(id=memory.id, page_size=3, page_token=token),
            metadata=bearer(caller),
        )
        pages.append([version.version for version in page.versions])
        token = page.next_page_token
        if not token:
            break
    assert pages == [[4, 3, 2], [1]]


async def test_versions_live_as_long_as_the_memory_and_go_with_it(
    memories: Stub, caller: Caller, redis: Redis
) -> None:
    memory = await keep(memories, caller, "first")
    await change(memories, caller, memory, content="second")
    digits = memory.id.removeprefix("mem_")
    short, past = key(caller, f"short:{digits}"), key(caller, f"past:{digits}")
    assert await redis.pexpiretime(past) == await redis.pexpiretime(short) > 0
    await delete(memories, caller, memory)
    assert await redis.exists(past, short) == 0


async def test_versions_have_as_much_room_as_the_memories_and_the_oldest_go_first(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, redis: Redis
) -> None:
    await limit(owner, 100)
    memory = await keep(memories, caller, "x" * 40)
    for letter in "abcde":
        await change(memories, caller, memory, content=letter * 40)
    kept = [version.content[0] for version in await versions(memories, caller, memory)]
    assert kept == ["e", "d", "c"]
    assert await redis.hget(key(caller, "short-sizes"), "past") == b"80"
    await delete(memories, caller, memory)
    assert await redis.hget(key(caller, "short-sizes"), "past") == b"0"


async def test_changes_at_once_without_an_etag_are_all_made(memories: Stub, caller: Caller) -> None:
    memory = await keep(memories, caller, "tea")
    await asyncio.gather(*(change(memories, caller, memory, content=f"tea {n}") for n in range(12)))
    told = await versions(memories, caller, memory)
    assert [version.version for version in told] == list(range(13, 0, -1))
    assert {version.content for version in told} == {"tea", *(f"tea {n}" for n in range(12))}


# --- what only durable memories can


async def test_states_are_refused_with_advice(memories: Stub, caller: Caller) -> None:
    memory = await keep(memories, caller, "tea")
    metadata = bearer(caller)
    calls: list[Awaitable[Any]] = [
        memories.ArchiveMemory(pb.ArchiveMemoryRequest(id=memory.id), metadata=metadata),
        memories.RestoreMemory(pb.RestoreMemoryRequest(id=memory.id), metadata=metadata),
        memories.ProtectMemory(
            pb.ProtectMemoryRequest(id=memory.id, protected=True), metadata=metadata
        ),
        memories.DeleteMemory(
            pb.DeleteMemoryRequest(id=memory.id, grace=Duration(seconds=60)), metadata=metadata
        ),
    ]
    for call in calls:
        refused = await refusal_of(call)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "STATE_CONFLICT",
        )
        assert "long-term first" in refused.message
    assert await get(memories, caller, memory) == memory


async def test_what_someone_else_keeps_is_not_found(
    memories: Stub, caller: Caller, database: Database
) -> None:
    memory = await keep(memories, caller, "tea")
    metadata = bearer(await new_caller(database))
    calls: list[Awaitable[Any]] = [
        memories.ArchiveMemory(pb.ArchiveMemoryRequest(id=memory.id), metadata=metadata),
        memories.ProtectMemory(pb.ProtectMemoryRequest(id=memory.id), metadata=metadata),
        memories.GiveFeedback(pb.GiveFeedbackRequest(id=memory.id, useful=True), metadata=metadata),
        memories.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=memory.id), metadata=metadata),
        memories.UpdateMemory(
            pb.UpdateMemoryRequest(
                memory=pb.Memory(id=memory.id, tier=pb.TIER_LONG_TERM),
                update_mask=FieldMask(paths=["tier"]),
            ),
            metadata=metadata,
        ),
        memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=metadata),
    ]
    for call in calls:
        assert (await refusal_of(call)).code is grpc.StatusCode.NOT_FOUND
    assert await get(memories, caller, memory) == memory


async def test_no_short_term_memory_is_listed_as_archived(memories: Stub, caller: Caller) -> None:
    await keep(memories, caller, "tea")
    assert await listed(memories, caller, state=pb.MEMORY_STATE_ARCHIVED) == []
    assert await listed(memories, caller) == ["tea"]


# --- feedback


async def test_feedback_is_kept_and_makes_no_version(
    memories: Stub, caller: Caller, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    memory = await keep(memories, caller, "tea")
    clock.advance(minutes=5)

    async def rate(**fields: Any) -> pb.Memory:
        request = pb.GiveFeedbackRequest(id=memory.id, **fields)
        return (await memories.GiveFeedback(request, metadata=bearer(caller))).memory

    rated = await rate(thumbs_up=True)
    assert rated.feedback == pytest.approx(0.8)
    assert rated.version == 1
    assert rated.last_seen_time.ToDatetime(tzinfo=UTC) == clock.now
    assert (await rate(useful=True)).feedback == pytest.approx(0.8)
    assert (await rate(rating=5)).feedback == 1
    assert await get(memories, caller, memory) == await rate(useful=True)
    actions = await owner.fetch("SELECT action FROM audit_events ORDER BY id")
    assert [row["action"] for row in actions] == ["memory.create"] + ["memory.feedback"] * 4


async def test_without_consent_nothing_is_changed_or_rated_and_all_can_be_deleted(
    memories: Stub, caller: Caller, database: Database
) -> None:
    memory = await keep(memories, caller, "tea")
    await withdraw(database, caller)
    feedback = pb.GiveFeedbackRequest(id=memory.id, useful=True)
    for call in (
        change(memories, caller, memory, content="coffee"),
        change(memories, caller, memory, tier=pb.TIER_LONG_TERM),
        memories.GiveFeedback(feedback, metadata=bearer(caller)),
    ):
        assert (await refusal_of(call)).reason == "CONSENT_MISSING"
    await delete(memories, caller, memory)
    assert await short_term_used(memories, caller) == (0, 0)


# --- quota


async def test_usage_follows_every_change(memories: Stub, caller: Caller) -> None:
    memory = await keep(memories, caller, "żółw", tags=["ab"])
    assert await short_term_used(memories, caller) == (9, 1)
    await keep(memories, caller, "żółw", tags=["ab"])
    assert await short_term_used(memories, caller) == (9, 1)
    await change(memories, caller, memory, content="12345")
    assert await short_term_used(memories, caller) == (7, 1)
    other = await keep(memories, caller, "abc")
    assert await short_term_used(memories, caller) == (10, 2)
    await delete(memories, caller, memory)
    await delete(memories, caller, other)
    assert await short_term_used(memories, caller) == (0, 0)


async def test_what_does_not_fit_is_refused_with_used_limit_and_advice(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await limit(owner, 100)
    memory = await keep(memories, caller, "x" * 90)
    refused = await refusal_of(keep(memories, caller, "y" * 11))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
    )
    assert "short_term: 90 of 100 bytes are used; delete" in refused.message
    refused = await refusal_of(change(memories, caller, memory, content="z" * 101))
    assert refused.reason == "QUOTA_EXCEEDED"
    await keep(memories, caller, "y" * 10)
    await keep(memories, caller, "x" * 90)
    await limit(owner, 50)
    # What is there already may shrink, however full it is.
    await change(memories, caller, memory, content="w" * 89)
    assert await short_term_used(memories, caller) == (99, 2)


async def test_of_writers_at_once_exactly_those_who_fit_are_served(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await limit(owner, 100)
    answers = await asyncio.gather(
        *(keep(memories, caller, f"{number:010}") for number in range(40)), return_exceptions=True
    )
    assert sum(isinstance(answer, pb.Memory) for answer in answers) == 10
    assert await short_term_used(memories, caller) == (100, 10)


async def test_shares_of_the_quota_are_told_to_the_audit_log_once(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await limit(owner, 100)
    await keep(memories, caller, "a" * 79)
    full = await keep(memories, caller, "b")
    await keep(memories, caller, "c" * 19)
    await change(memories, caller, full, content="bb")
    events = await owner.fetch(
        "SELECT actor, resource FROM audit_events WHERE action = 'quota.threshold' ORDER BY id"
    )
    assert [tuple(event) for event in events] == [
        ("system", "usage/short_term/80"),
        ("system", "usage/short_term/100"),
    ]


# --- lifetime


@pytest.fixture
def brief(redis: Redis, database: Database) -> ShortTermStore:
    """A short term that is very short."""
    return ShortTermStore(redis, database, timedelta(seconds=2))


@pytest.fixture
def short_term(request: pytest.FixtureRequest, redis: Redis, database: Database) -> ShortTermStore:
    if "brief" in request.fixturenames:
        store: ShortTermStore = request.getfixturevalue("brief")
        return store
    return ShortTermStore(redis, database, timedelta(days=1))


async def expired(memory: pb.Memory) -> None:
    """Return when a memory has expired, by Redis's clock and by ours."""
    left = memory.expire_time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    await asyncio.sleep(left.total_seconds() + 0.01)


async def test_what_expires_by_itself_makes_room_again(
    memories: Stub,
    brief: ShortTermStore,
    caller: Caller,
    owner: asyncpg.Connection,
    redis: Redis,
    database: Database,
    clock: FakeClock,
) -> None:
    await limit(owner, 100)
    lasting = ShortTermStore(redis, database, timedelta(days=1))
    draft = Draft(Tier.SHORT_TERM, "x" * 20, (), Source.CHAT, "", None, "", None)
    await lasting.create(caller, draft, "", clock())
    for round_of in range(3):
        memory = await keep(memories, caller, f"{round_of}" * 60)
        await change(memories, caller, memory, content=f"{round_of}" * 70)
        assert await short_term_used(memories, caller) == (90, 2)
        await expired(memory)
        assert await listed(memories, caller) == ["x" * 20]
    assert await short_term_used(memories, caller) == (20, 1)
    sizes = await redis.hgetall(key(caller, "short-sizes"))
    assert sorted(sizes.values()) == [b"0", b"20", b"20"]


async def test_a_shorter_life_that_was_chosen_later_takes_nothing_from_the_others(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, redis: Redis
) -> None:
    first = await keep(memories, caller, "for a day")
    await write_settings(owner, caller, short_term_hours=1)
    second = await keep(memories, caller, "for an hour")
    day = first.expire_time.ToMilliseconds()
    for name in ("shorts", "short-sizes"):
        assert await redis.pexpiretime(key(caller, name)) == day
    await write_settings(owner, caller, short_term_hours=168)
    third = await keep(memories, caller, "for a week")
    now = datetime.now(UTC)
    hours = [
        (memory.expire_time.ToDatetime(tzinfo=UTC) - now) / timedelta(hours=1)
        for memory in (first, second, third)
    ]
    assert hours == pytest.approx([24, 1, 168], abs=0.02)
    week = third.expire_time.ToMilliseconds()
    for name in ("shorts", "short-sizes"):
        assert await redis.pexpiretime(key(caller, name)) == week
    assert await redis.pttl(key(caller, "shorts-version")) > 7 * 86_400_000


# --- the version of it all


async def test_every_write_brings_another_version_and_reading_none(
    memories: Stub, caller: Caller, redis: Redis
) -> None:
    async def version() -> int:
        return int(await redis.get(key(caller, "shorts-version")) or 0)

    seen = [await version()]
    memory = await keep(memories, caller, "tea")
    seen.append(await version())
    await keep(memories, caller, "tea")
    seen.append(await version())
    await change(memories, caller, memory, content="coffee")
    seen.append(await version())
    request = pb.GiveFeedbackRequest(id=memory.id, useful=True)
    await memories.GiveFeedback(request, metadata=bearer(caller))
    seen.append(await version())
    append = pb.AppendToSessionRequest(session_id="s", turns=[pb.SessionTurn(content="hello")])
    await memories.AppendToSession(append, metadata=bearer(caller))
    seen.append(await version())
    await memories.EndSession(pb.EndSessionRequest(session_id="s"), metadata=bearer(caller))
    seen.append(await version())
    await change(memories, caller, memory, tier=pb.TIER_LONG_TERM)
    seen.append(await version())
    assert sorted(set(seen)) == seen
    await listed(memories, caller)
    await short_term_used(memories, caller)
    assert await version() == seen[-1]


async def test_version_is_never_one_that_it_was_before(
    memories: Stub, caller: Caller, redis: Redis
) -> None:
    """Redis comes back from a crash a second younger, and is written to again."""
    await keep(memories, caller, "one")
    before = await redis.get(key(caller, "shorts-version"))
    await keep(memories, caller, "two")
    lost = await redis.get(key(caller, "shorts-version"))
    await redis.set(key(caller, "shorts-version"), before or b"")
    await keep(memories, caller, "three")
    assert int(await redis.get(key(caller, "shorts-version")) or 0) > int(lost or 0)


# --- search


async def query(memories: Stub, caller: Caller, text: str) -> list[str]:
    request = pb.QueryMemoriesRequest(query=text, tiers=[SHORT])
    answer = await memories.QueryMemories(request, metadata=bearer(caller))
    return [match.memory.content for match in answer.matches]


async def test_a_turn_is_found_by_the_words_of_the_turns_around_it(
    memories: Stub, caller: Caller
) -> None:
    said = ["Where did you buy the kayak?", "In Hamburg, last week.", "It is raining here."]
    turns = [pb.SessionTurn(content=text) for text in said]
    append = pb.AppendToSessionRequest(session_id="s", turns=turns)
    await memories.AppendToSession(append, metadata=bearer(caller))
    await keep(memories, caller, "In Bremen, last month.")
    assert await query(memories, caller, "kayak") == said[:3]


async def test_words_weigh_as_much_as_they_would_in_the_long_term(
    memories: Stub, short_term: ShortTermStore, caller: Caller, owner: asyncpg.Connection
) -> None:
    said = ["Where is the kayak?", "In Hamburg.", "Which Hamburg?", "The big one.", "Ah, I see."]
    turns = [pb.SessionTurn(content=text) for text in said]
    for session in ("short", "long"):
        append = pb.AppendToSessionRequest(session_id=session, turns=turns)
        await memories.AppendToSession(append, metadata=bearer(caller))
    end = pb.EndSessionRequest(session_id="long", keep=pb.SESSION_KEEP_ALL)
    await memories.EndSession(end, metadata=bearer(caller))
    rows = await owner.fetch("SELECT content, terms::text AS terms FROM memories")
    stored = {row["content"]: row["terms"] for row in rows}
    snapshot = await short_term._snapshot(caller)
    terms = await snapshot.terms(Language.ENGLISH)
    for memory in snapshot.memories:
        pairs = stored[memory.content].removeprefix("{").split("}")[0].split(",")
        durable = {int(pair.split(":")[0]): float(pair.split(":")[1]) for pair in pairs}
        assert sorted(terms[memory.id].values()) == pytest.approx(
            sorted(durable.values()), rel=1e-5
        )


async def test_texts_are_read_once_until_they_or_their_neighbours_change(
    memories: Stub, short_term: ShortTermStore, caller: Caller
) -> None:
    async def say(*words: str) -> None:
        turns = [pb.SessionTurn(content=word) for word in words]
        append = pb.AppendToSessionRequest(session_id="s", turns=turns)
        await memories.AppendToSession(append, metadata=bearer(caller))

    await say("kiwi one", "kiwi two", "kiwi three", "kiwi four")
    before = await short_term._snapshot(caller)
    first = await before.terms(Language.ENGLISH)
    assert await short_term._snapshot(caller) is before
    await say("kiwi five")
    after = await short_term._snapshot(caller)
    second = await after.terms(Language.ENGLISH)
    # The two turns before the new one have another neighbour now.
    assert [second[memory_id] is first[memory_id] for memory_id in sorted(first)] == [
        True,
        True,
        False,
        False,
    ]
    assert len(second) == 5


async def test_words_are_read_in_the_language_that_is_asked_for(
    short_term: ShortTermStore, memories: Stub, caller: Caller
) -> None:
    await keep(memories, caller, "Die Häuser am Meer")
    for language, found in ((Language.GERMAN, 1), (Language.ENGLISH, 0)):
        terms = ranking.query_weights("Haus", ranking.Lexicon(), language)
        matches = await short_term.query(caller, terms, Filter(), 10, language)
        assert len(matches.found) == found


async def test_what_another_process_wrote_is_found_at_once(
    memories: Stub, caller: Caller, redis: Redis, database: Database
) -> None:
    elsewhere = ShortTermStore(redis, database, timedelta(days=1))
    memory = await keep(memories, caller, "kiwi")
    assert [one.content for one in await elsewhere.find(caller, Filter(), before=None)] == ["kiwi"]
    await change(memories, caller, memory, content="mango")
    assert [one.content for one in await elsewhere.find(caller, Filter(), before=None)] == ["mango"]
    await delete(memories, caller, memory)
    assert await elsewhere.find(caller, Filter(), before=None) == []


async def test_what_expired_since_it_was_read_is_not_found(
    memories: Stub, brief: ShortTermStore, caller: Caller
) -> None:
    memory = await keep(memories, caller, "kiwi")
    assert await query(memories, caller, "kiwi") == ["kiwi"]
    await expired(memory)
    terms = ranking.query_weights("kiwi", ranking.Lexicon(), Language.ENGLISH)
    assert (await brief.query(caller, terms, Filter(), 10)).found == ()


def test_snapshots_take_a_bounded_part_of_the_process(clock: FakeClock) -> None:
    draft = Draft(Tier.SHORT_TERM, "x" * 1024 * 1024, (), Source.CHAT, "", None, "", None)
    body = body_of(
        new_memory(Caller(UUID(int=0), UUID(int=0)), UUID(int=0), draft, 1, clock())
    ).encode()
    large = [(f"{n:032x}".encode(), body, b"1", b"0", b"0", *(None,) * 3, b"1") for n in range(4)]
    snapshots = Snapshots()
    callers = [Caller(UUID(int=number), UUID(int=number)) for number in range(40)]
    for caller in callers:
        snapshots.keep(caller, Snapshot(b"1", large))
    kept = [caller for caller in callers if snapshots.find(caller)]
    assert kept == callers[-15:]
