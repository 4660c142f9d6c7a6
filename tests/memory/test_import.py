"""Bulk import: every memory once, each with its outcome, and resumable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import grpc
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from server.database import Database
from server.memory import importing
from server.memory.import_store import not_fitting
from server.memory.model import Draft, Source, Tier
from tests.conftest import bearer, new_caller
from tests.deciding import withdraw
from tests.memory.calls import Stub, archive, create
from tests.memory.streams import TURNS, imported, in_chunks, stored
from tests.refusals import refusal_of

ID = "import-1"

CREATED, EXISTING, REFUSED, SKIPPED = (
    pb.IMPORT_RESULT_CREATED,
    pb.IMPORT_RESULT_EXISTING,
    pb.IMPORT_RESULT_REFUSED,
    pb.IMPORT_RESULT_SKIPPED,
)


async def progress(stub: Stub, caller: Caller, request_id: str = ID) -> tuple[int, ...]:
    """Return next index, created, existing and refused."""
    answer = await stub.GetImport(
        pb.GetImportRequest(request_id=request_id), metadata=bearer(caller)
    )
    told = answer.progress
    assert told.request_id == request_id
    return told.next_index, told.created, told.existing, told.refused


async def texts(owner: asyncpg.Connection, caller: Caller) -> list[str]:
    rows = await owner.fetch("SELECT content FROM memories WHERE user_id = $1", caller.user_id)
    return sorted(row["content"] for row in rows)


# --- what is stored ----------------------------------------------------------------------------


async def test_import_keeps_every_turn_once_however_often_it_is_sent(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    first = await imported(memories, caller, TURNS)
    again = await imported(memories, caller, TURNS, 70)
    assert (first.created, first.existing, first.refused, first.skipped) == (250, 0, 0, 0)
    assert (again.created, again.existing, again.refused, again.skipped) == (0, 250, 0, 0)
    assert first.next_index == again.next_index == 250
    assert await owner.fetchval("SELECT count(*) FROM memories") == 250
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 250
    page = await memories.ListMemories(
        pb.ListMemoriesRequest(page_size=3, session_id="talk"), metadata=bearer(caller)
    )
    assert [memory.session_position for memory in page.memories] == [249, 248, 247]
    assert page.memories[0].source == pb.SOURCE_IMPORT


async def test_every_item_has_its_outcome_and_the_refused_ones_a_reason(
    memories: Stub, caller: Caller
) -> None:
    mixed = [
        pb.Memory(content="good", tags=["a", "b"]),
        pb.Memory(content=""),
        pb.Memory(content="fleeting", tier=pb.TIER_SHORT_TERM),
        pb.Memory(content="good", tags=["a", "b"]),
    ]
    outcome = await imported(memories, caller, mixed, 2)
    assert list(outcome.results) == [CREATED, REFUSED, REFUSED, EXISTING]
    assert (outcome.created, outcome.existing, outcome.refused) == (1, 1, 2)
    assert [(each.index, each.field, each.reason) for each in outcome.refusals] == [
        (1, "memories[1].content", "FIELD_INVALID"),
        (2, "memories[0].tier", "FIELD_INVALID"),
    ]
    assert not outcome.memory_ids
    page = await memories.ListMemories(pb.ListMemoriesRequest(), metadata=bearer(caller))
    assert [list(memory.tags) for memory in page.memories] == [["a", "b"]]


async def test_labels_are_kept_as_they_are_written(memories: Stub, caller: Caller) -> None:
    odd = [" ", ",", '"', "\\", "{a}", "NULL", "a\x1fb", "it's", "é"]
    both = [pb.Memory(content="odd", tags=odd, channels=odd), pb.Memory(content="plain")]
    assert (await imported(memories, caller, both)).created == 2
    page = await memories.ListMemories(pb.ListMemoriesRequest(), metadata=bearer(caller))
    labels = {one.content: (list(one.tags), list(one.channels)) for one in page.memories}
    assert labels == {"odd": (sorted(odd), sorted(odd)), "plain": ([], [])}


async def test_ids_are_returned_to_who_asks_for_them(memories: Stub, caller: Caller) -> None:
    there = await create(memories, caller, "there")
    gone = await archive(memories, caller, await create(memories, caller, "put away"))

    async def chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
        kept = [pb.Memory(content=text) for text in ("new", "there", " ", "new", "put away")]
        yield pb.ImportMemoriesRequest(memories=kept, return_ids=True)

    outcome = await memories.ImportMemories(chunks(), metadata=bearer(caller))
    assert list(outcome.results) == [CREATED, EXISTING, REFUSED, EXISTING, CREATED]
    new, existing, refused, same, again = outcome.memory_ids
    assert (existing, refused, same) == (there.id, "", new)
    assert again != gone.id, "what is put away does not stand in the way of the same words"
    found = await memories.GetMemory(pb.GetMemoryRequest(id=new), metadata=bearer(caller))
    assert found.memory.content == "new"


async def test_lists_of_an_endless_import_stay_within_bounds(
    memories: Stub, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "RESULTS_SHOWN", 150)
    monkeypatch.setattr(importing, "REFUSALS_SHOWN", 5)
    outcome = await imported(memories, caller, [*TURNS, *[pb.Memory()] * 20])
    assert (len(outcome.results), len(outcome.refusals)) == (150, 5)
    assert (outcome.created, outcome.refused, outcome.next_index) == (250, 20, 270)


async def test_without_consent_nothing_is_imported(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    stranger = await new_caller(database, consenting=False)
    assert (await refusal_of(imported(memories, stranger, TURNS))).reason == "CONSENT_MISSING"

    async def chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
        yield pb.ImportMemoriesRequest(memories=TURNS[:1], request_id=ID)
        await stored(owner, 1)
        await withdraw(database, caller)
        yield pb.ImportMemoriesRequest(memories=TURNS[1:], first_index=1)

    refusal = await refusal_of(memories.ImportMemories(chunks(), metadata=bearer(caller)))
    assert refusal.reason == "CONSENT_MISSING"
    assert await texts(owner, caller) == ["turn 0"], "what was stored before stays"


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([pb.ImportMemoriesRequest(memories=[pb.Memory(content="x")] * 1001)], "memories"),
        ([pb.ImportMemoriesRequest(first_index=-1)], "first_index"),
        ([pb.ImportMemoriesRequest(first_index=1, request_id=ID)], "first_index"),
        ([pb.ImportMemoriesRequest(request_id="x" * 65)], "request_id"),
        (
            [pb.ImportMemoriesRequest(request_id=ID), pb.ImportMemoriesRequest(request_id="other")],
            "request_id",
        ),
        (
            [
                pb.ImportMemoriesRequest(request_id=ID, memories=TURNS[:2]),
                pb.ImportMemoriesRequest(first_index=3, memories=TURNS[3:4]),
            ],
            "first_index",
        ),
    ],
)
async def test_a_chunk_that_is_not_in_order_is_refused(
    memories: Stub, caller: Caller, requests: list[pb.ImportMemoriesRequest], field: str
) -> None:
    async def chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
        for request in requests:
            yield request

    refusal = await refusal_of(memories.ImportMemories(chunks(), metadata=bearer(caller)))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


# --- resuming ----------------------------------------------------------------------------------


async def test_an_import_goes_on_where_it_stopped(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    first = await imported(memories, caller, TURNS[:120], 50, request_id=ID)
    assert first.created == 120
    assert await progress(memories, caller) == (120, 120, 0, 0)
    # What was deleted meanwhile does not come back: those chunks are not looked at again.
    page = await memories.ListMemories(pb.ListMemoriesRequest(page_size=1), metadata=bearer(caller))
    doomed = pb.DeleteMemoryRequest(id=page.memories[0].id)
    await memories.DeleteMemory(doomed, metadata=bearer(caller))
    second = await imported(memories, caller, TURNS, 100, request_id=ID)
    assert (second.created, second.existing, second.skipped) == (130, 0, 120)
    assert list(second.results) == [SKIPPED] * 120 + [CREATED] * 130
    assert await progress(memories, caller) == (250, 250, 0, 0)
    assert len(await texts(owner, caller)) == 249


async def test_progress_counts_every_outcome_once(memories: Stub, caller: Caller) -> None:
    await create(memories, caller, "there")
    mixed = [pb.Memory(content=text) for text in ("one", "", "there", "two")]
    for _ in range(2):
        outcome = await imported(memories, caller, mixed, 3, request_id=ID)
    assert list(outcome.results) == [SKIPPED] * 4
    assert not outcome.refusals
    assert await progress(memories, caller) == (4, 2, 1, 1)


async def test_a_broken_stream_leaves_whole_chunks_and_says_how_many(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    async def chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
        async for chunk in in_chunks(TURNS[:200], 100, request_id=ID):
            yield chunk
        await asyncio.Event().wait()

    call = memories.ImportMemories(chunks(), metadata=bearer(caller), timeout=30)
    await stored(owner, 200)
    call.cancel()
    next_index, created, _, _ = await progress(memories, caller)
    assert (next_index, created) == (200, 200)
    rest = await memories.ImportMemories(
        in_chunks(TURNS, 10, start=next_index), metadata=bearer(caller)
    )
    assert (rest.created, rest.next_index) == (50, 250)


async def test_two_streams_of_one_import_share_it_and_store_nothing_twice(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    tiers = (pb.TIER_LONG_TERM, pb.TIER_PERMANENT)
    same = [pb.Memory(content=f"{n}", tier=tiers[n % 2]) for n in range(2_000)]
    first, second = await asyncio.gather(
        imported(memories, caller, same, 100, request_id=ID),
        imported(memories, caller, same, 70, request_id=ID),
    )
    assert first.created + second.created == 2_000
    assert first.skipped + second.skipped == 2_000
    assert await progress(memories, caller) == (2_000, 2_000, 0, 0)
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 2_000


async def test_streams_with_the_same_texts_in_other_orders_do_not_block_each_other(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    same = [pb.Memory(content=f"{n}") for n in range(3_000)]
    outcomes = await asyncio.gather(
        *(imported(memories, caller, each, 500) for each in (same, same[::-1], same[::3]))
    )
    assert sum(outcome.created for outcome in outcomes) == 3_000
    assert await owner.fetchval("SELECT count(*) FROM memories") == 3_000


async def test_imports_of_others_are_not_seen(
    memories: Stub, caller: Caller, database: Database
) -> None:
    other = await new_caller(database)
    await imported(memories, other, TURNS[:3], request_id=ID)
    request = pb.GetImportRequest(request_id=ID)
    refusal = await refusal_of(memories.GetImport(request, metadata=bearer(caller)))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
    await imported(memories, caller, TURNS[:2], request_id=ID)
    assert await progress(memories, caller) == (2, 2, 0, 0)
    assert await progress(memories, other) == (3, 3, 0, 0)


# --- room --------------------------------------------------------------------------------------


async def confine(owner: asyncpg.Connection, caller: Caller, size: int) -> None:
    """Put a user on a plan of so many bytes for each tier."""
    await owner.execute(
        """
        INSERT INTO plans (name, short_term_bytes, long_term_bytes, permanent_bytes, vectors)
        VALUES ('tiny', $1, $1, $1, 0)
            ON CONFLICT (name) DO UPDATE SET long_term_bytes = $1, permanent_bytes = $1
        """,
        size,
    )
    await owner.execute(
        "INSERT INTO subscriptions (tenant_id, user_id, plan) VALUES ($1, $2, 'tiny')",
        caller.tenant_id,
        caller.user_id,
    )


def sized(size: int, letter: str, tier: pb.Tier.ValueType = pb.TIER_PERMANENT) -> pb.Memory:
    return pb.Memory(content=letter * size, tier=tier)


@pytest.mark.usefixtures("plans")
async def test_what_fits_is_stored_and_the_rest_refused_one_by_one(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await confine(owner, caller, 1000)
    await create(memories, caller, "t" * 300, tier=pb.TIER_PERMANENT)
    wanted = [
        sized(400, "a"),
        sized(400, "b"),  # 300 + 400 + 400 > 1000
        sized(300, "t"),  # is there
        sized(1200, "l", pb.TIER_LONG_TERM),  # may overrun by a fifth
        sized(1, "m", pb.TIER_LONG_TERM),
        sized(400, "a"),  # the first one's text
        sized(300, "c"),
        sized(1, "d"),
    ]
    outcome = await imported(memories, caller, wanted, request_id=ID)
    assert list(outcome.results) == [
        CREATED,
        REFUSED,
        EXISTING,
        CREATED,
        REFUSED,
        EXISTING,
        CREATED,
        REFUSED,
    ]
    assert [(each.index, each.field, each.reason) for each in outcome.refusals] == [
        (place, f"memories[{place}]", "QUOTA_EXCEEDED") for place in (1, 4, 7)
    ]
    assert "of 1000 bytes are used" in outcome.refusals[0].message
    assert await progress(memories, caller) == (8, 3, 2, 3)
    used = await owner.fetchrow("SELECT long_term_bytes, permanent_bytes FROM memory_usage")
    assert tuple(used) == (1200, 1000)


@pytest.mark.usefixtures("plans")
async def test_streams_at_once_fill_a_tier_to_the_brim_and_not_over(
    memories: Stub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await confine(owner, caller, 1000)
    outcomes = await asyncio.gather(
        *(
            imported(
                memories,
                caller,
                [sized(10, chr(97 + n)) for n in range(k, 26)] * 2
                + [pb.Memory(content=f"{k}{n:09}", tier=pb.TIER_PERMANENT) for n in range(60)],
                20,
            )
            for k in range(3)
        )
    )
    assert sum(outcome.created for outcome in outcomes) == 100
    assert await owner.fetchval("SELECT sum(size_bytes) FROM memories") == 1000


def draft(content: str) -> Draft:
    return Draft(Tier.LONG_TERM, content, (), Source.IMPORT, "", None, "", None)


@pytest.mark.parametrize(
    ("sizes", "room", "refused"),
    [
        ([], 10, []),
        ([4, 4, 4], 10, [2]),
        ([11, 4, 7, 6], 10, [0, 2]),
        ([1, 2], 0, [0, 1]),
        ([1], -5, [0]),
        ([5, 5, 5], 5, []),  # all of them the same text
    ],
)
def test_who_comes_first_is_let_in(sizes: list[int], room: int, refused: list[int]) -> None:
    same = len(set(sizes)) == 1
    drafts = {
        place: draft(("x" if same and room == sizes[0] else str(place)) * size)
        for place, size in enumerate(sizes)
    }
    assert not_fitting(drafts, room) == refused
