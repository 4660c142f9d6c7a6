"""Vectors are kept for memories that are there, of texts that are there, while the user agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import asyncpg
import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database
from tests.conftest import bearer, new_caller
from tests.deciding import write_decision
from tests.memory.calls import create
from tests.memory.meanings import MODEL, ask, of, texts, upload
from tests.refusals import refusal_of

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)


@pytest_asyncio.fixture
async def caller(database: Database) -> Caller:
    """A user who consented to memory.store and memory.embed."""
    caller = await new_caller(database)
    await write_decision(database, caller, "memory.embed", granted=True)
    return caller


async def kept(owner: asyncpg.Connection) -> dict[str, int]:
    rows = await owner.fetch("SELECT model, count(*) AS n FROM embeddings GROUP BY model")
    return {row["model"]: row["n"] for row in rows}


async def test_memory_is_found_by_its_meaning_without_a_word_in_common(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for text, values in (("harbour", EAST), ("mountain", NORTH), ("desert", WEST)):
        memory = await create(memories, caller, text)
        outcome = await upload(memories, caller, of(memory, values))
        assert (outcome.stored, len(outcome.refusals)) == (1, 0)
    answer = await ask(memories, caller, "quay", (0.6, 0.3))
    assert texts(answer) == ["harbour", "mountain", "desert"]
    best = answer.matches[0]
    assert (best.lexical, best.semantic, best.reason) == (0.0, 1.0, "is close in meaning")
    assert answer.matches[1].semantic == pytest.approx(0.5, abs=1e-3)
    assert answer.matches[2].semantic == 0.0
    assert not answer.semantic_late


async def test_vectors_are_normalised_by_the_server(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "long")
    await upload(memories, caller, of(memory, (3e37, 4e37)))
    assert await owner.fetchval("SELECT vector::text FROM embeddings") == "[0.60009766,0.7998047]"
    await upload(memories, caller, of(memory, (3e-40, 4e-40)))
    assert await owner.fetchval("SELECT l2_norm(vector) FROM embeddings") == pytest.approx(
        1, abs=1e-3
    )


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ((), "values"),
        ((1.0,), "values"),
        ((1.0,) * 4001, "values"),
        ((0.0, 0.0), "values"),
        ((math.nan, 1.0), "values"),
        ((math.inf, 1.0), "values"),
        ((1.0, -math.inf), "values"),
        ((1.0, 1.0, 1.0), "values"),
    ],
)
async def test_vector_that_cannot_be_compared_is_refused_by_field(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, values: Sequence[float], field: str
) -> None:
    first, second = [await create(memories, caller, text) for text in ("one", "two")]
    refusal = await refusal_of(upload(memories, caller, of(first, EAST), of(second, values)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == (f"embeddings[1].{field}",)
    await upload(memories, caller, of(first, EAST))
    alone = await refusal_of(upload(memories, caller, of(second, values)))
    assert alone.fields == (f"embeddings[0].{field}",)
    if values:
        question = await refusal_of(ask(memories, caller, "x", values))
        assert question.fields == ("embedding.values",)


@pytest.mark.parametrize("dimension", [2, 384, 4000])
async def test_every_dimension_from_2_to_4000_is_kept(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, dimension: int
) -> None:
    memory = await create(memories, caller, "wide")
    values = [1.0] * dimension
    await upload(memories, caller, of(memory, values, "m" * 64))
    assert texts(await ask(memories, caller, "", values, model="m" * 64)) == ["wide"]


async def test_upload_that_contradicts_itself_or_is_too_large_is_refused_by_field(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    memory = await create(memories, caller, "one")
    for batch, field in [
        ([], "embeddings"),
        ([of(memory, EAST)] * 1001, "embeddings"),
        ([of(memory, EAST), of(memory, WEST)], "embeddings[1].memory_id"),
        ([pb.Embedding(memory_id="x", model=MODEL, values=EAST)], "embeddings[0].memory_id"),
        ([of(memory, EAST, "")], "embeddings[0].model"),
        ([of(memory, EAST, "m" * 65)], "embeddings[0].model"),
        ([of(memory, EAST, "a\0")], "embeddings[0].model"),
        (
            [pb.Embedding(memory_id=memory.id, model=MODEL, values=EAST, content_hash="zz")],
            "embeddings[0].content_hash",
        ),
    ]:
        refusal = await refusal_of(upload(memories, caller, *batch))
        assert refusal.fields == (field,)


async def test_vectors_of_missing_and_foreign_memories_are_refused_one_by_one(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    stranger = await new_caller(database)
    mine = await create(memories, caller, "mine")
    foreign = await create(memories, stranger, "theirs")
    fleeting = await create(memories, caller, "soon gone", tier=pb.TIER_SHORT_TERM)
    missing = pb.Memory(id="mem_" + "0" * 32)
    outcome = await upload(
        memories, caller, *(of(memory, EAST) for memory in (foreign, mine, missing, fleeting))
    )
    assert outcome.stored == 1
    assert [(refusal.index, refusal.field) for refusal in outcome.refusals] == [
        (place, f"embeddings[{place}].memory_id") for place in (0, 2, 3)
    ]
    assert len({refusal.message for refusal in outcome.refusals}) == 1
    assert await kept(owner) == {MODEL: 1}


async def test_model_of_which_nothing_was_kept_stays_unknown(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    await upload(memories, caller, of(pb.Memory(id="mem_" + "0" * 32), (1.0, 1.0, 1.0)))
    outcome = await upload(memories, caller, of(await create(memories, caller, "x"), EAST))
    assert outcome.stored == 1


async def test_models_stand_side_by_side(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    east, north = [await create(memories, caller, text) for text in ("east", "north")]
    await upload(memories, caller, of(east, EAST), of(north, NORTH))
    await upload(memories, caller, of(east, (0, 0, 1), "new"), of(north, (1, 0, 0), "new"))
    assert await kept(owner) == {MODEL: 2, "new": 2}
    assert texts(await ask(memories, caller, "", EAST)) == ["east", "north"]
    assert texts(await ask(memories, caller, "", (1, 0, 0), model="new")) == ["north", "east"]
    assert texts(await ask(memories, caller, "", EAST, model="unheard of")) == []


async def test_vector_replaces_the_one_of_the_same_memory_and_model(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    one, two = [await create(memories, caller, text) for text in ("one", "two")]
    await upload(memories, caller, of(one, EAST), of(two, NORTH))
    await upload(memories, caller, of(one, NORTH), of(two, EAST))
    assert await kept(owner) == {MODEL: 2}
    assert texts(await ask(memories, caller, "", EAST)) == ["two", "one"]


async def test_new_text_drops_the_vectors_of_the_old_one(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "before")
    await upload(memories, caller, of(memory, EAST), of(memory, EAST, "other"))
    memory.tags.append("tag")
    for path, vectors in (("tags", {MODEL: 1, "other": 1}), ("content", {})):
        memory.content = "after"
        await memories.UpdateMemory(
            pb.UpdateMemoryRequest(
                memory=pb.Memory(id=memory.id, content="after", tags=["tag"]),
                update_mask=FieldMask(paths=[path]),
            ),
            metadata=bearer(caller),
        )
        assert await kept(owner) == vectors
    assert texts(await ask(memories, caller, "", EAST)) == []


async def test_vector_of_a_text_that_changed_meanwhile_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    memory = await create(memories, caller, "before")
    item = of(memory, EAST)
    item.content_hash = memory.content_hash
    assert (await upload(memories, caller, item)).stored == 1
    await memories.UpdateMemory(
        pb.UpdateMemoryRequest(
            memory=pb.Memory(id=memory.id, content="after"),
            update_mask=FieldMask(paths=["content"]),
        ),
        metadata=bearer(caller),
    )
    outcome = await upload(memories, caller, item)
    assert outcome.stored == 0
    assert [refusal.field for refusal in outcome.refusals] == ["embeddings[0].content_hash"]


async def test_vector_that_outlived_its_text_is_never_used(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    await upload(memories, caller, of(await create(memories, caller, "text"), EAST))
    assert texts(await ask(memories, caller, "", EAST)) == ["text"]
    # As if an upload had read the old text just before the change and committed just after it.
    await owner.execute("UPDATE embeddings SET content_hash = sha256('another text')")
    await owner.execute("UPDATE memory_usage SET data_version = data_version + 1")
    assert texts(await ask(memories, caller, "", EAST)) == []


async def test_deleted_memory_takes_its_vectors_along(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "gone")
    await upload(memories, caller, of(memory, EAST))
    await memories.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id), metadata=bearer(caller))
    assert await kept(owner) == {}


@pytest.mark.parametrize("purpose", ["memory.store", "memory.embed"])
async def test_withdrawn_consent_stops_uploads_and_vectors_at_once(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database, purpose: str
) -> None:
    memory = await create(memories, caller, "private")
    await upload(memories, caller, of(memory, EAST))
    await write_decision(database, caller, purpose, granted=False)
    for call in (upload(memories, caller, of(memory, EAST)), ask(memories, caller, "", EAST)):
        refusal = await refusal_of(call)
        assert refusal.reason == "CONSENT_MISSING"
        assert purpose in refusal.message
    await write_decision(database, caller, purpose, granted=True)
    assert texts(await ask(memories, caller, "", EAST)) == ["private"]


async def test_without_consent_to_vectors_words_still_find(
    memories: rpc.MemoryServiceAsyncStub, database: Database
) -> None:
    caller = await new_caller(database)
    await create(memories, caller, "plain words")
    assert texts(await ask(memories, caller, "words")) == ["plain words"]


async def test_each_vector_is_audited_under_its_memory(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    made = [await create(memories, caller, text) for text in ("one", "two")]
    await upload(memories, caller, *(of(memory, EAST) for memory in made))
    events = await owner.fetch("SELECT resource FROM audit_events WHERE action = 'memory.embed'")
    assert {event["resource"] for event in events} == {memory.id for memory in made}


async def test_user_keeps_no_more_vectors_than_a_user_may(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    owner: asyncpg.Connection,
    plans: None,
) -> None:
    await owner.execute("UPDATE plans SET vectors = 2 WHERE name = 'free'")
    made = [await create(memories, caller, text) for text in ("one", "two", "three")]
    await upload(memories, caller, of(made[0], EAST), of(made[1], EAST))
    refusal = await refusal_of(upload(memories, caller, of(made[2], EAST)))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
    )
    assert await kept(owner) == {MODEL: 2}
    assert (await upload(memories, caller, of(made[0], WEST), of(made[1], WEST))).stored == 2


async def test_the_same_question_sees_what_came_and_went_since_it_was_asked(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    memory = await create(memories, caller, "harbour")
    assert texts(await ask(memories, caller, "", EAST)) == []
    await upload(memories, caller, of(memory, EAST))
    assert texts(await ask(memories, caller, "", EAST)) == ["harbour"]
    await drop(memories, caller, MODEL)
    assert texts(await ask(memories, caller, "", EAST)) == []


# --- dropping the vectors of a model


async def drop(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, model: str
) -> pb.DeleteEmbeddingsResponse:
    request = pb.DeleteEmbeddingsRequest(model=model)
    return await memories.DeleteEmbeddings(request, metadata=bearer(caller))


async def test_vectors_of_one_model_are_dropped_and_all_others_stay(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    other = await new_caller(database)
    await write_decision(database, other, "memory.embed", granted=True)
    theirs = await create(memories, other, "theirs")
    await upload(memories, other, of(theirs, EAST))
    for text in ("one", "two"):
        memory = await create(memories, caller, text)
        await upload(memories, caller, of(memory, EAST), of(memory, (1, 0, 0), "new"))
    assert (await drop(memories, caller, MODEL)).deleted == 2
    assert await kept(owner) == {MODEL: 1, "new": 2}
    assert texts(await ask(memories, caller, "", EAST)) == []
    assert texts(await ask(memories, other, "", EAST)) == ["theirs"]
    events = await owner.fetch(
        "SELECT user_id, resource FROM audit_events WHERE action = 'embeddings.delete'"
    )
    assert [tuple(event) for event in events] == [(caller.user_id, MODEL)]


async def test_dropping_may_be_repeated_and_frees_the_name_for_another_dimension(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, owner: asyncpg.Connection
) -> None:
    memory = await create(memories, caller, "one")
    await upload(memories, caller, of(memory, EAST))
    assert [(await drop(memories, caller, MODEL)).deleted for _ in range(2)] == [1, 0]
    assert (await upload(memories, caller, of(memory, (1, 0, 0)))).stored == 1
    assert await owner.fetchval("SELECT count(*) FROM jobs") == 0


async def test_vectors_are_dropped_whether_or_not_their_user_still_consents(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, database: Database
) -> None:
    await upload(memories, caller, of(await create(memories, caller, "one"), EAST))
    for purpose in ("memory.embed", "memory.store"):
        await write_decision(database, caller, purpose, granted=False)
    assert (await drop(memories, caller, MODEL)).deleted == 1


@pytest.mark.parametrize("model", ["", "m" * 65, "a\0"])
async def test_what_is_no_name_of_a_model_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, model: str
) -> None:
    assert (await refusal_of(drop(memories, caller, model))).fields == ("model",)


async def test_nobody_drops_vectors_without_a_token(
    memories: rpc.MemoryServiceAsyncStub,
) -> None:
    request = pb.DeleteEmbeddingsRequest(model=MODEL)
    refusal = await refusal_of(memories.DeleteEmbeddings(request))
    assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
