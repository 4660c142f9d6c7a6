"""How the tests reach the mesh: as users through the edge, and behind its back."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import asyncpg
import grpc
from kimberly.client import Client, connect
from kimberly.users.v1 import users_pb2

from local.mesh import Mesh
from local.postgres import SUPERUSER
from server import ids
from tests.faults.driver import User

T = TypeVar("T")

_PASSWORD = "correct horse battery staple"


@asynccontextmanager
async def signed_up(mesh: Mesh, name: str) -> AsyncIterator[User]:
    """Open a client as somebody who is new and consents."""
    async with connect(mesh.edge.removeprefix("https://"), mesh.ca) as client:
        # Whoever is new has an address that nobody had.
        email = f"{name}-{time.time_ns()}@example.com"
        answer = await client.sign_up(email, _PASSWORD)
        await client.users.RecordConsent(
            users_pb2.RecordConsentRequest(
                purpose=users_pb2.CONSENT_PURPOSE_MEMORY_STORE, granted=True
            ),
            timeout=5,
        )
        yield User(name, client, answer.user_id)


@asynccontextmanager
async def as_superuser(mesh: Mesh) -> AsyncIterator[asyncpg.Connection]:
    """Open a connection past row-level security, to look at what is really there."""
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER), timeout=10)
    try:
        yield connection
    finally:
        await connection.close()


async def until(what: Callable[[], Awaitable[T | None]], seconds: float, pause: float = 0.02) -> T:
    """Return the first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := await what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(pause)
    return answer


async def assert_audit_is_intact(mesh: Mesh, client: Client, user_id: str) -> None:
    """Verify a user's audit chain through the edge, and that it holds every event."""

    async def verified() -> users_pb2.VerifyAuditLogResponse | None:
        try:
            return await client.users.VerifyAuditLog(users_pb2.VerifyAuditLogRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            # A sidecar that was killed last may still fetch the keys that verify tokens.
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return None

    found = await until(verified, seconds=5)
    assert found.intact, found
    async with as_superuser(mesh) as superuser:
        events = await superuser.fetchval(
            "SELECT count(*) FROM audit_events WHERE user_id = $1",
            ids.parse(ids.USER, user_id, "user"),
        )
    assert found.verified_events == events
