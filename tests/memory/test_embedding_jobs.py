"""Which jobs make vectors, and that no text is forgotten."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import asyncpg
import numpy as np
import pytest
from kimberly.embedding.v1 import embedding_pb2_grpc as rpc

from local.postgres import OWNER, SUPERUSER
from local.servers import Stores
from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.embedding_requests import ask_for_embedding, wait_for_writes
from server.jobs.queue import Queue
from server.memory.model import Change, hash_of
from server.memory.store import MemoryStore
from server.migrate import migrate, read_migrations
from tests.conftest import FakeClock, data_keys_of, new_caller
from tests.deciding import decide
from tests.memory.embedding_calls import (
    MODEL,
    choose,
    consent,
    lease,
    settle,
    states,
    streaming,
    vectors,
)
from tests.remembering import draft, remember

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


# --- nothing is forgotten


async def test_what_is_written_while_a_job_runs_is_embedded_by_it(
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    store, now = MemoryStore(database, data_keys_of(database)), FakeClock()()
    memory, _ = await store.create(chooser, draft("one"), "", now)
    await remember(database, chooser, "two")
    async with streaming(embedding) as stream:
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
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    async with streaming(embedding) as stream:
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
    embedding: rpc.EmbeddingServiceAsyncStub,
    queue: Queue,
    chooser: Caller,
    database: Database,
    owner: asyncpg.Connection,
) -> None:
    await remember(database, chooser, "one")
    held = (await lease(queue)).held
    async with streaming(embedding) as stream:
        await stream.open(held)
        assert await stream.embed_all() == [["one"]]
    # The worker has not settled it yet.
    assert await states(owner) == ["running"]
    await remember(database, chooser, "two")
    assert await states(owner) == ["running", "waiting"]
    await settle(queue, held)
    async with streaming(embedding) as stream:
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
