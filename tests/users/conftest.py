"""The user service of one test, behind the real chain."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeAlias

import pytest
import pytest_asyncio
from kimberly.users.v1 import users_pb2_grpc as rpc

from server.auth.endings import ConsentEndings
from server.blobs import Blobs
from server.database import Database, SystemDatabase
from server.kms.local import LocalKms
from server.users.audit_keys import AuditKeys
from server.users.audit_log import AuditLog
from server.users.audit_store import AuditStore
from server.users.checkpoint_archive import CheckpointArchive
from server.users.checkpoint_store import CheckpointStore
from server.users.checkpointer import Checkpointer
from server.users.consent_store import ConsentStore
from server.users.service import UserService
from server.users.store import UserStore
from server.users.tenant_audits import TenantAudits
from server.users.withdrawal_archive import WithdrawalArchive
from tests.conftest import FakeClock, Serve

Users: TypeAlias = "rpc.UserServiceAsyncStub"
"""The generated type of the stub; it exists for type checkers only."""


@pytest.fixture
def checkpoint_store(system_database: SystemDatabase) -> CheckpointStore:
    """What the database knows of checkpoints."""
    return CheckpointStore(system_database)


@pytest.fixture
def audit_keys(checkpoint_store: CheckpointStore, master_key: Path, clock: FakeClock) -> AuditKeys:
    """The keys that sign checkpoints."""
    return AuditKeys(checkpoint_store, LocalKms(master_key), clock=clock)


@pytest.fixture
def archive(
    blobs: Blobs, checkpoint_store: CheckpointStore, audit_keys: AuditKeys
) -> CheckpointArchive:
    """The checkpoints in S3."""
    return CheckpointArchive(blobs, checkpoint_store, audit_keys)


@pytest.fixture
def checkpointer(
    checkpoint_store: CheckpointStore,
    archive: CheckpointArchive,
    audit_keys: AuditKeys,
    clock: FakeClock,
) -> Checkpointer:
    """Signs when a test says so."""
    return Checkpointer(checkpoint_store, archive, audit_keys, clock=clock)


@pytest.fixture
def audit_log(system_database: SystemDatabase, archive: CheckpointArchive) -> AuditLog:
    """An audit log that reads its chains in small pages, so that tests cross many."""
    return AuditLog(AuditStore(system_database), archive, seal_seconds=1, page=7)


@pytest.fixture
def consents(system_database: SystemDatabase, clock: FakeClock) -> ConsentStore:
    """What users agreed to."""
    return ConsentStore(system_database, ConsentEndings(), clock=clock)


@pytest.fixture
def withdrawals(consents: ConsentStore, blobs: Blobs, audit_keys: AuditKeys) -> WithdrawalArchive:
    """What they took back, in S3."""
    return WithdrawalArchive(consents, blobs, audit_keys.signer, audit_keys.known)


@pytest_asyncio.fixture
async def users(
    serve: Serve,
    database: Database,
    system_database: SystemDatabase,
    consents: ConsentStore,
    withdrawals: WithdrawalArchive,
    audit_log: AuditLog,
) -> AsyncIterator[Users]:
    """A stub of the user service."""
    service = UserService(
        UserStore(database), consents, withdrawals, TenantAudits(system_database), audit_log
    )
    channel = await serve(lambda server: rpc.add_UserServiceServicer_to_server(service, server))
    yield rpc.UserServiceStub(channel)
