"""What uploads and deletions leave behind in the object store goes; what has a row stays."""

from __future__ import annotations

from datetime import datetime, timedelta

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.maintenance.v1 import maintenance_pb2 as maintenance
from kimberly.maintenance.v1 import maintenance_pb2_grpc
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server import ids
from server.blobs import Blobs
from server.caller import Caller
from server.clock import utc_now
from server.database import Database, SystemDatabase
from server.memory.attachment_store import object_name
from server.memory.sweep_handlers import SweepHandlers
from server.memory.sweeping import Sweep
from tests.conftest import FakeClock, Serve, as_worker, bearer, new_caller
from tests.memory.conftest import URL_LIFETIME
from tests.memory.files import (
    DATA,
    LARGE,
    BrokenBlobs,
    announce,
    attach,
    complete,
    download,
    key_of,
    left_of,
    upload,
)
from tests.refusals import refusal_of
from workers.housekeeping import Housekeeping
from workers.stream import Task

HOUR = timedelta(hours=1)
LATER = 3 * HOUR
"""Later than any margin after what a test does now."""


class SweepService(SweepHandlers, maintenance_pb2_grpc.MaintenanceServiceServicer):
    """As much of MaintenanceService as sweeps."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep


class House:
    """A worker that sweeps at the instant that a test says."""

    def __init__(self, housekeeping: Housekeeping, clock: SweepClock) -> None:
        self._housekeeping = housekeeping
        self._clock = clock

    async def sweep(self, after: timedelta) -> dict[str, int]:
        """Sweep as if it were so much later, and return how many things were removed."""
        self._clock.after = after
        task = Task(job_id="job", lease_token=1, kind="attachments.sweep", payload={}, attempt=1)
        return dict(await self._housekeeping.sweep_attachments(task))


class SweepClock:
    """The real time, moved: S3 stamps its objects with it."""

    after = timedelta()

    def __call__(self) -> datetime:
        return utc_now() + self.after


@pytest.fixture
def blobs(blobs: Blobs) -> BrokenBlobs:
    """The bucket of this test run, which breaks when a test says so."""
    return BrokenBlobs.of(blobs)


@pytest_asyncio.fixture
async def channel(serve: Serve, system_database: SystemDatabase, blobs: Blobs) -> grpc.aio.Channel:
    sweep = Sweep(system_database, blobs, CLOCK, url_lifetime=URL_LIFETIME, margin=HOUR)
    service = SweepService(sweep)  # type: ignore[abstract] # the rest is served elsewhere
    return await serve(
        lambda server: maintenance_pb2_grpc.add_MaintenanceServiceServicer_to_server(
            service, server
        )
    )


CLOCK = SweepClock()


@pytest_asyncio.fixture
async def house(channel: grpc.aio.Channel, blobs: Blobs, clock: FakeClock) -> House:
    """A swept house: what other tests left in the bucket is gone."""
    clock.now = utc_now()
    await blobs.keep_versions()
    house = House(Housekeeping(channel, metadata=as_worker(), page_size=7), CLOCK)
    await house.sweep(LATER)
    return house


async def test_pending_attachment_goes_with_all_that_hangs_on_it_once_it_is_late(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    blobs: Blobs,
    house: House,
    owner: asyncpg.Connection,
) -> None:
    uploaded = await announce(memories, caller, DATA)
    await upload(uploaded, DATA)
    in_parts = await announce(memories, caller, LARGE)
    done = await attach(memories, caller, b"done")
    keys = [key_of(caller, each.attachment) for each in (uploaded, in_parts)]
    assert set((await house.sweep(URL_LIFETIME)).values()) == {0}
    assert [len(await left_of(blobs, key)) for key in keys] == [1, 1]
    removed = await house.sweep(LATER)
    assert (removed["expired"], removed["doomed"]) == (2, 2)
    assert [await left_of(blobs, key) for key in keys] == [[], []]
    assert await download(memories, caller, done) == b"done"
    gone = await refusal_of(complete(memories, caller, uploaded))
    assert gone.code is grpc.StatusCode.NOT_FOUND
    events = await owner.fetch(
        "SELECT actor, user_id FROM audit_events WHERE action = 'attachment.expire'"
    )
    assert [(row["actor"], row["user_id"]) for row in events] == [("system", caller.user_id)] * 2


async def test_deletion_that_s3_did_not_answer_is_made_good(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    blobs: BrokenBlobs,
    house: House,
    owner: asyncpg.Connection,
) -> None:
    kept = await attach(memories, caller, b"kept")
    deleted = [await attach(memories, caller, bytes([n])) for n in range(10)]
    blobs.refused = "erase"
    for attachment in deleted:
        request = pb.DeleteAttachmentRequest(id=attachment.id)
        await memories.DeleteAttachment(request, metadata=bearer(caller))
    with pytest.raises(grpc.aio.AioRpcError):
        await house.sweep(timedelta())
    assert await owner.fetchval("SELECT count(*) FROM doomed_objects") == 10
    blobs.refused = ""
    blobs.lost = "erase"  # one answer
    assert [(await house.sweep(timedelta()))["doomed"] for _ in range(3)] == [9, 1, 0]
    assert [await left_of(blobs, key_of(caller, each)) for each in deleted] == [[]] * 10
    assert await owner.fetchval("SELECT count(*) FROM doomed_objects") == 0
    assert await download(memories, caller, kept) == b"kept"


async def test_sweep_erases_no_signed_checkpoint_whatever_the_table_says(
    blobs: BrokenBlobs, caller: Caller, house: House, owner: asyncpg.Connection
) -> None:
    key = f"audit/{caller.tenant_id.hex}/{1:020}.jws"
    await blobs.put_new(key, b"signed")
    await owner.execute(
        "INSERT INTO doomed_objects (object_key, tenant_id, user_id) VALUES ($1, $2, $3)",
        key,
        caller.tenant_id,
        caller.user_id,
    )
    await house.sweep(LATER)
    assert await blobs.get_small(key, longest=100) == b"signed"


async def test_object_without_a_row_goes_when_it_is_old_and_nothing_else_does(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    blobs: Blobs,
    house: House,
    database: Database,
) -> None:
    done = [await attach(memories, caller, bytes([n])) for n in range(10)]
    pending = await announce(memories, caller, DATA)
    await upload(pending, DATA)
    orphan = object_name(caller, ids.new_id()).key
    # The id exists, and is another user's.
    stranger = await new_caller(database)
    foreign = object_name(stranger, ids.parse(ids.ATTACHMENT, done[0].id, "id")).key
    others = [f"audit/{ids.new_id().hex}", f"{orphan}0", f"{key_of(caller, done[0])}/thumbnail"]
    for key in (orphan, foreign, *others):
        await blobs.put(key, b"x", "text/plain")
    await blobs.put(orphan, b"y", "text/plain")
    await blobs.remove_version(orphan, None)
    assert (await house.sweep(HOUR / 2))["orphans"] == 0
    assert (await house.sweep(HOUR + URL_LIFETIME / 2))["orphans"] == 4
    assert [await left_of(blobs, key) for key in (orphan, foreign)] == [[], []]
    assert [len(await left_of(blobs, key)) for key in others] == [1, 1, 1]
    for number, attachment in enumerate(done):
        assert await download(memories, caller, attachment) == bytes([number])
    await complete(memories, caller, pending)
    for key in others:
        await blobs.erase(key)


async def test_versions_that_were_not_checked_go(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, blobs: Blobs, house: House
) -> None:
    announced = await announce(memories, caller, DATA)
    await upload(announced, DATA)
    done = await complete(memories, caller, announced)
    key = key_of(caller, done)
    checked = await left_of(blobs, key)
    await upload(announced, DATA)
    await blobs.remove_version(key, None)
    assert len(await left_of(blobs, key)) == 3
    assert (await house.sweep(LATER))["orphans"] == 2
    assert await left_of(blobs, key) == checked
    assert await download(memories, caller, done) == DATA


async def test_upload_in_parts_that_nothing_names_is_given_up(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    blobs: BrokenBlobs,
    house: House,
) -> None:
    # Killed before its id was noted, and announced again by the same request.
    blobs.lost = "begin_upload"
    memory_id = (await attach(memories, caller, b"x")).memory_id
    again = {"memory_id": memory_id, "request_id": "r"}
    await refusal_of(announce(memories, caller, LARGE, **again))
    announced = await announce(memories, caller, LARGE, **again)
    key = key_of(caller, announced.attachment)
    assert len(await left_of(blobs, key)) == 2
    assert (await house.sweep(HOUR / 2))["uploads"] == 0
    assert (await house.sweep(HOUR + URL_LIFETIME / 2))["uploads"] == 1
    await upload(announced, LARGE)
    assert (await complete(memories, caller, announced)).state == pb.ATTACHMENT_STATE_COMPLETE


async def test_sweep_is_for_workers_only_and_refuses_what_it_does_not_know(
    channel: grpc.aio.Channel, caller: Caller
) -> None:
    stub = maintenance_pb2_grpc.MaintenanceServiceStub(channel)
    request = maintenance.SweepAttachmentsRequest(stage=maintenance.SWEEP_STAGE_ORPHANS)
    refusal = await refusal_of(stub.SweepAttachments(request, metadata=bearer(caller)))
    assert refusal.code is grpc.StatusCode.PERMISSION_DENIED
    for wrong, field in (
        (maintenance.SweepAttachmentsRequest(), "stage"),
        (maintenance.SweepAttachmentsRequest(stage=99), "stage"),  # type: ignore[arg-type]
        (
            maintenance.SweepAttachmentsRequest(stage=maintenance.SWEEP_STAGE_DOOMED, page_size=-1),
            "page_size",
        ),
        (
            maintenance.SweepAttachmentsRequest(
                stage=maintenance.SWEEP_STAGE_DOOMED, page_token="x"
            ),
            "page_token",
        ),
    ):
        refusal = await refusal_of(stub.SweepAttachments(wrong, metadata=as_worker()))
        assert refusal.fields == (field,)
