"""The job "audit.checkpoint": what a worker asks the auth process for."""

from __future__ import annotations

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.users.v1 import users_pb2 as pb
from kimberly.users.v1 import users_pb2_grpc as rpc
from prometheus_client import REGISTRY

from server.caller import Caller
from server.database import Database, SystemDatabase
from server.users.audit_keys import AuditKeys
from server.users.audit_log import AuditLog
from server.users.audit_work_service import AuditWorkService
from server.users.checkpoint_archive import CheckpointArchive
from server.users.checkpoint_store import CheckpointStore
from server.users.checkpointer import Checkpointer
from server.users.metrics import AuditReadings
from tests.conftest import EDGE_ID, Serve, as_worker, bearer, new_caller
from tests.users.tampering import act
from tests.users.test_checkpoints import unreachable as unreachable
from workers.auditing import CHECKPOINT, Auditing
from workers.stream import Task

TASK = Task("job_1", 1, CHECKPOINT, {}, 1)


@pytest_asyncio.fixture
async def channel(serve: Serve, checkpointer: Checkpointer) -> grpc.aio.Channel:
    service = AuditWorkService(checkpointer)
    return await serve(lambda server: rpc.add_AuditWorkServiceServicer_to_server(service, server))


@pytest_asyncio.fixture
async def callers(database: Database, audit_log: AuditLog) -> list[Caller]:
    """Users of ten tenants who did something."""
    callers = [await new_caller(database) for _ in range(10)]
    for each in callers:
        await act(database, each)
    await audit_log.seal()
    return callers


async def test_job_signs_every_chain_that_grew_page_by_page(
    channel: grpc.aio.Channel, callers: list[Caller], checkpoint_store: CheckpointStore
) -> None:
    auditing = Auditing(channel, metadata=as_worker(), page_size=3)
    assert await auditing.sign_checkpoints(TASK) == {"signed": len(callers)}
    for each in callers:
        assert await checkpoint_store.recorded(each.tenant_id)
    assert await auditing.sign_checkpoints(TASK) == {"signed": 0}


async def test_while_nobody_does_the_job_what_is_not_signed_is_told_to_grow_old(
    channel: grpc.aio.Channel,
    callers: list[Caller],
    database: Database,
    audit_log: AuditLog,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
) -> None:
    readings = AuditReadings(system_database)

    async def unsigned() -> float:
        await readings.unsigned()
        return REGISTRY.get_sample_value("audit_unsigned_seconds") or 0.0

    await owner.execute("UPDATE audit_events SET event_time = event_time - interval '1 hour'")
    assert 3600 <= await unsigned() < 3700
    auditing = Auditing(channel, metadata=as_worker())
    await auditing.sign_checkpoints(TASK)
    assert await unsigned() == 0
    # One chain goes on: what was signed is not counted again.
    await act(database, callers[0])
    await audit_log.seal()
    assert 0 < await unsigned() < 60


async def test_interrupted_job_leaves_less_to_the_next_one(
    channel: grpc.aio.Channel, callers: list[Caller]
) -> None:
    stub = rpc.AuditWorkServiceStub(channel)
    first = await stub.SignCheckpoints(pb.SignCheckpointsRequest(page_size=3), metadata=as_worker())
    assert first.signed == 3
    rest = await Auditing(channel, metadata=as_worker()).sign_checkpoints(TASK)
    assert rest == {"signed": len(callers) - 3}


@pytest.mark.parametrize("request_", [{"page_size": 1001}, {"page_token": "nonsense"}])
async def test_page_that_cannot_be_is_refused(
    channel: grpc.aio.Channel, request_: dict[str, int | str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await rpc.AuditWorkServiceStub(channel).SignCheckpoints(
            pb.SignCheckpointsRequest(**request_),  # type: ignore[arg-type]
            metadata=as_worker(),
        )
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_nobody_but_a_worker_has_checkpoints_signed(
    channel: grpc.aio.Channel, caller: Caller
) -> None:
    for metadata in (bearer(caller), as_worker(EDGE_ID)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Auditing(channel, metadata=metadata).sign_checkpoints(TASK)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_job_fails_while_s3_is_away_and_the_next_one_signs(
    serve: Serve,
    channel: grpc.aio.Channel,
    callers: list[Caller],
    unreachable: object,
    checkpoint_store: CheckpointStore,
    audit_keys: AuditKeys,
) -> None:
    away = CheckpointArchive(unreachable, checkpoint_store, audit_keys)  # type: ignore[arg-type]
    halted = AuditWorkService(Checkpointer(checkpoint_store, away, audit_keys))
    nowhere = await serve(lambda server: rpc.add_AuditWorkServiceServicer_to_server(halted, server))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await Auditing(nowhere, metadata=as_worker()).sign_checkpoints(TASK)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    signed = await Auditing(channel, metadata=as_worker()).sign_checkpoints(TASK)
    assert signed == {"signed": len(callers)}
