"""The job that follows a rotation of the master key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.maintenance.v1 import maintenance_pb2 as pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as rpc

from server import ids
from server.blobs import Blobs
from server.cache import Redis
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Database, SystemDatabase
from server.memory.key_rotation import KeyRotation
from server.operations import rotate_data_keys
from server.settings import Settings
from tests.conftest import FakeClock, Serve, Urls, as_worker, bearer, new_caller
from tests.kms.conftest import Master
from tests.kms.test_settings import GIVEN, VAULT
from tests.maintenance import maintenance_service
from workers.rewrapping import REWRAP, DataKeysUnreadable, Rewrapping
from workers.stream import Task

TASK = Task("job_1", 1, REWRAP, {}, 1)


@pytest_asyncio.fixture
async def channel(
    serve: Serve,
    database: Database,
    system_database: SystemDatabase,
    master: Master,
    blobs: Blobs,
    redis: Redis,
    clock: FakeClock,
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the maintenance service."""
    service = maintenance_service(database, system_database, master.kms, blobs, redis, clock)
    yield await serve(lambda server: rpc.add_MaintenanceServiceServicer_to_server(service, server))


@pytest_asyncio.fixture
async def crowd(master: Master, database: Database) -> Sequence[Caller]:
    """Seven users with a key each."""
    callers = [await new_caller(database) for _ in range(7)]
    for caller in callers:
        await DataKeys(database, master.kms).prepare(caller)
    return callers


async def keys_of(master: Master, database: Database, crowd: Sequence[Caller]) -> list[bytes]:
    fresh = DataKeys(database, master.kms)
    return [await fresh.existing_key_of(caller) for caller in crowd]


def rewrapping(channel: grpc.aio.Channel) -> Rewrapping:
    return Rewrapping(channel, metadata=as_worker(), page_size=3)


async def test_keys_outlive_the_master_key_that_wrapped_them(
    master: Master, database: Database, crowd: Sequence[Caller], channel: grpc.aio.Channel
) -> None:
    before = await keys_of(master, database, crowd)
    master.rotate()
    assert await rewrapping(channel).rewrap(TASK) == {"rewrapped": 7}
    master.destroy_oldest()
    assert await keys_of(master, database, crowd) == before


async def test_what_is_done_is_not_done_again(
    master: Master, crowd: Sequence[Caller], channel: grpc.aio.Channel, owner: asyncpg.Connection
) -> None:
    assert await rewrapping(channel).rewrap(TASK) == {"rewrapped": 0}
    master.rotate()
    stub = rpc.MaintenanceServiceStub(channel)
    # A worker that was killed after its first page, and the one that comes after it.
    page = await stub.RewrapDataKeys(pb.RewrapDataKeysRequest(page_size=3), metadata=as_worker())
    assert (page.rewrapped, page.unreadable, bool(page.next_page_token)) == (3, 0, True)
    assert await rewrapping(channel).rewrap(TASK) == {"rewrapped": 4}
    versions = await owner.fetch("SELECT DISTINCT kms_version FROM user_keys")
    assert [row["kms_version"] for row in versions] == [await master.kms.newest_version()]


async def test_workers_that_rewrap_at_once_lose_nothing(
    master: Master, database: Database, crowd: Sequence[Caller], channel: grpc.aio.Channel
) -> None:
    before = await keys_of(master, database, crowd)
    master.rotate()
    results = await asyncio.gather(*(rewrapping(channel).rewrap(TASK) for _ in range(4)))
    assert sum(result["rewrapped"] for result in results) == 7
    master.destroy_oldest()
    assert await keys_of(master, database, crowd) == before


async def test_key_that_does_not_unwrap_fails_the_job_after_all_others_are_done(
    master: Master,
    database: Database,
    crowd: Sequence[Caller],
    channel: grpc.aio.Channel,
    owner: asyncpg.Connection,
) -> None:
    sick = await owner.fetchval("SELECT user_id FROM user_keys ORDER BY id OFFSET 1 LIMIT 1")
    well = [caller for caller in crowd if caller.user_id != sick]
    before = await keys_of(master, database, well)
    await owner.execute("UPDATE user_keys SET wrapped = 'damaged' WHERE user_id = $1", sick)
    master.rotate()
    with pytest.raises(DataKeysUnreadable):
        await rewrapping(channel).rewrap(TASK)
    master.destroy_oldest()
    assert await keys_of(master, database, well) == before
    assert (
        await owner.fetchval("SELECT wrapped FROM user_keys WHERE user_id = $1", sick) == b"damaged"
    )


async def test_key_that_was_shredded_meanwhile_does_not_come_back(
    master: Master,
    database: Database,
    system_database: SystemDatabase,
    crowd: Sequence[Caller],
    owner: asyncpg.Connection,
) -> None:
    master.rotate()
    keys = DataKeys(database, master.kms)

    class Interrupted:
        """A key manager during whose answer a user is erased."""

        def __getattr__(self, name: str) -> object:
            return getattr(master.kms, name)

        async def rewrap(self, wrapped: bytes, *, context: bytes) -> bytes:
            fresh = await master.kms.rewrap(wrapped, context=context)
            async with system_database.transaction() as connection:
                await keys.shred(connection, crowd[0])
            return fresh

    page = await KeyRotation(system_database, Interrupted()).rewrap(None, 100)  # type: ignore[arg-type]
    assert page.rewrapped == 6
    assert not await owner.fetch("SELECT FROM user_keys WHERE user_id = $1", crowd[0].user_id)


async def test_key_manager_that_is_slow_ends_a_page_early(
    master: Master,
    system_database: SystemDatabase,
    crowd: Sequence[Caller],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.memory.key_rotation._PATIENCE_SECONDS", 0.0)
    master.rotate()
    rotation = KeyRotation(system_database, master.kms)
    page = await rotation.rewrap(None, 100)
    assert (page.rewrapped, page.last is None) == (1, False)
    assert (await rotation.rewrap(page.last, 100)).rewrapped == 1


async def test_command_enqueues_the_job(urls: Urls, owner: asyncpg.Connection) -> None:
    dsns = {"database_url": urls.application, "system_database_url": urls.system}
    settings = Settings(**(GIVEN | VAULT | dsns))  # type: ignore[arg-type]
    first, second = await rotate_data_keys(settings), await rotate_data_keys(settings)
    jobs = await owner.fetch("SELECT id, user_id FROM jobs WHERE kind = $1", REWRAP)
    # Two, for the first may be past some keys when the master key changes once more.
    assert {ids.show(ids.JOB, job["id"]) for job in jobs} == {first, second}
    assert {job["user_id"] for job in jobs} == {None}


@pytest.mark.parametrize("who", ["user", "nobody"])
async def test_only_workers_may_rewrap(caller: Caller, channel: grpc.aio.Channel, who: str) -> None:
    stub = rpc.MaintenanceServiceStub(channel)
    metadata = bearer(caller) if who == "user" else ()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.RewrapDataKeys(pb.RewrapDataKeysRequest(), metadata=metadata)
    assert refused.value.code() in (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    )


@pytest.mark.parametrize(
    "request_", [pb.RewrapDataKeysRequest(page_size=1001), pb.RewrapDataKeysRequest(page_token="x")]
)
async def test_senseless_page_is_refused(
    channel: grpc.aio.Channel, request_: pb.RewrapDataKeysRequest
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await rpc.MaintenanceServiceStub(channel).RewrapDataKeys(request_, metadata=as_worker())
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
