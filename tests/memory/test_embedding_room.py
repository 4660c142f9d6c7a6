"""How many vectors a user keeps: a job that meets the bound ends well, and looks again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import numpy as np
import pytest
from kimberly.embedding.v1 import embedding_pb2_grpc as rpc

from server.billing.store import BillingStore
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.jobs.queue import Queue
from server.memory.embedding_store import EmbeddingStore
from server.memory.embeddings import Upload, read_embedding
from server.memory.model import Change
from server.memory.store import MemoryStore
from tests.conftest import FakeClock, data_keys_of
from tests.memory.embedding_calls import MODEL, lease, settle, states, streaming, vectors, work
from tests.remembering import remember

pytestmark = pytest.mark.usefixtures("plans")

TEXTS = ("one", "two", "three", "four", "five")


async def allow(owner: asyncpg.Connection, kept: int) -> None:
    """Let who pays nothing keep so many vectors."""
    await owner.execute("UPDATE plans SET vectors = $1 WHERE name = 'free'", kept)


async def memory_of(owner: asyncpg.Connection, text: str) -> UUID:
    found: UUID = await owner.fetchval("SELECT id FROM memories WHERE content = $1", text)
    return found


async def upload(database: Database, caller: Caller, memory_id: UUID, model: str) -> None:
    embedding = read_embedding(model, [1.0, 0.0, 0.0], "vectors")
    await EmbeddingStore(database).keep(caller, [Upload(memory_id, embedding, None)])


async def test_job_keeps_what_there_is_room_for_and_says_how_many_texts_it_left(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await allow(owner, 3)
    await remember(database, chooser, *TEXTS)
    batches, done = await work(embedding, queue)
    assert batches == [["one", "two"], ["three"]]
    tomorrow = await owner.fetchval("SELECT run_at FROM jobs WHERE state = 'waiting'")
    assert timedelta(hours=23) < tomorrow - datetime.now(UTC) <= timedelta(days=1)
    assert done.kept == 3
    assert done.stopped == (
        f"the plan keeps no more vectors: it goes on {tomorrow:%Y-%m-%d}, or as soon as there is a "
        "larger plan; texts without a vector until then: 2"
    )
    attempts = await owner.fetch("SELECT state, attempt, error FROM jobs ORDER BY id")
    assert [tuple(job) for job in attempts] == [("succeeded", 1, ""), ("waiting", 0, "")]


async def test_what_is_written_meanwhile_makes_no_further_jobs_and_room_is_used_the_next_day(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await allow(owner, 3)
    await remember(database, chooser, *TEXTS)
    await work(embedding, queue)
    await remember(database, chooser, "six")
    assert await states(owner) == ["succeeded", "waiting"]
    store = MemoryStore(database, data_keys_of(database))
    for text in ("one", "five"):
        await store.delete(chooser, await memory_of(owner, text))
    await owner.execute("UPDATE jobs SET run_at = now() WHERE state = 'waiting'")
    await queue.admit()
    batches, done = await work(embedding, queue)
    assert batches == [["four"]]
    assert done.stopped.endswith("until then: 1")
    assert sorted(await vectors(owner)) == ["four", "three", "two"]


async def test_larger_plan_makes_room_at_once(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    await allow(owner, 3)
    await remember(database, chooser, *TEXTS)
    await work(embedding, queue)
    await BillingStore(system_database).settle(chooser, "premium")
    batches, done = await work(embedding, queue)
    assert (batches, done.stopped) == ([["four", "five"]], "")


async def test_room_that_just_suffices_ends_the_job_without_a_word(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await allow(owner, 3)
    await remember(database, chooser, *TEXTS[:3])
    _, done = await work(embedding, queue)
    assert (done.kept, done.stopped) == (3, "")
    assert await states(owner) == ["succeeded"]


async def test_new_text_of_an_old_memory_needs_no_room(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await allow(owner, 2)
    await remember(database, chooser, "one", "two")
    await work(embedding, queue)
    await remember(database, chooser, "three")
    await MemoryStore(database, data_keys_of(database)).update(
        chooser, await memory_of(owner, "two"), Change(content="second"), FakeClock()()
    )
    batches, done = await work(embedding, queue)
    assert batches == [["second"]]
    assert done.stopped.endswith("until then: 1")
    assert sorted(await vectors(owner)) == ["one", "second"]


async def test_what_the_model_knows_nothing_of_is_not_left_over(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await allow(owner, 1)
    await remember(database, chooser, "???", "one")
    held = (await lease(queue)).held
    async with streaming(embedding) as stream:
        await stream.open(held, size=1)
        await stream.answer(await stream.batch(), np.zeros((1, 3), "<f4").tobytes())
        _, done = await stream.to_the_end()
    await settle(queue, held)
    assert (done.kept, done.stopped) == (1, "")
    assert await states(owner) == ["succeeded"]


async def test_room_that_uploads_take_meanwhile_fails_no_job(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await allow(owner, 3)
    await remember(database, chooser, "one", "two", "three")
    held = (await lease(queue)).held
    async with streaming(embedding) as stream:
        await stream.open(held, size=3)
        batch = await stream.batch()
        for text in ("one", "two"):
            await upload(database, chooser, await memory_of(owner, text), "theirs")
        await stream.answer(batch)
        batches, done = await stream.to_the_end()
    await settle(queue, held)
    assert batches == [["one"]]
    assert done.kept == 1
    assert done.stopped.endswith("until then: 2")
    rows = await owner.fetch("SELECT model, count(*) FROM embeddings GROUP BY model")
    assert dict(rows) == {MODEL: 1, "theirs": 2}
