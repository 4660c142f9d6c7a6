"""The privacy services of one test, behind the real chain, and users with something everywhere."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import argon2
import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.privacy.v1 import privacy_pb2_grpc as rpc

from server.auth.passwords import Passwords
from server.blobs import Blobs
from server.cache import Redis, prefix_of
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.kms.local import LocalKms
from server.memory.agent_reads import AgentReads
from server.memory.bulk_store import BulkStore
from server.memory.change_store import ChangeStore
from server.memory.collection import Collection
from server.memory.exporting import Exporter
from server.memory.histories import Histories
from server.memory.lifecycle_store import LifecycleStore
from server.memory.objects import Kind
from server.memory.sensitive import Opener
from server.memory.short_term import ShortTermStore
from server.privacy import words
from server.privacy.dumping import Dumper
from server.privacy.erasing import Eraser
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore, Patience
from server.privacy.export_store import ExportStore
from server.privacy.exporting import UserExporter
from server.privacy.service import PrivacyService
from server.privacy.work_service import PrivacyWorkService
from server.users.audit_keys import AuditKeys
from server.users.checkpoint_store import CheckpointStore
from tests.conftest import Serve, as_worker, data_keys_of
from tests.database.rows import populate, three
from workers.erasure import Erasing
from workers.exporting import Exporting
from workers.stream import Task

Privacy: TypeAlias = "rpc.PrivacyServiceAsyncStub"
PASSWORD = "correct horse battery staple"
CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
HURRIED = Patience(settle=timedelta(), confirm=timedelta(hours=1))


class Everything:
    """What three users have in every store: two of one tenant, and one of another."""

    def __init__(
        self, owner: asyncpg.Connection, blobs: Blobs, redis: Redis, callers: tuple[Caller, ...]
    ) -> None:
        self.owner = owner
        self.blobs = blobs
        self.redis = redis
        self.mine, self.colleague, self.stranger = callers

    async def make(self) -> None:
        """Put something of everybody into every table, prefix, and kind of key."""
        everybody = self.mine, self.colleague, self.stranger
        await populate(self.owner, everybody)
        # Nobody is erased yet; and their password is known.
        await self.owner.execute("DELETE FROM erasures")
        await self.owner.execute("UPDATE accounts SET password_hash = $1", CHEAP.hash(PASSWORD))
        for caller in everybody:
            for kind in Kind:
                for _ in range(3):
                    await self.put_object(caller, kind)
            key = f"attachments/{caller.tenant_id.hex}/{caller.user_id.hex}/unfinished"
            await self.blobs.begin_upload(key)
            for name in ("one", "another", "session:x", "anything else"):
                await self.redis.set(prefix_of(caller) + name, "said")

    async def put_object(self, caller: Caller, kind: Kind) -> None:
        """Write an object twice: where versions are kept there are two of it."""
        key = f"{kind}/{caller.tenant_id.hex}/{caller.user_id.hex}/{secrets.token_hex(16)}"
        for text in (b"said", b"said again"):
            await self.blobs.put(key, text, "text/plain")

    async def of(self, caller: Caller) -> dict[str, int]:
        """Count what there is of a user, by place; what is not there is not listed."""
        found = {
            **await self._rows(caller),
            "objects": await self._objects(caller),
            "uploads": len([u for u in await self.blobs.unfinished() if _is_of(caller, u.key)]),
            "keys": len([key async for key in self.redis.scan_iter(f"{prefix_of(caller)}*")]),
        }
        return {place: count for place, count in found.items() if count}

    async def _rows(self, caller: Caller) -> dict[str, int]:
        """Look for the id of the user in all rows of all tables, whatever the column is called."""
        names = await self.owner.fetch(
            "SELECT relname FROM pg_class"
            " WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        )
        return {
            name: await self.owner.fetchval(
                f"SELECT count(*) FROM {name} AS row WHERE row::text LIKE $1 OR row::text LIKE $2",
                f"%{caller.user_id}%",
                f"%{caller.user_id.hex}%",
            )
            for (name,) in names
        }

    async def _objects(self, caller: Caller) -> int:
        count, token = 0, ""
        while True:
            page = await self.blobs.versions(token=token, limit=1000)
            count += len([version for version in page.versions if _is_of(caller, version.key)])
            token = page.next_token
            if not token:
                return count


def _is_of(caller: Caller, key: str) -> bool:
    return caller.user_id.hex in key and not key.startswith("erasures/")


@pytest_asyncio.fixture
async def everything(owner: asyncpg.Connection, blobs: Blobs, redis: Redis) -> Everything:
    """Three users who have something everywhere."""
    await blobs.keep_versions()
    # Tests share the bucket, and not the keys that words are signed with.
    for key in await blobs.list_keys(words.DIRECTORY):
        await blobs.erase(key)
    made = Everything(owner, blobs, redis, three())
    await made.make()
    return made


@pytest.fixture
def erasures(system_database: SystemDatabase) -> ErasureStore:
    """Begins at once, and confirms an hour later."""
    return ErasureStore(system_database, HURRIED)


@pytest.fixture
def audit_keys(system_database: SystemDatabase, master_key: Path) -> AuditKeys:
    """What receipts and words are signed with."""
    return AuditKeys(CheckpointStore(system_database), LocalKms(master_key))


@pytest.fixture
def archive(erasures: ErasureStore, blobs: Blobs, audit_keys: AuditKeys) -> ErasureArchive:
    """Archives when a test says so."""
    return ErasureArchive(erasures, blobs, audit_keys.signer, audit_keys.known)


@pytest.fixture
def eraser(
    system_database: SystemDatabase,
    database: Database,
    erasures: ErasureStore,
    blobs: Blobs,
    redis: Redis,
) -> Eraser:
    """Removes what is left of a user."""
    keys = data_keys_of(database)
    return Eraser(system_database, erasures, keys, blobs, redis, object_kinds=tuple(Kind))


@pytest.fixture
def exports(database: Database) -> ExportStore:
    """Keeps exports for a week."""
    return ExportStore(database, timedelta(days=7))


@pytest.fixture
def exporter(
    database: Database,
    system_database: SystemDatabase,
    exports: ExportStore,
    blobs: Blobs,
    redis: Redis,
) -> UserExporter:
    """Writes exports."""
    opener = Opener(data_keys_of(database))
    short_term = ShortTermStore(redis, database, timedelta(days=1))
    memories = Exporter(
        Collection(BulkStore(database), short_term, opener, AgentReads(database)),
        ChangeStore(system_database),
    )
    histories = Histories(memories, LifecycleStore(database), short_term, opener)
    return UserExporter(exports, Dumper(database, system_database), histories, blobs)


@pytest_asyncio.fixture
async def privacy(
    serve: Serve,
    erasures: ErasureStore,
    exports: ExportStore,
    audit_keys: AuditKeys,
    blobs: Blobs,
) -> AsyncIterator[Privacy]:
    """A stub of the privacy service."""
    with Passwords(concurrency=2, hasher=CHEAP) as hashing:
        service = PrivacyService(
            erasures,
            exports,
            hashing.match,
            audit_keys.signer,
            blobs,
            url_lifetime=timedelta(minutes=5),
        )
        channel = await serve(
            lambda server: rpc.add_PrivacyServiceServicer_to_server(service, server)
        )
        yield rpc.PrivacyServiceStub(channel)


@pytest_asyncio.fixture
async def work(serve: Serve, eraser: Eraser, exporter: UserExporter) -> grpc.aio.Channel:
    """A channel to what workers call."""
    service = PrivacyWorkService(eraser, exporter)
    return await serve(lambda server: rpc.add_PrivacyWorkServiceServicer_to_server(service, server))


@pytest.fixture
def erasing(work: grpc.aio.Channel) -> Erasing:
    """The worker's side of an erasure, in small pages."""
    return Erasing(work, metadata=as_worker(), page_size=2)


@pytest.fixture
def exporting(work: grpc.aio.Channel) -> Exporting:
    """The worker's side of exports."""
    return Exporting(work, metadata=as_worker())


async def until_waiting(owner: asyncpg.Connection, count: int) -> None:
    """Return once so many transactions wait for the lock of an erasure."""
    statement = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with asyncio.timeout(30):
        while await owner.fetchval(statement) < count:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


def task_of(caller: Caller) -> Task:
    """Return the job that erases a user."""
    payload = {"tenant_id": f"ten_{caller.tenant_id.hex}", "user_id": f"usr_{caller.user_id.hex}"}
    return Task(job_id="job", lease_token=1, kind="user.erase", payload=payload, attempt=1)
