"""What the streams of embedding jobs hand out and keep, and who may open one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import numpy as np
import pytest
from kimberly.embedding.v1 import embedding_pb2 as pb
from kimberly.embedding.v1 import embedding_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.jobs.model import Held
from server.jobs.queue import Queue
from server.memory import embedding_jobs
from server.memory.model import Change
from server.memory.store import MemoryStore
from tests.conftest import FakeClock, bearer, data_keys_of, new_caller
from tests.deciding import decide
from tests.memory.embedding_calls import (
    MODEL,
    WORKER,
    choose,
    consent,
    lease,
    settle,
    streaming,
    vectors,
)
from tests.refusals import refusal_of
from tests.remembering import draft, remember

# --- what a stream hands out and keeps


async def test_a_stream_goes_through_what_lacks_a_vector_in_batches(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one", "two", "three")
    await remember(database, await new_caller(database), "another user's")
    held = (await lease(queue)).held
    async with streaming(embedding) as stream:
        await stream.open(held)
        first = await stream.batch()
        assert (first.sequence, first.model, list(first.texts)) == (1, MODEL, ["one", "two"])
        assert await vectors(owner) == {}
        await stream.answer(first)
        second = await stream.batch()
        assert await vectors(owner) == dict.fromkeys(["one", "two"], MODEL)
        assert (second.sequence, list(second.texts)) == (2, ["three"])
        await stream.answer(second)
        assert await stream.done() == 3
    assert await vectors(owner) == dict.fromkeys(["one", "two", "three"], MODEL)
    audited = await owner.fetch("SELECT resource FROM audit_events WHERE action = 'memory.embed'")
    assert len({event["resource"] for event in audited}) == len(audited) == 3
    await settle(queue, held)
    await remember(database, chooser, "four")
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held)
        assert await stream.embed_all() == [["four"]]


async def test_job_of_the_former_name_is_done_as_well(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    await owner.execute("UPDATE jobs SET kind = 'memories.embed'")
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue, "memories.embed")).held)
        assert await stream.embed_all() == [["one"]]


async def test_what_is_sensitive_or_archived_or_short_lived_leaves_no_store(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "plain", "secret", "past")
    await owner.execute(
        "UPDATE memories SET sensitive = true, sealed = 'x', content = '' WHERE content = 'secret'"
    )
    await owner.execute(
        """
        UPDATE memories SET archived_at = now(), archived_by = 'user', delete_after = now()
         WHERE content = 'past'
        """
    )
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held, size=256)
        assert await stream.embed_all() == [["plain"]]


async def test_long_texts_come_in_small_batches(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding_jobs, "_TEXT_BYTES", 10)
    await remember(database, chooser, "a" * 9, "b", "c", "d" * 100, "ä" * 5, "f")
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held, size=256)
        batches = await stream.embed_all()
    assert [[text[0] for text in batch] for batch in batches] == [
        ["a", "b"],
        ["c", "d"],
        ["ä"],
        ["f"],
    ]


async def test_a_text_that_the_model_knows_nothing_of_is_asked_once_a_job(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    store, now = MemoryStore(database, data_keys_of(database)), FakeClock()()
    memory, _ = await store.create(chooser, draft("word"), "", now)
    await remember(database, chooser, "???")
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held)
        batch = await stream.batch()
        await store.update(chooser, memory.id, Change(content="verb"), now)
        await stream.answer(batch, np.array([[0, 0, 2], [0, 0, 0]], "<f4").tobytes())
        assert await stream.embed_all() == [["verb"]]
    assert await vectors(owner) == {"verb": MODEL}


async def test_a_text_that_changes_meanwhile_is_embedded_as_it_is_then(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    store, now = MemoryStore(database, data_keys_of(database)), FakeClock()()
    memory, _ = await store.create(chooser, draft("before"), "", now)
    gone, _ = await store.create(chooser, draft("gone"), "", now)
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held)
        batch = await stream.batch()
        await store.update(chooser, memory.id, Change(content="after"), now)
        await store.delete(chooser, gone.id)
        await stream.answer(batch)
        assert await stream.embed_all() == [["after"]]
    assert await vectors(owner) == {"after": MODEL}


async def test_another_model_takes_over_in_the_middle_of_a_job(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one", "two", "three")
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held, MODEL, "other")
        await stream.answer(await stream.batch())
        batch = await stream.batch()
        await choose(database, chooser, "other")
        await stream.answer(batch)
        assert await stream.embed_all() == [["one", "two"], ["three"]]
    rows = await owner.fetch("SELECT model, count(*) AS n FROM embeddings GROUP BY model")
    assert {row["model"]: row["n"] for row in rows} == {MODEL: 2, "other": 3}


async def withdraw_embed(
    database: Database, system_database: SystemDatabase, caller: Caller
) -> None:
    await consent(system_database, caller, granted=False)


async def withdraw_store(
    database: Database, system_database: SystemDatabase, caller: Caller
) -> None:
    await decide(system_database, caller, "memory.store", granted=False)


async def choose_none(database: Database, system_database: SystemDatabase, caller: Caller) -> None:
    await choose(database, caller, "")


@pytest.mark.parametrize("withdraw", [withdraw_embed, withdraw_store, choose_none])
async def test_withdrawal_in_flight_keeps_nothing_more_and_shows_no_more_texts(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
    withdraw: Any,
) -> None:
    await remember(database, chooser, "one", "two", "three")
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held, size=1)
        await stream.answer(await stream.batch())
        batch = await stream.batch()
        await withdraw(database, system_database, chooser)
        await stream.answer(batch)
        assert await stream.done() == 1
    assert await vectors(owner) == {"one": MODEL}


# --- who may not


async def test_vectors_under_a_lease_that_passed_on_are_not_kept(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    first = (await lease(queue)).held
    async with streaming(embedding) as zombie, streaming(embedding) as heir:
        await zombie.open(first)
        batch = await zombie.batch()
        await queue.release(WORKER, [first])
        second = (await lease(queue)).held
        await heir.open(second)
        heirs = await heir.batch()
        await zombie.answer(batch)
        assert (await zombie.refused()).reason == "LEASE_LOST"
        assert await vectors(owner) == {}
        await heir.answer(heirs)
        assert await heir.done() == 1


async def test_the_last_look_under_a_lease_that_passed_on_hands_no_key_back(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "???")
    held = (await lease(queue)).held
    async with streaming(embedding) as stream:
        await stream.open(held)
        batch = await stream.batch()
        await queue.release(WORKER, [held])
        await stream.answer(batch, np.zeros((1, 2), "<f4").tobytes())
        assert (await stream.refused()).reason == "LEASE_LOST"
    assert await owner.fetchval("SELECT unique_key IS NOT NULL FROM jobs")


async def test_a_stream_opens_only_for_the_holder_of_a_lease_of_such_a_job(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "private")
    waiting = await owner.fetchval("SELECT id FROM jobs")
    await owner.execute("UPDATE jobs SET lease_token = 7")
    for held, reason in [
        (Held(waiting, 7), "LEASE_LOST"),
        (Held(ids.new_id(), 7), "RESOURCE_NOT_FOUND"),
    ]:
        async with streaming(embedding) as stream:
            await stream.open(held)
            assert (await stream.refused()).reason == reason
    running = (await lease(queue)).held
    for held, reason in [
        (Held(running.job_id, running.token - 1), "LEASE_LOST"),
        (Held(running.job_id, running.token + 1), "LEASE_LOST"),
    ]:
        async with streaming(embedding) as stream:
            await stream.open(held)
            assert (await stream.refused()).reason == reason
    await owner.execute("UPDATE jobs SET kind = 'meditation.shard'")
    async with streaming(embedding) as stream:
        await stream.open(running)
        assert (await stream.refused()).reason == "RESOURCE_NOT_FOUND"


async def test_no_user_does_this_work(
    embedding: rpc.EmbeddingServiceAsyncStub, chooser: Caller
) -> None:
    async def nothing() -> AsyncIterator[pb.EmbedRequest]:
        yield pb.EmbedRequest(open=pb.Open(job_id=f"job_{'0' * 32}", lease_token=1, batch_size=1))

    call = embedding.Embed(nothing(), metadata=bearer(chooser))
    assert (await refusal_of(call.read())).code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_worker_without_the_model_is_told_which_it_has(
    embedding: rpc.EmbeddingServiceAsyncStub, queue: Queue, chooser: Caller, database: Database
) -> None:
    await remember(database, chooser, "one")
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held, "other", "another")
        refusal = await stream.refused()
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "STATE_CONFLICT",
    )
    assert "no model 'local', only another, other; choose one of these" in refusal.message


@pytest.mark.parametrize(
    ("values", "field"),
    [
        (np.ones((1, 3)), "vectors.values"),
        (np.ones((2, 0)), "vectors.values"),
        (np.ones((2, 1)), "vectors.values"),
        (np.ones((2, 4001)), "vectors.values"),
        (np.array([[1, 1], [np.nan, 1]]), "vectors.values"),
        (np.array([[1, 1], [np.inf, 1]]), "vectors.values"),
    ],
)
async def test_vectors_that_are_none_fail_the_job_and_nothing_of_the_batch_is_kept(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
    values: Any,
    field: str,
) -> None:
    await remember(database, chooser, "one", "two")
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held)
        await stream.answer(await stream.batch(), values.astype("<f4").tobytes())
        refusal = await stream.refused()
        assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))
    assert await vectors(owner) == {}


async def test_what_is_said_out_of_turn_is_refused(
    embedding: rpc.EmbeddingServiceAsyncStub, queue: Queue, chooser: Caller, database: Database
) -> None:
    await remember(database, chooser, "one")
    held = (await lease(queue)).held
    openings: Sequence[tuple[pb.EmbedRequest, str]] = [
        (pb.EmbedRequest(), "message"),
        (pb.EmbedRequest(vectors=pb.Vectors(sequence=1)), "message"),
        (opening(held.job_id, lease_token=0), "open.lease_token"),
        (opening(held.job_id, batch_size=0), "open.batch_size"),
        (opening(held.job_id, batch_size=257), "open.batch_size"),
        (pb.EmbedRequest(open=pb.Open(job_id="x", lease_token=1, batch_size=1)), "open.job_id"),
    ]
    for request, field in openings:
        async with streaming(embedding) as stream:
            await stream.call.write(request)
            assert (await stream.refused()).fields == (field,)
    async with streaming(embedding) as stream:
        await stream.open(held)
        batch = await stream.batch()
        batch.sequence = 2
        await stream.answer(batch)
        assert (await stream.refused()).fields == ("vectors.sequence",)


def opening(job_id: UUID, *, lease_token: int = 1, batch_size: int = 1) -> pb.EmbedRequest:
    return pb.EmbedRequest(
        open=pb.Open(
            job_id=ids.show(ids.JOB, job_id), lease_token=lease_token, batch_size=batch_size
        )
    )


async def test_a_name_under_which_other_vectors_were_uploaded_fails_the_job(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    await owner.execute(
        "INSERT INTO embedding_models VALUES ($1, $2, $3, 2)",
        chooser.tenant_id,
        chooser.user_id,
        MODEL,
    )
    async with streaming(embedding) as stream:
        await stream.open((await lease(queue)).held)
        await stream.answer(await stream.batch())
        assert (await stream.refused()).reason == "FIELD_INVALID"
