"""Words and meaning together: one order, its components, its bounds."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database
from server.memory import ranking
from server.memory.fusion import Weights
from server.preferences import Language
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import write_decision
from tests.memory.calls import create
from tests.memory.meanings import ask, of, texts, upload
from tests.refusals import refusal_of


@pytest_asyncio.fixture
async def caller(database: Database) -> Caller:
    """A user who consented to memory.store and memory.embed."""
    caller = await new_caller(database)
    await write_decision(database, caller, "memory.embed", granted=True)
    return caller


def at(instant: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(instant)
    return stamp


async def keep(memories: rpc.MemoryServiceAsyncStub, caller: Caller, **fields: object) -> pb.Memory:
    memory = pb.Memory(**fields)  # type: ignore[arg-type]
    request = pb.CreateMemoryRequest(memory=memory)
    return (await memories.CreateMemory(request, metadata=bearer(caller))).memory


async def test_score_is_the_sum_of_its_components(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, clock: FakeClock
) -> None:
    month_ago = at(clock.now - timedelta(days=30))
    boat = await keep(
        memories, caller, content="the boat sails", speaker="Ann", occur_time=month_ago
    )
    ship = await keep(memories, caller, content="a ship at sea", speaker="Ben")
    await upload(memories, caller, of(boat, (0.6, 0.8)), of(ship, (1, 0)))
    answer = await ask(memories, caller, "Where is Ann's boat?", (1, 0))
    first, second = answer.matches
    assert first.memory.id == boat.id
    assert (first.lexical, second.lexical) == (1.0, 0.0)
    assert [first.semantic, second.semantic] == pytest.approx([0.6, 1], abs=1e-3)
    assert [first.freshness, second.freshness] == pytest.approx([0.5, 1])
    assert (first.memory_score, second.memory_score) == (0.5, 0.5)
    assert (first.speaker, second.speaker) == (1, 0)
    weights = Weights()
    for match in answer.matches:
        parts = (
            weights.semantic * match.semantic,
            (1 - weights.semantic) * match.lexical,
            weights.named_speaker * match.speaker,
            weights.session * match.session,
            weights.memory_score * match.memory_score,
            weights.freshness * match.freshness,
        )
        assert match.score == pytest.approx(sum(parts))
    assert first.reason == "shares boat, was said by Ann and is close in meaning"
    assert second.reason == "is close in meaning"


async def test_turns_of_a_session_in_which_something_answers_well_come_before_others(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    said = [("garden", 0, "the plum tree blossoms in spring"), ("garden", 9, "plum and pear")]
    for session, place, text in [("train", 0, "plum and figs"), *said]:
        await keep(memories, caller, content=text, session_id=session, session_position=place)
    request = pb.QueryMemoriesRequest(query="When does the plum tree blossom?")
    answer = await memories.QueryMemories(request, metadata=bearer(caller))
    best, same, other = answer.matches
    assert (best.memory.content, same.memory.content) == (said[0][2], said[1][2])
    assert (best.session, same.session) == (1, 1)
    assert same.lexical == other.lexical == other.session


async def test_turn_counts_together_with_what_was_said_around_it(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    near, far = (1.0, 0.0), (0.0, 1.0)
    said = {"lonely": near, "question": near, "answer": near, "aside": far, "end": far}
    for place, (text, values) in enumerate(said.items()):
        where = {} if text == "lonely" else {"session_id": "talk", "session_position": place}
        memory = await keep(memories, caller, content=text, **where)
        await upload(memories, caller, of(memory, values))
    answer = await ask(memories, caller, "", near)
    shares = {match.memory.content: match.semantic for match in answer.matches}
    assert shares == {
        "lonely": pytest.approx(1, abs=1e-3),
        "question": pytest.approx(3 / 3.5, abs=1e-3),
        "answer": pytest.approx(3 / 4.5, abs=1e-3),
        "aside": pytest.approx(1.5 / 4.5, abs=1e-3),
        "end": pytest.approx(0.5 / 3.5, abs=1e-3),
    }


async def test_memory_without_a_vector_is_found_by_its_words(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    await upload(memories, caller, of(await create(memories, caller, "far away"), (0, 1)))
    await create(memories, caller, "a cello in the attic")
    await create(memories, caller, "the cello is played tonight", tier=pb.TIER_SHORT_TERM)
    found = texts(await ask(memories, caller, "cello", (1, 0)))
    assert set(found[:2]) == {"a cello in the attic", "the cello is played tonight"}


async def test_min_score_leaves_out_what_is_below_it(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for text in ("apple apple apple", "apple pie and much else that has nothing to do with it"):
        await create(memories, caller, text)
    best, other = (await ask(memories, caller, "apple")).matches
    assert texts(await ask(memories, caller, "apple", min_score=best.score)) == [
        best.memory.content
    ]
    assert len((await ask(memories, caller, "apple", min_score=other.score)).matches) == 2


async def test_texts_fit_into_the_token_budget_best_first(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for text in ("plum", "plum " * 100, "a plum or two"):
        await create(memories, caller, text)
    every = texts(await ask(memories, caller, "plum"))
    small = [text for text in every if len(text) < 20]
    assert texts(await ask(memories, caller, "plum", max_tokens=1)) == ["plum"]
    assert texts(await ask(memories, caller, "plum", max_tokens=5)) == small
    assert texts(await ask(memories, caller, "plum", max_tokens=1000)) == every
    assert texts(await ask(memories, caller, "plum", max_tokens=1000, top_k=1)) == every[:1]


async def test_token_budget_may_hold_more_than_the_usual_ten(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for number in range(15):
        await create(memories, caller, f"fig {number}")
    assert len((await ask(memories, caller, "fig")).matches) == 10
    assert len((await ask(memories, caller, "fig", max_tokens=500)).matches) == 15


@pytest.mark.parametrize("tier", [pb.TIER_LONG_TERM, pb.TIER_SHORT_TERM])
async def test_time_window_holds_its_start_and_not_its_end(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, tier: pb.Tier
) -> None:
    days = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    for day in days:
        memory = await keep(
            memories, caller, content=f"pear {day.day}", occur_time=at(day), tier=tier
        )
        await upload(memories, caller, of(memory, (1, 0)))
    for after, before, expected in [
        (days[1], None, {"pear 2", "pear 3"}),
        (None, days[1], {"pear 1"}),
        (days[0], days[2], {"pear 1", "pear 2"}),
    ]:
        for values in ((), (1.0, 0.0)):
            answer = await ask(
                memories,
                caller,
                "pear",
                values,
                occurred_after=after and at(after),
                occurred_before=before and at(before),
            )
            assert set(texts(answer)) == expected


async def test_freshness_and_expiry_are_those_of_the_asked_instant(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, clock: FakeClock
) -> None:
    await create(memories, caller, "kiwi for long")
    fleeting = await create(memories, caller, "kiwi for now", tier=pb.TIER_SHORT_TERM)
    now = await ask(memories, caller, "kiwi")
    assert [match.freshness for match in now.matches] == [1.0, 1.0]
    moments = [(fleeting.expire_time.ToDatetime(UTC) + timedelta(seconds=n)) for n in (-1, 0)]
    before, after = [await ask(memories, caller, "kiwi", as_of_time=at(when)) for when in moments]
    assert (len(before.matches), texts(after)) == (2, ["kiwi for long"])
    later = await ask(memories, caller, "kiwi", as_of_time=at(clock.now + timedelta(days=60)))
    assert {match.freshness for match in later.matches} == {0.25}


async def test_conversation_gives_no_more_turns_than_asked(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for place in range(40):
        for session in ("long", "talk") if place < 3 else ("long",):
            await keep(
                memories,
                caller,
                content=f"lime {place} {session}",
                session_id=session,
                session_position=place,
            )
    for number in range(3):
        await create(memories, caller, f"lime {number}")
    answer = await ask(memories, caller, "lime", max_per_session=2, top_k=20)
    sessions = [match.memory.session_id for match in answer.matches]
    assert {name: sessions.count(name) for name in sessions} == {"long": 2, "talk": 2, "": 3}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.QueryMemoriesRequest(min_score=-0.1), "min_score"),
        (pb.QueryMemoriesRequest(min_score=2.1), "min_score"),
        (pb.QueryMemoriesRequest(min_score=float("nan")), "min_score"),
        (pb.QueryMemoriesRequest(max_tokens=0), "max_tokens"),
        (pb.QueryMemoriesRequest(max_tokens=1_000_001), "max_tokens"),
        (pb.QueryMemoriesRequest(max_per_session=0), "max_per_session"),
        (pb.QueryMemoriesRequest(max_per_session=101), "max_per_session"),
        (pb.QueryMemoriesRequest(occurred_after=Timestamp(seconds=1 << 60)), "occurred_after"),
        (pb.QueryMemoriesRequest(as_of_time=Timestamp(nanos=-1)), "as_of_time"),
        (
            pb.QueryMemoriesRequest(
                occurred_after=Timestamp(seconds=5), occurred_before=Timestamp(seconds=5)
            ),
            "occurred_before",
        ),
        (pb.QueryMemoriesRequest(embedding=pb.QueryEmbedding(values=[1, 0])), "embedding.model"),
        (pb.QueryMemoriesRequest(embedding=pb.QueryEmbedding(model="m")), "embedding.values"),
    ],
)
async def test_query_that_contradicts_itself_is_refused_by_field(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    request_: pb.QueryMemoriesRequest,
    field: str,
) -> None:
    refusal = await refusal_of(memories.QueryMemories(request_, metadata=bearer(caller)))
    assert refusal.fields == (field,)


def expected_order(
    lexical: dict[str, float],
    semantic: dict[str, float],
    priors: dict[str, float],
    *,
    wanted: int,
    share: float,
) -> dict[str, float]:
    """Return the scores of all candidates, best first, as written down: term by term."""
    found = dict(sorted(lexical.items(), key=lambda item: -item[1])[:wanted])
    floors = [min(found.values()) if len(found) == wanted else 0, min(semantic.values(), default=0)]
    matches = {
        text: share * max(semantic.get(text, floors[1]), 0) / max(semantic.values(), default=1)
        + (1 - share) * found.get(text, floors[0]) / max(found.values())
        for text in {**found, **semantic}
    }
    # None is of a session: each stands for its own.
    scores = {text: match + 0.1 * match + priors[text] for text, match in matches.items()}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


async def test_answer_is_what_the_formula_says(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    owner: asyncpg.Connection,
    clock: FakeClock,
) -> None:
    dice = random.Random(11)
    vocabulary = ["plum", "quince", "rowan", "sloe", "thyme"]
    vectors: dict[str, list[float]] = {}
    priors: dict[str, float] = {}
    for number in range(130):
        text = " ".join([*dice.choices(vocabulary, k=dice.randint(1, 9)), f"n{number}"])
        speaker, age = dice.choice(["Ann", "Ben", ""]), dice.randrange(100)
        memory = await keep(
            memories,
            caller,
            content=text,
            speaker=speaker,
            occur_time=at(clock.now - timedelta(days=age)),
        )
        worth = dice.choice([None, 0.0, 0.25, 1.0])
        await owner.execute(
            """
            UPDATE memory_scores
               SET score = $2, scored_at = now(), scorer_version = 1, relevance_to_goals = 0,
                   emotional_weight = 0, predictive_value = 0, recency_frequency = 0
             WHERE memory_id = $1 AND $2::real IS NOT NULL
            """,
            ids.parse(ids.MEMORY, memory.id, "id"),
            worth,
        )
        if number % 4:
            angle = dice.uniform(0, 3.1)
            vectors[text] = [math.cos(angle), math.sin(angle)]
            await upload(memories, caller, of(memory, vectors[text]))
        worth = 0.5 if worth is None else worth
        priors[text] = 0.3 * (speaker == "Ann") + 0.05 * worth + 0.05 * 0.5 ** (age / 30)
    weights = {text: ranking.weights(text) for text in priors}
    asked = ranking.query_weights(
        "What of Ann's plum and sloe?",
        ranking.Lexicon.of(map(set, weights.values())),
        Language.ENGLISH,
    )
    lexical = {text: ranking.score(asked, own) for text, own in weights.items()}
    lexical = {text: amount for text, amount in lexical.items() if amount > 0}
    semantic = {text: own[0] for text, own in vectors.items()}
    nearest = dict(sorted(semantic.items(), key=lambda item: -item[1])[:100])
    for near, values, wanted in (({}, (), 50), (nearest, (1.0, 0.0), 100)):
        answer = await ask(memories, caller, "What of Ann's plum and sloe?", values)
        expected = expected_order(lexical, near, priors, wanted=wanted, share=0.5 if near else 0.0)
        assert texts(answer) == list(expected)[:10]
        assert [match.score for match in answer.matches] == pytest.approx(
            list(expected.values())[:10], abs=2e-3
        )
