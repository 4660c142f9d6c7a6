"""The user service of one test, behind the real chain."""

from collections.abc import AsyncIterator
from typing import TypeAlias

import pytest
import pytest_asyncio
from kimberly.users.v1 import users_pb2_grpc as rpc

from server.database import Database, SystemDatabase
from server.users.audit_log import AuditLog
from server.users.audit_store import AuditStore
from server.users.service import UserService
from server.users.store import UserStore
from tests.conftest import Serve

Users: TypeAlias = "rpc.UserServiceAsyncStub"
"""The generated type of the stub; it exists for type checkers only."""


@pytest.fixture
def audit_log(system_database: SystemDatabase) -> AuditLog:
    """An audit log that reads its chains in small pages, so that tests cross many."""
    return AuditLog(AuditStore(system_database), seal_seconds=1, page=7)


@pytest_asyncio.fixture
async def users(serve: Serve, database: Database, audit_log: AuditLog) -> AsyncIterator[Users]:
    """A stub of the user service."""
    service = UserService(UserStore(database), audit_log)
    channel = await serve(lambda server: rpc.add_UserServiceServicer_to_server(service, server))
    yield rpc.UserServiceStub(channel)
