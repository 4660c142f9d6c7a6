"""Finding memories again: by page and by words."""

from __future__ import annotations

import pytest
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from tests.conftest import bearer, new_caller
from tests.memory.calls import create
from tests.refusals import refusal_of


@pytest.mark.parametrize("size", [1, 2, 7, 100])
async def test_pages_hold_every_memory_once_newest_first(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, size: int
) -> None:
    tiers = [pb.TIER_LONG_TERM, pb.TIER_SHORT_TERM, pb.TIER_PERMANENT]
    made = [await create(memories, caller, f"number {n}", tier=tiers[n % 3]) for n in range(9)]
    listed: list[str] = []
    token = ""
    while True:
        page = await memories.ListMemories(
            pb.ListMemoriesRequest(page_size=size, page_token=token), metadata=bearer(caller)
        )
        assert len(page.memories) <= size
        listed += [memory.id for memory in page.memories]
        token = page.next_page_token
        await create(memories, caller, f"written meanwhile {len(listed)}")
        if not token:
            break
    assert listed == [memory.id for memory in reversed(made)]


async def test_list_passes_only_what_the_filter_names(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for memory in (
        pb.Memory(content="a", tags=["x", "y"], session_id="s1", session_position=0),
        pb.Memory(content="b", tags=["x"], tier=pb.TIER_PERMANENT),
        pb.Memory(content="c", tags=["y"], tier=pb.TIER_SHORT_TERM, session_id="s1"),
    ):
        await memories.CreateMemory(pb.CreateMemoryRequest(memory=memory), metadata=bearer(caller))
    for request, expected in [
        (pb.ListMemoriesRequest(), "cba"),
        (pb.ListMemoriesRequest(tier=pb.TIER_PERMANENT), "b"),
        (pb.ListMemoriesRequest(tier=pb.TIER_SHORT_TERM), "c"),
        (pb.ListMemoriesRequest(tags=["x"]), "ba"),
        (pb.ListMemoriesRequest(tags=["y", "x"]), "a"),
        (pb.ListMemoriesRequest(session_id="s1"), "ca"),
    ]:
        page = await memories.ListMemories(request, metadata=bearer(caller))
        assert "".join(memory.content for memory in page.memories) == expected


async def test_query_finds_the_memory_that_answers(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for content, tier in [
        ("Caroline went to a support group on Tuesday", pb.TIER_LONG_TERM),
        ("Melanie painted a sunrise over the lake", pb.TIER_PERMANENT),
        ("The group of hikers left at noon", pb.TIER_LONG_TERM),
        ("Dinner with Melanie at seven", pb.TIER_SHORT_TERM),
    ]:
        await create(memories, caller, content, tier=tier)
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="Which support groups did Caroline visit?"),
        metadata=bearer(caller),
    )
    best = answer.matches[0]
    assert best.memory.content.startswith("Caroline")
    assert best.lexical == 1.0
    assert best.reason == "shares support, groups, caroline"
    dinner = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="dinner"), metadata=bearer(caller)
    )
    assert [match.memory.tier for match in dinner.matches] == [pb.TIER_SHORT_TERM]


@pytest.mark.parametrize(
    "query",
    [
        "",
        "the of and",
        "'; DROP TABLE memories; --",
        "!! <-> :* & | ( )",
        "%_\\",
        "🍵 " * 100,
        "word " * 10_000,
        "\u202e\u0000\ud7ff",
    ],
)
async def test_any_text_is_a_legal_query(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, query: str
) -> None:
    await create(memories, caller, "something")
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query=query), metadata=bearer(caller)
    )
    assert not answer.matches


@pytest.mark.parametrize("word", ["Straßenbahnhaltestelle", "предпринимательница"])
async def test_ten_thousand_long_words_are_a_legal_query(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, word: str
) -> None:
    # No two alike: nothing of it can be counted together.
    query = " ".join(f"{word[: 8 + n % 5]}{n}" for n in range(10_000))
    kept = await create(memories, caller, f"{word[:8]}0")
    answer = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query=query), metadata=bearer(caller), timeout=5
    )
    assert [match.memory.id for match in answer.matches] == [kept.id]


async def test_query_honours_filters_and_size(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for n in range(5):
        await memories.CreateMemory(
            pb.CreateMemoryRequest(
                memory=pb.Memory(content=f"apple {n}", tags=["even" if n % 2 == 0 else "odd"])
            ),
            metadata=bearer(caller),
        )
    three = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="apple", top_k=3), metadata=bearer(caller)
    )
    odd = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="apple", tags=["odd"]), metadata=bearer(caller)
    )
    none = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="apple", tiers=[pb.TIER_SHORT_TERM]),
        metadata=bearer(caller),
    )
    assert len(three.matches) == 3
    assert len(odd.matches) == 2
    assert not none.matches


async def test_another_users_memories_look_like_missing_ones(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    neighbour = await new_caller(database)
    sibling = Caller(tenant_id=caller.tenant_id, user_id=neighbour.user_id)
    for tier in (pb.TIER_LONG_TERM, pb.TIER_SHORT_TERM):
        mine = await create(memories, caller, "private", tier=tier)
        missing = pb.GetMemoryRequest(id="mem_" + "1" * 32)
        for stranger in (neighbour, sibling):
            metadata = bearer(stranger)
            foreign = await refusal_of(
                memories.GetMemory(pb.GetMemoryRequest(id=mine.id), metadata=metadata)
            )
            assert foreign == await refusal_of(memories.GetMemory(missing, metadata=metadata))
    listed = await memories.ListMemories(pb.ListMemoriesRequest(), metadata=bearer(neighbour))
    found = await memories.QueryMemories(
        pb.QueryMemoriesRequest(query="private"), metadata=bearer(neighbour)
    )
    assert not listed.memories
    assert not found.matches
