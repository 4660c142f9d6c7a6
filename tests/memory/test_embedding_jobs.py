"""Which jobs make vectors, what their streams hand out and keep, and that no text is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import numpy as np
import pytest
import pytest_asyncio
from kimberly.embedding.v1 import embedding_pb2 as pb
from kimberly.embedding.v1 import embedding_pb2_grpc as rpc

from local.postgres import OWNER, SUPERUSER
from local.servers import Stores
from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.embedding_requests import ask_for_embedding, wait_for_writes
from server.jobs.model import Completed, Held, Lease
from server.jobs.queue import Queue
from server.memory import embedding_jobs
from server.memory.embedding_jobs import EmbeddingJobs
from server.memory.embedding_service import EmbeddingService
from server.memory.embedding_store import EmbeddingStore
from server.memory.import_store import Chunk, ImportStore
from server.memory.model import Change, Draft, Source, Tier, hash_of
from server.memory.store import MemoryStore
from server.migrate import migrate, read_migrations
from server.users.store import SettingsChange, UserStore
from tests.conftest import FakeClock, Serve, as_worker, bearer, data_keys_of, new_caller
from tests.deciding import decide
from tests.refusals import Refusal, refusal_of

MODEL = "local"
WORKER = "worker"


def draft(text: str) -> Draft:
    return Draft(Tier.LONG_TERM, text, (), Source.CHAT, "", None, "", None)


async def remember(database: Database, caller: Caller, *texts: str) -> None:
    await ImportStore(database, data_keys_of(database)).store(
        caller, Chunk([draft(text) for text in texts]), FakeClock()()
    )


async def choose(database: Database, caller: Caller, model: str = MODEL) -> None:
    change = SettingsChange(
        language=None, scoring=None, retrieval={}, embedding_model=model, expected_version=None
    )
    await UserStore(database).update_settings(caller, change)


async def consent(system_database: SystemDatabase, caller: Caller, *, granted: bool = True) -> None:
    await decide(system_database, caller, "memory.embed", granted=granted)


@pytest_asyncio.fixture
async def chooser(database: Database, system_database: SystemDatabase) -> Caller:
    """A user who consented and chose a model."""
    caller = await new_caller(database)
    await consent(system_database, caller)
    await choose(database, caller)
    return caller


@pytest.fixture
def queue(system_database: SystemDatabase) -> Queue:
    return Queue(system_database, lease_seconds=30)


async def lease(queue: Queue, kind: str = "embedding.batch") -> Lease:
    (leased,) = await queue.lease(WORKER, [kind], 1)
    return leased


async def settle(queue: Queue, held: Held) -> None:
    assert await queue.settle(WORKER, [Completed(held, None)]) == {held}


async def states(owner: asyncpg.Connection) -> list[str]:
    rows = await owner.fetch("SELECT state FROM jobs WHERE kind = 'embedding.batch' ORDER BY id")
    return [row["state"] for row in rows]


async def vectors(owner: asyncpg.Connection) -> dict[str, str]:
    """Return the text of each vector, and its model."""
    rows = await owner.fetch(
        """
        SELECT content, model
          FROM embeddings AS embedding
          JOIN memories AS memory
            ON memory.id = memory_id AND memory.content_hash = embedding.content_hash
        """
    )
    return {row["content"]: row["model"] for row in rows}


class Stream:
    """A worker's end of a stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def open(self, held: Held, *models: str, size: int = 2) -> None:
        opening = pb.Open(
            job_id=ids.show(ids.JOB, held.job_id),
            lease_token=held.token,
            models=models or [MODEL],
            batch_size=size,
        )
        await self.call.write(pb.EmbedRequest(open=opening))

    async def batch(self) -> pb.Batch:
        response = await self.call.read()
        assert isinstance(response, pb.EmbedResponse), response
        assert response.WhichOneof("message") == "batch"
        return response.batch

    async def answer(self, batch: pb.Batch, values: bytes | None = None) -> None:
        if values is None:
            values = np.ones((len(batch.texts), 3), "<f4").tobytes()
        answer = pb.Vectors(sequence=batch.sequence, values=values)
        await self.call.write(pb.EmbedRequest(vectors=answer))

    async def done(self) -> int:
        response = await self.call.read()
        assert isinstance(response, pb.EmbedResponse), response
        assert response.WhichOneof("message") == "done"
        assert not isinstance(await self.call.read(), pb.EmbedResponse)
        return response.done.kept

    async def embed_all(self) -> list[list[str]]:
        """Answer every batch until nothing is missing, and return their texts."""
        texts: list[list[str]] = []
        while True:
            response = await self.call.read()
            assert isinstance(response, pb.EmbedResponse), response
            if response.WhichOneof("message") == "done":
                return texts
            texts.append(list(response.batch.texts))
            await self.answer(response.batch)

    async def refused(self) -> Refusal:
        """Return what the error says that ends the stream."""
        return await refusal_of(self.call.read())


@pytest_asyncio.fixture
async def stub(
    serve: Serve, database: Database, system_database: SystemDatabase
) -> rpc.EmbeddingServiceAsyncStub:
    service = EmbeddingService(EmbeddingJobs(database, system_database), EmbeddingStore(database))
    channel = await serve(
        lambda server: rpc.add_EmbeddingServiceServicer_to_server(service, server)
    )
    return rpc.EmbeddingServiceStub(channel)


@asynccontextmanager
async def streaming(stub: rpc.EmbeddingServiceAsyncStub) -> AsyncIterator[Stream]:
    call = stub.Embed(metadata=as_worker())  # type: ignore[call-arg] # written by hand
    try:
        yield Stream(call)
    finally:
        call.cancel()


# --- who gets a job


async def test_nobody_gets_a_job_who_did_not_choose_and_consent(
    database: Database, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    neither, consenting, choosing = [await new_caller(database) for _ in range(3)]
    await consent(system_database, consenting)
    await choose(database, choosing)
    for caller in (neither, consenting, choosing):
        await remember(database, caller, "one", "two")
    await choose(database, consenting, "")
    assert await states(owner) == []


@pytest.mark.parametrize("purpose", ["memory.embed", "memory.store"])
async def test_the_last_of_choice_and_consents_asks(
    database: Database, system_database: SystemDatabase, owner: asyncpg.Connection, purpose: str
) -> None:
    caller = await new_caller(database)
    await consent(system_database, caller)
    await decide(system_database, caller, purpose, granted=False)
    await choose(database, caller)
    assert await states(owner) == []
    await decide(system_database, caller, purpose, granted=True)
    assert await states(owner) == ["waiting"]
    row = await owner.fetchrow("SELECT tenant_id, user_id, payload, unique_key FROM jobs")
    assert (row["tenant_id"], row["user_id"]) == (caller.tenant_id, caller.user_id)
    assert (row["payload"], row["unique_key"]) == ("{}", f"memories.embed/{caller.user_id}")


async def test_every_write_of_texts_asks_and_one_job_waits_at_most(
    chooser: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    store, now = MemoryStore(database, data_keys_of(database)), FakeClock()()
    await owner.execute("DELETE FROM jobs")
    memory, _ = await store.create(chooser, draft("one"), "", now)
    assert await states(owner) == ["waiting"]
    await owner.execute("DELETE FROM jobs")
    await remember(database, chooser, "two", "three")
    assert await states(owner) == ["waiting"]
    await remember(database, chooser, "four")
    assert await states(owner) == ["waiting"]
    await owner.execute("DELETE FROM jobs")
    await store.update(chooser, memory.id, Change(content="1"), now)
    assert await states(owner) == ["waiting"]


async def test_the_doorbell_rings_for_workers_that_wait(
    database: Database, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    rung = asyncio.Event()
    await owner.add_listener("jobs", lambda *_: rung.set())
    caller = await new_caller(database)
    await choose(database, caller)
    assert not rung.is_set()
    await consent(system_database, caller)
    async with asyncio.timeout(30):
        await rung.wait()


# --- what a stream hands out and keeps


async def test_a_stream_goes_through_what_lacks_a_vector_in_batches(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one", "two", "three")
    await remember(database, await new_caller(database), "another user's")
    held = (await lease(queue)).held
    async with streaming(stub) as stream:
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
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held)
        assert await stream.embed_all() == [["four"]]


async def test_job_of_the_former_name_is_done_as_well(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    await owner.execute("UPDATE jobs SET kind = 'memories.embed'")
    async with streaming(stub) as stream:
        await stream.open((await lease(queue, "memories.embed")).held)
        assert await stream.embed_all() == [["one"]]


async def test_jobs_of_the_former_name_that_do_not_run_are_renamed(stores: Stores) -> None:
    await stores.postgres.provision("former")
    migrations = read_migrations()
    renaming = "_kinds_and_keys.sql"
    before = next(n for n, one in enumerate(migrations) if one.name.endswith(renaming))
    connection = await asyncpg.connect(stores.postgres.dsn(OWNER, "former"))
    superuser = await asyncpg.connect(stores.postgres.dsn(SUPERUSER, "former"))
    await migrate(connection, migrations[:before])
    await superuser.execute(
        """
        INSERT INTO jobs (id, kind, max_attempts, payload, unique_key, state, worker_id,
                          lease_expires_at, finished_at)
        VALUES (uuidv7(), 'memories.embed', 5, '{}', 'a', 'waiting', NULL, NULL, NULL),
               (uuidv7(), 'memories.embed', 5, '{}', 'b', 'running', 'w', now(), NULL),
               (uuidv7(), 'memories.embed', 5, '{}', 'c', 'dead', NULL, NULL, now()),
               (uuidv7(), 'memories.reindex', 5, '{}', 'd', 'waiting', NULL, NULL, NULL)
        """
    )
    await migrate(connection, migrations)
    await connection.close()
    rows = await superuser.fetch("SELECT unique_key, kind FROM jobs ORDER BY unique_key")
    await superuser.close()
    assert dict(rows) == {
        "a": "embedding.batch",
        "b": "memories.embed",
        "c": "embedding.batch",
        "d": "memories.reindex",
    }


async def test_what_is_sensitive_or_archived_or_short_lived_leaves_no_store(
    stub: rpc.EmbeddingServiceAsyncStub,
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
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held, size=256)
        assert await stream.embed_all() == [["plain"]]


async def test_long_texts_come_in_small_batches(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding_jobs, "_TEXT_BYTES", 10)
    await remember(database, chooser, "a" * 9, "b", "c", "d" * 100, "ä" * 5, "f")
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held, size=256)
        batches = await stream.embed_all()
    assert [[text[0] for text in batch] for batch in batches] == [
        ["a", "b"],
        ["c", "d"],
        ["ä"],
        ["f"],
    ]


async def test_a_text_that_the_model_knows_nothing_of_is_asked_once_a_job(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    store, now = MemoryStore(database, data_keys_of(database)), FakeClock()()
    memory, _ = await store.create(chooser, draft("word"), "", now)
    await remember(database, chooser, "???")
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held)
        batch = await stream.batch()
        await store.update(chooser, memory.id, Change(content="verb"), now)
        await stream.answer(batch, np.array([[0, 0, 2], [0, 0, 0]], "<f4").tobytes())
        assert await stream.embed_all() == [["verb"]]
    assert await vectors(owner) == {"verb": MODEL}


async def test_a_text_that_changes_meanwhile_is_embedded_as_it_is_then(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    store, now = MemoryStore(database, data_keys_of(database)), FakeClock()()
    memory, _ = await store.create(chooser, draft("before"), "", now)
    gone, _ = await store.create(chooser, draft("gone"), "", now)
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held)
        batch = await stream.batch()
        await store.update(chooser, memory.id, Change(content="after"), now)
        await store.delete(chooser, gone.id)
        await stream.answer(batch)
        assert await stream.embed_all() == [["after"]]
    assert await vectors(owner) == {"after": MODEL}


async def test_another_model_takes_over_in_the_middle_of_a_job(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one", "two", "three")
    async with streaming(stub) as stream:
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
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
    withdraw: Any,
) -> None:
    await remember(database, chooser, "one", "two", "three")
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held, size=1)
        await stream.answer(await stream.batch())
        batch = await stream.batch()
        await withdraw(database, system_database, chooser)
        await stream.answer(batch)
        assert await stream.done() == 1
    assert await vectors(owner) == {"one": MODEL}


# --- nothing is forgotten


async def test_what_is_written_while_a_job_runs_is_embedded_by_it(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    store, now = MemoryStore(database, data_keys_of(database)), FakeClock()()
    memory, _ = await store.create(chooser, draft("one"), "", now)
    await remember(database, chooser, "two")
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held, size=1)
        await stream.answer(await stream.batch())
        batch = await stream.batch()
        await remember(database, chooser, "three")
        await store.update(chooser, memory.id, Change(content="1"), now)
        assert await states(owner) == ["running"]
        await stream.answer(batch)
        # What lies before where the stream was is found by another look from the start.
        assert await stream.embed_all() == [["three"], ["1"]]
    assert await vectors(owner) == dict.fromkeys(["1", "two", "three"], MODEL)


async def test_what_is_not_committed_yet_keeps_a_job_from_its_end(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held)
        batch = await stream.batch()
        async with database.transaction(chooser) as connection:
            await insert(connection, chooser, "two")
            await ask_for_embedding(connection, chooser)
            # Nothing to keep, which would wait for the write as well: on to the last look.
            await stream.answer(batch, np.zeros((1, 3), "<f4").tobytes())
            await waiting_for_a_lock(owner)
        assert await stream.embed_all() == [["two"]]
    assert await states(owner) == ["running"]


async def test_what_is_written_after_the_last_look_asks_for_another_job(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    held = (await lease(queue)).held
    async with streaming(stub) as stream:
        await stream.open(held)
        assert await stream.embed_all() == [["one"]]
    # The worker has not settled it yet.
    assert await states(owner) == ["running"]
    await remember(database, chooser, "two")
    assert await states(owner) == ["running", "waiting"]
    await settle(queue, held)
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held)
        assert await stream.embed_all() == [["two"]]


@pytest.mark.parametrize("is_choice", [True, False])
async def test_what_is_not_committed_yet_when_a_user_opts_in_is_not_forgotten(
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
    is_choice: bool,
) -> None:
    caller = await new_caller(database)
    choosing = partial(choose, database, caller)
    consenting = partial(consent, system_database, caller)
    first, last = (consenting, choosing) if is_choice else (choosing, consenting)
    await first()
    async with database.transaction(caller) as connection:
        await insert(connection, caller, "in flight")
        await ask_for_embedding(connection, caller)
        opting = asyncio.create_task(last())
        await waiting_for_a_lock(owner)
        assert await states(owner) == []
    await opting
    assert await states(owner) == ["waiting"]


async def test_a_write_that_waited_for_a_choice_sees_it(
    database: Database, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    caller = await new_caller(database)
    await consent(system_database, caller)
    await choose(database, caller, "")
    async with database.transaction(caller) as choosing:
        await wait_for_writes(choosing, caller)
        writing = asyncio.create_task(remember(database, caller, "one"))
        await waiting_for_a_lock(owner)
        await choosing.execute("UPDATE settings SET embedding_model = 'local'")
    await writing
    assert await states(owner) == ["waiting"]


async def insert(connection: Any, caller: Caller, text: str) -> None:
    """Write a memory, in a transaction that stays open."""
    await connection.execute(
        """
        INSERT INTO memories (tenant_id, user_id, id, tier, content, source, occurred_at,
                              size_bytes, content_hash, created_at, updated_at, terms)
        VALUES ($1, $2, $3, 'long_term', $4, 'chat', now(), 100, $5, now(), now(),
                '{}/1000000000')
        """,
        caller.tenant_id,
        caller.user_id,
        ids.new_id(),
        text,
        hash_of(text),
    )


async def waiting_for_a_lock(owner: asyncpg.Connection) -> None:
    """Return when somebody waits for another one's advisory lock."""
    waiting = "SELECT true FROM pg_locks WHERE locktype = 'advisory' AND NOT granted LIMIT 1"
    async with asyncio.timeout(30):
        while not await owner.fetchval(waiting):
            pass


# --- who may not


async def test_vectors_under_a_lease_that_passed_on_are_not_kept(
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    first = (await lease(queue)).held
    async with streaming(stub) as zombie, streaming(stub) as heir:
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
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "???")
    held = (await lease(queue)).held
    async with streaming(stub) as stream:
        await stream.open(held)
        batch = await stream.batch()
        await queue.release(WORKER, [held])
        await stream.answer(batch, np.zeros((1, 2), "<f4").tobytes())
        assert (await stream.refused()).reason == "LEASE_LOST"
    assert await owner.fetchval("SELECT unique_key IS NOT NULL FROM jobs")


async def test_a_stream_opens_only_for_the_holder_of_a_lease_of_such_a_job(
    stub: rpc.EmbeddingServiceAsyncStub,
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
        async with streaming(stub) as stream:
            await stream.open(held)
            assert (await stream.refused()).reason == reason
    running = (await lease(queue)).held
    for held, reason in [
        (Held(running.job_id, running.token - 1), "LEASE_LOST"),
        (Held(running.job_id, running.token + 1), "LEASE_LOST"),
    ]:
        async with streaming(stub) as stream:
            await stream.open(held)
            assert (await stream.refused()).reason == reason
    await owner.execute("UPDATE jobs SET kind = 'meditation.shard'")
    async with streaming(stub) as stream:
        await stream.open(running)
        assert (await stream.refused()).reason == "RESOURCE_NOT_FOUND"


async def test_no_user_does_this_work(stub: rpc.EmbeddingServiceAsyncStub, chooser: Caller) -> None:
    async def nothing() -> AsyncIterator[pb.EmbedRequest]:
        yield pb.EmbedRequest(open=pb.Open(job_id=f"job_{'0' * 32}", lease_token=1, batch_size=1))

    call = stub.Embed(nothing(), metadata=bearer(chooser))
    assert (await refusal_of(call.read())).code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_worker_without_the_model_is_told_which_it_has(
    stub: rpc.EmbeddingServiceAsyncStub, queue: Queue, chooser: Caller, database: Database
) -> None:
    await remember(database, chooser, "one")
    async with streaming(stub) as stream:
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
    stub: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
    values: Any,
    field: str,
) -> None:
    await remember(database, chooser, "one", "two")
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held)
        await stream.answer(await stream.batch(), values.astype("<f4").tobytes())
        refusal = await stream.refused()
        assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))
    assert await vectors(owner) == {}


async def test_what_is_said_out_of_turn_is_refused(
    stub: rpc.EmbeddingServiceAsyncStub, queue: Queue, chooser: Caller, database: Database
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
        async with streaming(stub) as stream:
            await stream.call.write(request)
            assert (await stream.refused()).fields == (field,)
    async with streaming(stub) as stream:
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
    stub: rpc.EmbeddingServiceAsyncStub,
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
    async with streaming(stub) as stream:
        await stream.open((await lease(queue)).held)
        await stream.answer(await stream.batch())
        assert (await stream.refused()).reason == "FIELD_INVALID"
