"""Answers that are kept: given as long as they stand, gone when they must be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, timedelta

import asyncpg
import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.cache import Redis, open_cache
from server.caller import Caller
from server.database import Database
from server.memory import answers as answers_module
from server.memory.answers import LARGEST_ANSWER, LIFETIME, MOST_ANSWERS, Answers
from server.memory.search_store import Versions
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import write_decision, write_settings
from tests.faults.reach import until
from tests.memory.calls import Stub, archive, change, create, restore, values_in
from tests.memory.meanings import MODEL, ask, of, texts, upload
from tests.refusals import refusal_of

Write = Callable[[Stub, Caller, pb.Memory], Awaitable[object]]


@pytest_asyncio.fixture
async def caller(database: Database) -> Caller:
    """A user who consented to memory.store and memory.embed."""
    caller = await new_caller(database)
    await write_decision(database, caller, "memory.embed", granted=True)
    return caller


class Marked:
    """Tells kept answers from those that were found anew.

    Behind the back of all versions, scores are set: what was found before does not know them.
    """

    def __init__(self, memories: Stub, answers: Answers, owner: asyncpg.Connection) -> None:
        self._memories = memories
        self._answers = answers
        self._owner = owner

    async def ask(self, caller: Caller, *question: object, **bounds: object) -> None:
        """Ask, and see to it that the answer is kept."""
        await self._owner.execute("UPDATE memory_scores SET score = NULL, scored_at = NULL")
        await ask(self._memories, caller, *question, **bounds)  # type: ignore[arg-type]
        await self._answers.flush()
        await self._owner.execute(
            """
            UPDATE memory_scores
               SET score = 0.25, relevance_to_goals = 0, emotional_weight = 0,
                   predictive_value = 0, recency_frequency = 0, scorer_version = 1,
                   scored_at = now()
            """
        )

    async def is_kept(self, caller: Caller, *question: object, **bounds: object) -> bool:
        """Tell whether the answer is the one that was kept."""
        answer = await ask(self._memories, caller, *question, **bounds)  # type: ignore[arg-type]
        (kept,) = {match.memory_score == 0.5 for match in answer.matches}
        return kept


@pytest.fixture
def marked(memories: Stub, answers: Answers, owner: asyncpg.Connection) -> Marked:
    return Marked(memories, answers, owner)


async def test_same_question_gets_the_answer_that_is_kept(
    memories: Stub, caller: Caller, marked: Marked
) -> None:
    memory = await create(memories, caller, "tea at four")
    await upload(memories, caller, of(memory, (1, 0)))
    for question in (("tea",), ("tea", (1.0, 0.0))):
        await marked.ask(caller, *question)
        assert await marked.is_kept(caller, *question)
    assert not await marked.is_kept(caller, "tea?")
    assert not await marked.is_kept(caller, "tea", (0.0, 1.0))
    assert not await marked.is_kept(caller, "tea", top_k=3)


async def test_answer_belongs_to_who_asked(
    memories: Stub, caller: Caller, database: Database, marked: Marked
) -> None:
    other = await new_caller(database)
    for person, text in ((caller, "tea at four"), (other, "tea at five")):
        await create(memories, person, text)
        await marked.ask(person, "tea")
    assert texts(await ask(memories, caller, "tea")) == ["tea at four"]
    assert texts(await ask(memories, other, "tea")) == ["tea at five"]


@pytest.mark.parametrize(
    "write",
    [
        lambda memories, caller, _: create(memories, caller, "more tea"),
        lambda memories, caller, _: create(memories, caller, "tea at four"),
        lambda memories, caller, memory: change(memories, caller, memory, content="green tea"),
        lambda memories, caller, memory: change(memories, caller, memory, tags=["hot"]),
        lambda memories, caller, memory: upload(memories, caller, of(memory, (0.6, 0.8))),
        lambda memories, caller, _: memories.DeleteEmbeddings(
            pb.DeleteEmbeddingsRequest(model=MODEL), metadata=bearer(caller)
        ),
        lambda memories, caller, memory: memories.GiveFeedback(
            pb.GiveFeedbackRequest(id=memory.id, thumbs_up=True), metadata=bearer(caller)
        ),
        lambda memories, caller, memory: memories.ProtectMemory(
            pb.ProtectMemoryRequest(id=memory.id, protected=True), metadata=bearer(caller)
        ),
        lambda memories, caller, _: create(memories, caller, "short tea", tier=pb.TIER_SHORT_TERM),
    ],
    ids=[
        *("create", "see again", "change", "tag", "embed", "drop vectors", "rate", "protect"),
        "create for the short term",
    ],
)
async def test_write_makes_answers_stale_at_once(
    memories: Stub, caller: Caller, marked: Marked, write: Write
) -> None:
    memory = await create(memories, caller, "tea at four")
    await upload(memories, caller, of(memory, (1, 0)))
    await marked.ask(caller, "tea", (1.0, 0.0))
    await write(memories, caller, memory)
    answer = await ask(memories, caller, "tea", (1.0, 0.0))
    assert 0.25 in {match.memory_score for match in answer.matches}


async def test_archived_memory_is_in_no_answer_until_it_is_restored(
    memories: Stub, caller: Caller, marked: Marked
) -> None:
    await create(memories, caller, "tea at five")
    memory = await create(memories, caller, "tea at four")
    await marked.ask(caller, "tea")
    await archive(memories, caller, memory)
    assert texts(await ask(memories, caller, "tea")) == ["tea at five"]
    await marked.ask(caller, "tea")
    await restore(memories, caller, memory)
    assert len(texts(await ask(memories, caller, "tea"))) == 2


@pytest.mark.parametrize("purpose", ["memory.store", "memory.embed"])
async def test_withdrawn_consent_ends_answers_at_once(
    memories: Stub, caller: Caller, database: Database, marked: Marked, purpose: str
) -> None:
    await upload(memories, caller, of(await create(memories, caller, "tea at four"), (1, 0)))
    await marked.ask(caller, "tea", (1.0, 0.0))
    await write_decision(database, caller, purpose, granted=False)
    refusal = await refusal_of(ask(memories, caller, "tea", (1.0, 0.0)))
    assert refusal.reason == "CONSENT_MISSING"
    await write_decision(database, caller, purpose, granted=True)
    assert await marked.is_kept(caller, "tea", (1.0, 0.0))


async def test_changed_settings_count_at_the_next_question(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, marked: Marked
) -> None:
    await create(memories, caller, "tea at four")
    await marked.ask(caller, "tea")
    await write_settings(owner, caller, memory_score=1, freshness=0)
    (match,) = (await ask(memories, caller, "tea")).matches
    assert match.score == pytest.approx(1 + 0.25 + 0.1)


async def test_answer_is_kept_for_a_minute(
    memories: Stub, caller: Caller, marked: Marked, clock: FakeClock
) -> None:
    await create(memories, caller, "tea at four")
    await marked.ask(caller, "tea")
    clock.advance(seconds=LIFETIME.total_seconds() - 0.001)
    assert await marked.is_kept(caller, "tea")
    clock.advance(seconds=0.001)
    assert not await marked.is_kept(caller, "tea")


async def test_answer_ends_with_the_first_short_term_memory_that_expires(
    memories: Stub, caller: Caller, marked: Marked, clock: FakeClock
) -> None:
    await create(memories, caller, "tea at four")
    fleeting = await create(memories, caller, "tea now", tier=pb.TIER_SHORT_TERM)
    clock.now = fleeting.expire_time.ToDatetime(UTC) - timedelta(seconds=5)
    await marked.ask(caller, "tea")
    clock.advance(seconds=4.9)
    assert len(texts(await ask(memories, caller, "tea"))) == 2
    clock.advance(seconds=0.1)
    assert texts(await ask(memories, caller, "tea")) == ["tea at four"]


@pytest.mark.parametrize("tier", [pb.TIER_LONG_TERM, pb.TIER_SHORT_TERM])
async def test_deleted_memory_leaves_no_text_in_valkey(
    memories: Stub, caller: Caller, redis: Redis, answers: Answers, tier: pb.Tier.ValueType
) -> None:
    memory = await create(memories, caller, "xylophone", tier=tier)
    for question in ("xylophone", "the xylophone"):
        await ask(memories, caller, question)
    await answers.flush()
    assert b"xylophone" in await values_in(redis, caller)
    # It is found, but what is found waits to be kept.
    await ask(memories, caller, "a xylophone")
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))
    await answers.flush()
    assert b"xylophone" not in await values_in(redis, caller)
    await create(memories, caller, "marimba")
    await ask(memories, caller, "marimba")
    await answers.flush()
    assert b"marimba" in await values_in(redis, caller)


async def test_all_answers_go_a_minute_after_the_first(
    memories: Stub, caller: Caller, redis: Redis, answers: Answers
) -> None:
    await create(memories, caller, "tea at four")
    (key,) = [answers_module._key(caller, "answers")]
    for question in ("tea", "tea at four"):
        await ask(memories, caller, question)
        await answers.flush()
        assert 0 < await redis.pttl(key) <= LIFETIME.total_seconds() * 1000
        await redis.pexpire(key, 40_000)
    assert await redis.hlen(key) == 2
    assert await redis.pttl(key) <= 40_000


async def test_sensitive_memories_and_those_of_others_are_not_kept(
    memories: Stub,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
    redis: Redis,
    answers: Answers,
) -> None:
    await create(memories, caller, "tea at four")
    await ask(memories, caller, "tea", include_shared=True)
    await write_decision(database, caller, "memory.sensitive", granted=True)
    await create(memories, caller, "tea for two", sensitive=True)
    # However it came to be found: here, by words that it has not given away by itself.
    await owner.execute(
        """
        UPDATE memories SET terms = (SELECT terms FROM memories WHERE NOT sensitive)
         WHERE sensitive
        """
    )
    assert "tea for two" in texts(await ask(memories, caller, "tea"))
    await answers.flush()
    assert not await redis.exists(answers_module._key(caller, "answers"))


async def test_no_more_answers_are_kept_than_there_is_room_for(
    caller: Caller, redis: Redis, answers: Answers, clock: FakeClock
) -> None:
    until = asyncio.get_running_loop().time() + 60

    async def keep(question: int, body: bytes) -> None:
        look = await answers.look(caller, question.to_bytes(32), until)
        assert look is not None
        answers.keep(look, body, Versions(1, 1), clock.now, None)
        await answers.flush()

    for question in range(MOST_ANSWERS + 5):
        await keep(question, b"x")
    assert await redis.hlen(answers_module._key(caller, "answers")) == MOST_ANSWERS
    await answers.forget(caller)
    await keep(0, b"x" * (LARGEST_ANSWER + 1))
    assert (await answers.look(caller, bytes(32), until)).kept is None  # type: ignore[union-attr]


async def test_answers_are_kept_as_they_come(
    memories: Stub, caller: Caller, redis: Redis, answers: Answers
) -> None:
    await create(memories, caller, "tea at four")
    running = asyncio.create_task(answers.run())
    await ask(memories, caller, "tea")
    await until(lambda: redis.exists(answers_module._key(caller, "answers")), 30)
    running.cancel()
    await asyncio.wait([running])


async def test_more_questions_at_once_than_connections_are_all_answered(
    memories: Stub, caller: Caller
) -> None:
    await create(memories, caller, "tea at four")
    found = await asyncio.gather(*(ask(memories, caller, f"tea {n}") for n in range(100)))
    assert {tuple(texts(answer)) for answer in found} == {("tea at four",)}


class TestWithoutRedis:
    """The cache is out of reach; the short-term tier is not asked."""

    @pytest_asyncio.fixture
    async def answers(self) -> Answers:
        return Answers(open_cache("redis://127.0.0.1:1"))

    async def test_questions_are_answered_and_memories_deleted(
        self, memories: Stub, caller: Caller, answers: Answers
    ) -> None:
        memory = await create(memories, caller, "tea at four")
        for _ in range(2):
            answer = await ask(memories, caller, "tea", tiers=[pb.TIER_LONG_TERM])
            assert texts(answer) == ["tea at four"]
            await answers.flush()
        await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))
        assert texts(await ask(memories, caller, "tea", tiers=[pb.TIER_LONG_TERM])) == []


async def test_question_is_looked_for_when_it_comes_again(redis: Redis, caller: Caller) -> None:
    answers = Answers(redis)
    stranger = Caller(caller.tenant_id, ids.new_id())
    asked = [
        answers.comes_again(who, question)
        for who, question in (
            (caller, b"a"),
            (caller, b"b"),
            (stranger, b"a"),
            (caller, b"a"),
            (caller, b"a"),
        )
    ]
    assert asked == [False, False, False, True, True]
