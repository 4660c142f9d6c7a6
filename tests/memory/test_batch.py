"""Many memories in one transaction."""

from __future__ import annotations

import asyncio

import asyncpg
import grpc
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from tests.conftest import bearer
from tests.memory.calls import Stub, create
from tests.refusals import refusal_of


async def create_all(
    memories: Stub, caller: Caller, *drafts: pb.Memory | str, request_id: str = ""
) -> list[pb.CreateMemoryResponse]:
    request = pb.BatchCreateMemoriesRequest(
        memories=[
            pb.Memory(content=draft) if isinstance(draft, str) else draft for draft in drafts
        ],
        request_id=request_id,
    )
    answer = await memories.BatchCreateMemories(request, metadata=bearer(caller))
    return list(answer.results)


async def test_batch_answers_in_its_order_and_counts_known_text_as_seen(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    known = await create(memories, caller, "known")
    results = await create_all(memories, caller, "one", "known", "two", "one")
    assert [result.memory.content for result in results] == ["one", "known", "two", "one"]
    assert [result.created for result in results] == [True, False, True, False]
    assert results[1].memory.id == known.id
    assert results[3].memory.id == results[0].memory.id
    counts = await owner.fetch(
        "SELECT action, count(*) AS times FROM audit_events GROUP BY action ORDER BY action"
    )
    assert {row["action"]: row["times"] for row in counts} == {"memory.create": 3, "memory.see": 2}
    assert await owner.fetchval("SELECT sum(use_count) FROM memory_scores") == 2


async def test_batch_of_turns_lends_them_each_others_words(memories: Stub, caller: Caller) -> None:
    await create_all(
        memories,
        caller,
        pb.Memory(content="the heron", session_id="s", session_position=0),
        pb.Memory(content="who?", session_id="s", session_position=1),
    )
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="heron"), metadata=bearer(caller)
    )
    assert len(answer.matches) == 2


async def test_request_id_makes_one_batch_however_often_it_is_sent(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    answers = await asyncio.gather(
        *(create_all(memories, caller, "one", "two", request_id="r") for _ in range(10))
    )
    ids = {tuple(result.memory.id for result in results) for results in answers}
    assert len(ids) == 1
    assert sum(results[0].created for results in answers) == 1
    assert await owner.fetchval("SELECT count(*) FROM memories") == 2
    assert await owner.fetchval("SELECT sum(use_count) FROM memory_scores") == 0
    refusal = await refusal_of(create_all(memories, caller, "other", request_id="r"))
    assert refusal.reason == "REQUEST_ID_REUSED"


@pytest.mark.usefixtures("plans")
async def test_batch_that_does_not_fit_stores_nothing(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await owner.execute("UPDATE plans SET permanent_bytes = 10 WHERE name = 'free'")
    drafts = [pb.Memory(content=text, tier=pb.TIER_PERMANENT) for text in ("12345", "1234567")]
    refusal = await refusal_of(create_all(memories, caller, *drafts))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
    )
    assert await owner.fetchval("SELECT count(*) FROM memories") == 0


@pytest.mark.parametrize(
    ("drafts", "field"),
    [
        ([], "memories"),
        (["x"] * 1001, "memories"),
        (["fine", ""], "memories[1].content"),
        ([pb.Memory(content="x", tier=pb.TIER_SHORT_TERM)], "memories[0].tier"),
    ],
)
async def test_batch_that_cannot_be_kept_is_refused_by_field(
    memories: Stub, caller: Caller, drafts: list[pb.Memory | str], field: str
) -> None:
    refusal = await refusal_of(create_all(memories, caller, *drafts))
    assert refusal.fields == (field,)


async def test_batch_without_consent_is_refused(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await owner.execute("UPDATE consents SET granted = false")
    refusal = await refusal_of(create_all(memories, caller, "x"))
    assert refusal.reason == "CONSENT_MISSING"
