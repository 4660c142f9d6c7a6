"""Conversations: turns get positions of their own, and are promoted or dropped at the end."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from datetime import UTC

import asyncpg
import grpc
import httpx
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server.cache import KEY_PREFIX, Redis
from server.caller import Caller
from server.database import Database
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import withdraw, write_settings, write_weights
from tests.memory.calls import Stub, change, create, rate
from tests.refusals import refusal_of

ALL, NONE, EARNED = pb.SESSION_KEEP_ALL, pb.SESSION_KEEP_NONE, pb.SESSION_KEEP_EARNED


async def append(
    memories: Stub, caller: Caller, *said: str, session: str = "s", request_id: str = ""
) -> list[pb.Memory]:
    request = pb.AppendToSessionRequest(
        session_id=session,
        turns=[pb.SessionTurn(content=text) for text in said],
        request_id=request_id,
    )
    answer = await memories.AppendToSession(request, metadata=bearer(caller))
    return list(answer.memories)


async def end(
    memories: Stub, caller: Caller, keep: pb.SessionKeep.ValueType = EARNED, session: str = "s"
) -> pb.EndSessionResponse:
    request = pb.EndSessionRequest(session_id=session, keep=keep)
    return await memories.EndSession(request, metadata=bearer(caller))


async def tiers(memories: Stub, caller: Caller) -> Mapping[str, int]:
    """Return the tiers of what is kept, by content."""
    answer = await memories.ListMemories(pb.ListMemoriesRequest(), metadata=bearer(caller))
    assert len({memory.id for memory in answer.memories}) == len(answer.memories)
    return {memory.content: memory.tier for memory in answer.memories}


def positions(turns: list[pb.Memory]) -> list[int]:
    return [turn.session_position for turn in turns]


def key(caller: Caller, name: str) -> str:
    return f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:{name}"


# --- appending


async def test_turns_become_short_term_memories_at_the_next_positions(
    memories: Stub, caller: Caller, clock: FakeClock
) -> None:
    turns = [
        pb.SessionTurn(content="Hello", speaker="Ann", tags=["b", "a"], channels=["voice"]),
        pb.SessionTurn(content="Hi", speaker="Bob", source=pb.SOURCE_AGENT, scope=pb.SCOPE_SHARED),
    ]
    turns[0].occur_time.FromJsonString("2026-01-02T03:04:05Z")
    request = pb.AppendToSessionRequest(session_id="s", turns=turns)
    first, second = (await memories.AppendToSession(request, metadata=bearer(caller))).memories
    assert (first.tier, first.session_id, first.session_position) == (pb.TIER_SHORT_TERM, "s", 0)
    assert (first.speaker, list(first.tags), list(first.channels)) == ("Ann", ["a", "b"], ["voice"])
    assert first.occur_time.ToJsonString() == "2026-01-02T03:04:05Z"
    assert (second.session_position, second.source) == (1, pb.SOURCE_AGENT)
    assert second.occur_time.ToDatetime(tzinfo=UTC) == clock.now
    for turn in (first, second):
        got = await memories.GetMemory(pb.GetMemoryRequest(id=turn.id), metadata=bearer(caller))
        assert got.memory == turn
    # The same words again are another turn.
    (third,) = await append(memories, caller, "Hello")
    assert third.session_position == 2
    assert first.id < second.id < third.id


async def test_turns_that_are_appended_at_once_never_share_a_position(
    memories: Stub, caller: Caller
) -> None:
    answers = await asyncio.gather(
        *(append(memories, caller, *(f"{number} {n}" for n in range(3))) for number in range(20))
    )
    starts = sorted(positions(turns) for turns in answers)
    assert starts == [[n, n + 1, n + 2] for n in range(0, 60, 3)]


async def test_positions_go_on_after_the_highest_one_that_is_known(
    memories: Stub, caller: Caller, redis: Redis
) -> None:
    await create(memories, caller, "long", session_id="s", session_position=6)
    assert positions(await append(memories, caller, "a")) == [7]
    await create(
        memories, caller, "short", tier=pb.TIER_SHORT_TERM, session_id="s", session_position=11
    )
    assert positions(await append(memories, caller, "b", "c")) == [12, 13]
    await create(memories, caller, "later", session_id="s", session_position=40)
    assert positions(await append(memories, caller, "d")) == [41]
    assert positions(await append(memories, caller, "e", session="another")) == [0]
    await end(memories, caller, NONE)
    await lose(redis, caller)
    assert positions(await append(memories, caller, "f")) == [42]


async def lose(redis: Redis, caller: Caller) -> None:
    """Lose all that Redis has of a user."""
    names = [name async for name in redis.scan_iter(key(caller, "*"))]
    await redis.delete(*names)


async def test_other_users_count_their_own_positions(
    memories: Stub, caller: Caller, database: Database
) -> None:
    await append(memories, caller, "a", "b")
    assert positions(await append(memories, await new_caller(database), "a")) == [0]


async def test_conversation_without_positions_left_is_refused(
    memories: Stub, caller: Caller
) -> None:
    await create(memories, caller, "last", session_id="s", session_position=2**31 - 1)
    refused = await refusal_of(append(memories, caller, "one more"))
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("session_id",))


async def test_bad_turns_are_refused_with_the_field_at_fault(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    turn = pb.SessionTurn(content="x")
    for request, field in (
        (pb.AppendToSessionRequest(turns=[turn]), "session_id"),
        (pb.AppendToSessionRequest(session_id="x" * 129, turns=[turn]), "session_id"),
        (pb.AppendToSessionRequest(session_id="s"), "turns"),
        (pb.AppendToSessionRequest(session_id="s", turns=[turn] * 101), "turns"),
        (
            pb.AppendToSessionRequest(session_id="s", turns=[turn, pb.SessionTurn(content=" ")]),
            "turns[1].content",
        ),
        (
            pb.AppendToSessionRequest(
                session_id="s", turns=[turn, turn, pb.SessionTurn(content="x", tags=[""])]
            ),
            "turns[2].tags",
        ),
        (
            pb.AppendToSessionRequest(session_id="s", turns=[turn], request_id="x" * 65),
            "request_id",
        ),
    ):
        refused = await refusal_of(memories.AppendToSession(request, metadata=bearer(caller)))
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 0
    assert await tiers(memories, caller) == {}


async def test_turns_that_do_not_all_fit_are_all_refused(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await write_settings(owner, caller, short_term_bytes=100)
    refused = await refusal_of(append(memories, caller, "a" * 60, "b" * 41))
    assert refused.reason == "QUOTA_EXCEEDED"
    assert await tiers(memories, caller) == {}
    assert positions(await append(memories, caller, "a" * 60, "b" * 40)) == [0, 1]


async def test_without_consent_nothing_is_appended(memories: Stub, database: Database) -> None:
    stranger = await new_caller(database, consenting=False)
    refused = await refusal_of(append(memories, stranger, "a"))
    assert refused.reason == "CONSENT_MISSING"


# --- appending again


async def test_request_id_makes_a_retry_safe(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    first = await append(memories, caller, "a", "b", request_id="r")
    answers = await asyncio.gather(
        *(append(memories, caller, "a", "b", request_id="r") for _ in range(5))
    )
    assert all(turns == first for turns in answers)
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 2
    assert positions(await append(memories, caller, "c")) == [2]
    refused = await refusal_of(append(memories, caller, "a", "x", request_id="r"))
    assert refused.reason == "REQUEST_ID_REUSED"


async def test_retries_at_once_append_once(memories: Stub, caller: Caller) -> None:
    answers = await asyncio.gather(
        *(append(memories, caller, "a", "b", request_id="r") for _ in range(10))
    )
    assert all(turns == answers[0] for turns in answers)
    assert positions(await append(memories, caller, "c")) == [2]


async def test_retry_finds_turns_that_were_promoted_meanwhile(
    memories: Stub, caller: Caller
) -> None:
    turns = await append(memories, caller, "a", "b", "c", request_id="r")
    await change(memories, caller, turns[1], tier=pb.TIER_PERMANENT)
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=turns[2].id), metadata=bearer(caller))
    again = await append(memories, caller, "a", "b", "c", request_id="r")
    assert [(turn.id, turn.tier) for turn in again] == [
        (turns[0].id, pb.TIER_SHORT_TERM),
        (turns[1].id, pb.TIER_PERMANENT),
    ]
    await end(memories, caller, NONE)
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=turns[1].id), metadata=bearer(caller))
    refused = await refusal_of(append(memories, caller, "a", "b", "c", request_id="r"))
    assert refused.code is grpc.StatusCode.NOT_FOUND


async def test_what_redis_took_and_nobody_was_told_of_is_not_appended_twice(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    """The transaction that holds the request id and the audit events is lost before its commit."""
    await refuse_events(owner, "memory.create")
    try:
        refused = await refusal_of(append(memories, caller, "a", "b", request_id="r"))
        assert refused.code is grpc.StatusCode.INTERNAL
    finally:
        await owner.execute("DROP TRIGGER lost ON audit_events; DROP FUNCTION fail()")
    assert await owner.fetchval("SELECT count(*) FROM requests") == 0
    again = await append(memories, caller, "a", "b", request_id="r")
    assert positions(again) == [0, 1]
    assert await append(memories, caller, "a", "b", request_id="r") == again
    assert positions(await append(memories, caller, "c")) == [2]
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 3


# --- ending


async def test_what_has_earned_it_is_promoted_and_the_rest_is_dropped(
    memories: Stub, caller: Caller, clock: FakeClock
) -> None:
    turns = await append(memories, caller, "dull", "good", "bad", "useful", "rated")
    await rate(memories, caller, turns[1], thumbs_up=True)
    await rate(memories, caller, turns[2], thumbs_down=True)
    await rate(memories, caller, turns[3], useful=True)
    await rate(memories, caller, turns[4], rating=3)
    await create(
        memories,
        caller,
        "protected",
        tier=pb.TIER_SHORT_TERM,
        session_id="s",
        session_position=5,
        protected=True,
    )
    other = await append(memories, caller, "elsewhere", session="another")
    answer = await end(memories, caller)
    assert (answer.promoted, answer.dropped) == (3, 3)
    assert answer.end_time.ToDatetime(tzinfo=UTC) == clock.now
    assert await tiers(memories, caller) == {
        "good": pb.TIER_LONG_TERM,
        "useful": pb.TIER_LONG_TERM,
        "protected": pb.TIER_LONG_TERM,
        "elsewhere": other[0].tier,
    }


async def test_ending_again_changes_nothing_and_says_the_same(
    memories: Stub, caller: Caller, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    turns = await append(memories, caller, "a", "b", "c")
    await rate(memories, caller, turns[0], thumbs_up=True)
    first = await end(memories, caller)
    clock.advance(minutes=1)
    assert await end(memories, caller) == first
    assert await end(memories, caller, ALL) == first
    name = f"session/{hashlib.sha256(b's').hexdigest()}"
    ends = "SELECT count(*) FROM audit_events WHERE action = 'session.end' AND resource = $1"
    assert await owner.fetchval(ends, name) == 1


async def test_conversation_that_ended_can_be_taken_up_again(
    memories: Stub, caller: Caller
) -> None:
    await append(memories, caller, "a", "b")
    await end(memories, caller, ALL)
    assert positions(await append(memories, caller, "c", "d", "e")) == [2, 3, 4]
    answer = await end(memories, caller, NONE)
    assert (answer.promoted, answer.dropped) == (2, 3)
    assert positions(await append(memories, caller, "f")) == [5]


async def test_everything_is_kept_or_nothing_if_asked_for(memories: Stub, caller: Caller) -> None:
    turns = await append(memories, caller, *(f"turn {n}" for n in range(100)))
    turns += await append(memories, caller, *(f"turn {n}" for n in range(100, 150)))
    answer = await end(memories, caller, ALL)
    assert (answer.promoted, answer.dropped) == (150, 0)
    kept = await memories.ListMemories(
        pb.ListMemoriesRequest(page_size=1000), metadata=bearer(caller)
    )
    assert [memory.id for memory in kept.memories] == [turn.id for turn in reversed(turns)]
    assert {memory.tier for memory in kept.memories} == {pb.TIER_LONG_TERM}
    await append(memories, caller, "x", "y", session="another")
    answer = await end(memories, caller, NONE, session="another")
    assert (answer.promoted, answer.dropped) == (0, 2)


async def test_promoted_turns_are_found_like_turns_that_were_always_durable(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    said = ["Where is the kayak?", "In Hamburg.", "Which Hamburg?", "The big one.", "I see."]
    durable = await new_caller(database)
    for place, text in enumerate(said):
        await create(memories, durable, text, session_id="s", session_position=place)
    turns = await append(memories, caller, *said)
    await change(memories, caller, turns[2], tier=pb.TIER_LONG_TERM)
    await end(memories, caller, ALL)
    rows = await owner.fetch("SELECT user_id, content, terms::text AS terms FROM memories")
    terms = {(row["user_id"], row["content"]): row["terms"] for row in rows}
    for text in said:
        assert terms[caller.user_id, text] == terms[durable.user_id, text]


async def test_every_turn_is_told_to_the_audit_log(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    turns = await append(memories, caller, "keep zebra", "drop zebra")
    await rate(memories, caller, turns[0], thumbs_up=True)
    await end(memories, caller)
    events = await owner.fetch("SELECT action, resource FROM audit_events ORDER BY id")
    assert [tuple(event) for event in events] == [
        ("memory.create", turns[0].id),
        ("memory.create", turns[1].id),
        ("memory.feedback", turns[0].id),
        ("memory.promote", turns[0].id),
        ("memory.delete", turns[1].id),
        ("session.end", f"session/{hashlib.sha256(b's').hexdigest()}"),
    ]
    assert "zebra" not in str(events)


async def test_unknown_and_foreign_conversations_are_not_found(
    memories: Stub, caller: Caller, database: Database
) -> None:
    await append(memories, caller, "a")
    stranger = await new_caller(database)
    for whose, session in ((caller, "another"), (stranger, "s")):
        refused = await refusal_of(end(memories, whose, session=session))
        assert refused.code is grpc.StatusCode.NOT_FOUND
    assert await tiers(memories, caller) == {"a": pb.TIER_SHORT_TERM}


async def test_bad_ends_are_refused(memories: Stub, caller: Caller) -> None:
    for request, field in (
        (pb.EndSessionRequest(), "session_id"),
        (pb.EndSessionRequest(session_id="s", keep=9), "keep"),  # type: ignore[arg-type]
    ):
        refused = await refusal_of(memories.EndSession(request, metadata=bearer(caller)))
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


async def test_after_consent_is_withdrawn_a_conversation_can_only_be_dropped(
    memories: Stub, caller: Caller, database: Database
) -> None:
    await append(memories, caller, "a", "b")
    await withdraw(database, caller)
    for keep in (EARNED, ALL):
        assert (await refusal_of(end(memories, caller, keep))).reason == "CONSENT_MISSING"
    assert len(await tiers(memories, caller)) == 2
    assert (await end(memories, caller, NONE)).dropped == 2
    assert await tiers(memories, caller) == {}


async def test_what_does_not_fit_into_the_long_term_stays_for_the_next_try(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await append(memories, caller, "a" * 60, "b" * 61)
    await write_settings(owner, caller, long_term_bytes=100)
    assert (await refusal_of(end(memories, caller, ALL))).reason == "QUOTA_EXCEEDED"
    assert set((await tiers(memories, caller)).values()) == {pb.TIER_SHORT_TERM}
    await owner.execute("UPDATE settings SET long_term_bytes = NULL")
    assert (await end(memories, caller, ALL)).promoted == 2


async def test_ends_at_once_promote_everything_once(memories: Stub, caller: Caller) -> None:
    await append(memories, caller, *(f"turn {n}" for n in range(30)))
    await asyncio.gather(*(end(memories, caller, ALL) for _ in range(5)))
    answer = await end(memories, caller, ALL)
    assert (answer.promoted, answer.dropped) == (30, 0)
    assert len(await tiers(memories, caller)) == 30


async def test_turns_that_come_while_a_conversation_ends_are_not_lost(
    memories: Stub, caller: Caller
) -> None:
    async def talk() -> list[pb.Memory]:
        return [turn for n in range(20) for turn in await append(memories, caller, f"turn {n}")]

    await append(memories, caller, "first")
    talking = asyncio.create_task(talk())
    await asyncio.gather(*(end(memories, caller, ALL) for _ in range(5)))
    assert positions(await talking) == list(range(1, 21))
    await end(memories, caller, ALL)
    said = ["first", *(f"turn {n}" for n in range(20))]
    assert await tiers(memories, caller) == dict.fromkeys(said, pb.TIER_LONG_TERM)


# --- written down


async def transcript(memories: Stub, caller: Caller) -> list[tuple[int, str]]:
    """Return positions and texts of what was written down."""
    request = pb.GetTranscriptRequest(session_id="s")
    answer = await memories.GetTranscript(request, metadata=bearer(caller))
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        lines = (await client.get(answer.download_url)).text.splitlines()
    assert answer.transcript.turns == len(lines)
    turns = [json.loads(line) for line in lines]
    return [(turn["position"], turn["content"]) for turn in turns]


async def write_down(
    memories: Stub, caller: Caller, keep: pb.SessionKeep.ValueType = EARNED
) -> pb.EndSessionResponse:
    request = pb.EndSessionRequest(session_id="s", keep=keep, write_transcript=True)
    return await memories.EndSession(request, metadata=bearer(caller))


async def test_what_was_said_is_written_down_if_asked_for_whatever_is_kept(
    memories: Stub, caller: Caller
) -> None:
    turns = await append(memories, caller, "a", "b", "c", "d")
    await change(memories, caller, turns[1], tier=pb.TIER_PERMANENT)
    await rate(memories, caller, turns[2], thumbs_up=True)
    answer = await write_down(memories, caller)
    assert (answer.promoted, answer.dropped) == (1, 2)
    assert await transcript(memories, caller) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    # Nothing is written again when nothing is left to end.
    assert await write_down(memories, caller) == answer
    assert len(await transcript(memories, caller)) == 4
    await append(memories, caller, "e")
    await write_down(memories, caller, NONE)
    assert await transcript(memories, caller) == [(1, "b"), (2, "c"), (4, "e")]


async def test_nothing_is_written_down_unless_asked_for(memories: Stub, caller: Caller) -> None:
    await append(memories, caller, "a")
    await end(memories, caller, ALL)
    assert (await refusal_of(transcript(memories, caller))).code is grpc.StatusCode.NOT_FOUND


async def test_end_that_was_interrupted_is_written_down_by_the_next_try(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await append(memories, caller, "a", "b")
    await write_down(memories, caller, ALL)
    await append(memories, caller, "c")
    await refuse_events(owner, "session.end")
    try:
        refused = await refusal_of(end(memories, caller, ALL))
        assert refused.code is grpc.StatusCode.INTERNAL
    finally:
        await owner.execute("DROP TRIGGER lost ON audit_events; DROP FUNCTION fail()")
    answer = await write_down(memories, caller, ALL)
    assert (answer.promoted, answer.dropped) == (3, 0)
    assert await transcript(memories, caller) == [(0, "a"), (1, "b"), (2, "c")]


async def refuse_events(owner: asyncpg.Connection, action: str) -> None:
    """Have transactions fail at their commit that tell the audit log of something."""
    await owner.execute(
        f"""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'lost'; END $$;
        CREATE CONSTRAINT TRIGGER lost AFTER INSERT ON audit_events
            DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN (new.action = '{action}') EXECUTE FUNCTION fail();
        """
    )


@pytest.mark.parametrize("preset", [(0.25, 0.5, 0.15, 0.1), (0.0, 0.0, 1.0, 0.0)])
async def test_what_earns_it_depends_on_the_user_s_weights(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, preset: tuple[float, ...]
) -> None:
    await write_weights(owner, caller, preset)
    good, useful = await append(memories, caller, "good", "useful")
    await rate(memories, caller, good, thumbs_up=True)
    await rate(memories, caller, useful, useful=True)
    await end(memories, caller)
    expected = {"good", "useful"} if preset[1] else {"useful"}
    assert set(await tiers(memories, caller)) == expected
