"""What users are after: kept, changed, listed, and the source of relevance to goals."""

from __future__ import annotations

import asyncio

import asyncpg
import grpc
import numpy as np
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import given
from hypothesis import strategies as st
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from server.memory import words
from server.memory.goals import MOST, NO_GOALS, Goals
from server.memory.meditation_store import MeditationStore
from server.preferences import Language
from tests.conftest import FakeClock, bearer, new_caller
from tests.deciding import withdraw
from tests.memory.calls import Stub, create
from tests.memory.calls import change as rewrite
from tests.memory.scoring_calls import scoring_stream
from tests.refusals import refusal_of

ACTIVE = pb.ListGoalsRequest(active_only=True)


async def aim(memories: Stub, caller: Caller, content: str, **fields: bool) -> pb.Goal:
    request = pb.CreateGoalRequest(goal=pb.Goal(content=content, **fields))  # type: ignore[arg-type]
    return (await memories.CreateGoal(request, metadata=bearer(caller))).goal


async def change(memories: Stub, caller: Caller, goal: pb.Goal, *paths: str) -> pb.Goal:
    request = pb.UpdateGoalRequest(goal=goal, update_mask=FieldMask(paths=paths))
    return (await memories.UpdateGoal(request, metadata=bearer(caller))).goal


async def listed(memories: Stub, caller: Caller, request: pb.ListGoalsRequest) -> list[str]:
    answer = await memories.ListGoals(request, metadata=bearer(caller))
    return [goal.content for goal in answer.goals]


async def test_goal_is_kept_shown_changed_and_deleted(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, clock: FakeClock
) -> None:
    goal = await aim(memories, caller, "learn to swim")
    assert (goal.content, goal.active, goal.etag) == ("learn to swim", True, "v1")
    clock.advance(hours=1)
    goal.content, goal.active = "swim a mile", False
    changed = await change(memories, caller, goal, "content", "active")
    assert (changed.content, changed.active, changed.etag) == ("swim a mile", False, "v2")
    assert changed.update_time.seconds - changed.create_time.seconds == 3600
    shown = await memories.GetGoal(pb.GetGoalRequest(id=goal.id), metadata=bearer(caller))
    assert shown.goal == changed
    await memories.DeleteGoal(pb.DeleteGoalRequest(id=goal.id), metadata=bearer(caller))
    for missing in (
        memories.GetGoal(pb.GetGoalRequest(id=goal.id), metadata=bearer(caller)),
        memories.DeleteGoal(pb.DeleteGoalRequest(id=goal.id), metadata=bearer(caller)),
        change(memories, caller, goal, "content"),
    ):
        assert (await refusal_of(missing)).reason == "RESOURCE_NOT_FOUND"
    events = await owner.fetch("SELECT action, resource FROM audit_events ORDER BY id")
    assert [tuple(event) for event in events] == [
        (f"goal.{done}", goal.id) for done in ("create", "update", "delete")
    ]


async def test_goals_are_listed_newest_first_page_by_page(memories: Stub, caller: Caller) -> None:
    for n in range(5):
        await aim(memories, caller, f"goal {n}", active=n % 2 == 0)
    assert await listed(memories, caller, ACTIVE) == ["goal 4", "goal 2", "goal 0"]
    found, token = [], ""
    while True:
        request = pb.ListGoalsRequest(page_size=2, page_token=token)
        page = await memories.ListGoals(request, metadata=bearer(caller))
        found += [goal.content for goal in page.goals]
        token = page.next_page_token
        if not token:
            break
    assert found == [f"goal {n}" for n in (4, 3, 2, 1, 0)]
    refusal = await refusal_of(
        memories.ListGoals(
            pb.ListGoalsRequest(page_token=request.page_token, active_only=True),
            metadata=bearer(caller),
        )
    )
    assert refusal.reason == "PAGE_TOKEN_INVALID"


async def test_request_id_makes_one_goal(memories: Stub, caller: Caller) -> None:
    request = pb.CreateGoalRequest(goal=pb.Goal(content="swim"), request_id="r1")
    first = await memories.CreateGoal(request, metadata=bearer(caller))
    assert await memories.CreateGoal(request, metadata=bearer(caller)) == first
    assert await listed(memories, caller, ACTIVE) == ["swim"]
    request.goal.content = "run"
    again = memories.CreateGoal(request, metadata=bearer(caller))
    assert (await refusal_of(again)).reason == "REQUEST_ID_REUSED"


async def test_goal_of_another_looks_like_none(
    memories: Stub, caller: Caller, database: Database
) -> None:
    goal = await aim(memories, caller, "swim")
    other = await new_caller(database)
    for attempt in (
        memories.GetGoal(pb.GetGoalRequest(id=goal.id), metadata=bearer(other)),
        memories.DeleteGoal(pb.DeleteGoalRequest(id=goal.id), metadata=bearer(other)),
        change(memories, other, goal, "content"),
    ):
        refusal = await refusal_of(attempt)
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.NOT_FOUND, ())
    assert await listed(memories, other, pb.ListGoalsRequest()) == []


async def test_stale_etag_is_refused(memories: Stub, caller: Caller) -> None:
    goal = await aim(memories, caller, "swim")
    await change(memories, caller, goal, "content")
    assert (await refusal_of(change(memories, caller, goal, "content"))).reason == "ETAG_MISMATCH"


@pytest.mark.parametrize(
    ("goal", "paths", "field"),
    [
        (pb.Goal(content=" "), ["content"], "goal.content"),
        (pb.Goal(content="é" * 513), ["content"], "goal.content"),
        (pb.Goal(content="a\0b"), ["content"], "goal.content"),
        (pb.Goal(), ["active"], "goal.active"),
        (pb.Goal(content="a"), [], "update_mask"),
        (pb.Goal(content="a"), ["content", "etag"], "update_mask"),
    ],
)
async def test_goal_that_cannot_be_kept_is_refused(
    memories: Stub, caller: Caller, goal: pb.Goal, paths: list[str], field: str
) -> None:
    kept = await aim(memories, caller, "swim")
    changed = pb.Goal(id=kept.id)
    changed.MergeFrom(goal)
    refusal = await refusal_of(change(memories, caller, changed, *paths))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))
    if field == "goal.content":
        refusal = await refusal_of(aim(memories, caller, goal.content))
        assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


async def test_goals_need_consent_to_be_kept_and_none_to_go(
    memories: Stub, caller: Caller, database: Database
) -> None:
    goal = await aim(memories, caller, "swim")
    await withdraw(database, caller)
    for attempt in (aim(memories, caller, "run"), change(memories, caller, goal, "content")):
        assert (await refusal_of(attempt)).reason == "CONSENT_MISSING"
    await memories.DeleteGoal(pb.DeleteGoalRequest(id=goal.id), metadata=bearer(caller))


async def test_no_more_goals_than_there_may_be_whoever_adds_at_once(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    for n in range(MOST - 2):
        await aim(memories, caller, f"goal {n}")
    attempts = [aim(memories, caller, f"one more {n}") for n in range(6)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    refused = [one for one in outcomes if isinstance(one, grpc.aio.AioRpcError)]
    assert [one.code() for one in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4
    assert await owner.fetchval("SELECT count(*) FROM goals") == MOST


# --- what memories have to do with them


async def relevances(
    scoring: rpc.ScoringServiceAsyncStub, meditations: MeditationStore, caller: Caller
) -> list[float]:
    """Run a meditation, and return what its batches said of goals; None is NaN."""
    run = await meditations.start(caller, "", full_run=True)
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id, size=100)
        batches = await stream.score_all(echo_goals=True)
    return [x for batch in batches for x in np.frombuffer(batch.goal_match, "<f4").tolist()]


async def test_memories_match_the_goal_that_they_share_most_words_and_tags_with(
    memories: Stub,
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    caller: Caller,
    database: Database,
) -> None:
    for text, *tags in [
        ("Went swimming in the sea before breakfast",),
        ("The train leaves at nine",),
        ("A new coat", "swim", "summer"),
        ("Swims every summer",),
    ]:
        await create(memories, caller, text, tags=tags)
    await create(memories, other := await new_caller(database), "swim in summer")
    assert np.isnan(await relevances(scoring, meditations, caller)).all()
    await aim(memories, caller, "to swim in summer")
    await aim(memories, caller, "ride trains", active=False)
    assert await relevances(scoring, meditations, caller) == [0.5, 0, 1, 1]
    await aim(memories, caller, "early breakfast by the sea")
    found = await relevances(scoring, meditations, caller)
    assert found == pytest.approx([2 / 3, 0, 1, 1])
    assert np.isnan(await relevances(scoring, meditations, other)).all()


async def test_text_is_matched_anew_when_it_its_tags_or_the_goals_change(
    memories: Stub,
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    memory = await create(memories, caller, "a swim")
    goal = await aim(memories, caller, "swim")
    assert await relevances(scoring, meditations, caller) == [1]
    # What is known already is not read again.
    await owner.execute("UPDATE memory_scores SET relevance_to_goals = 0.25")
    assert await relevances(scoring, meditations, caller) == [0.25]

    await rewrite(memories, caller, memory, content="a run")
    assert await relevances(scoring, meditations, caller) == [0]
    await rewrite(memories, caller, memory, tags=["swim"])
    assert await relevances(scoring, meditations, caller) == [1]
    goal.content = "swim or fly"
    goal = await change(memories, caller, goal, "content")
    assert await relevances(scoring, meditations, caller) == [0.5]
    goal.active = False
    await change(memories, caller, goal, "active")
    assert np.isnan(await relevances(scoring, meditations, caller)).all()


async def test_sealed_texts_are_matched_by_their_tags_alone(
    memories: Stub,
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    caller: Caller,
    owner: asyncpg.Connection,
) -> None:
    await create(memories, caller, "swim alone", tags=["sea"])
    await owner.execute(
        "UPDATE memories SET content = '', sealed = '\\x00', sensitive = true, version = 2"
    )
    await aim(memories, caller, "swim")
    assert await relevances(scoring, meditations, caller) == [0]
    await aim(memories, caller, "sea")
    assert await relevances(scoring, meditations, caller) == [1]


vocabulary = st.sampled_from(["swim", "swimming", "sea", "the", "to", "Summer", "éclair", "海"])
texts = st.lists(vocabulary, max_size=6).map(" ".join)


def plain_match(goals: list[str], content: str, tags: list[str]) -> float:
    """Say the same slowly: for each goal, count its words that were said."""
    best = 0.0
    for goal in goals:
        wanted = sorted(set(words.stems(goal, Language.ENGLISH)))
        said = [stem for text in (content, *tags) for stem in words.stems(text, Language.ENGLISH)]
        found = sum(1 for word in wanted if word in said)
        best = max(best, found / len(wanted) if wanted else 0.0)
    return best


@given(st.lists(texts, max_size=4), texts, st.lists(vocabulary, max_size=3))
def test_match_agrees_with_the_plain_one(goals: list[str], content: str, tags: list[str]) -> None:
    read = Goals.read(goals, Language.ENGLISH)
    assert read.match(content, tags) == pytest.approx(plain_match(goals, content, tags), abs=1e-6)


def test_key_tells_goals_and_languages_apart_but_not_their_order() -> None:
    both = Goals.read(["swim", "run"], Language.ENGLISH)
    assert Goals.read(["run", "swim"], Language.ENGLISH).key == both.key
    others = {
        Goals.read(contents, language).key
        for contents, language in [
            (["swim"], Language.ENGLISH),
            (["swim run"], Language.ENGLISH),
            (["swim", "run"], Language.GERMAN),
        ]
    }
    assert len(others - {both.key, NO_GOALS}) == 3
