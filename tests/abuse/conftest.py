"""Users who wish each other ill, and every door of the mesh."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import httpx
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kimberly.users.v1 import users_pb2 as users

from local.fleet import MASTER_KEY
from local.mesh import Mesh
from local.postgres import SYSTEM
from server.access import Scope
from server.auth.key_store import KeyStore
from server.auth.keyring import Keyring
from server.database import SystemDatabase, open_pool
from server.kms.local import LocalKms
from tests.abuse.doors import Doors
from tests.abuse.estates import agree
from tests.abuse.forgery import Forger
from tests.abuse.wire import Wire
from tests.mesh import (
    User,
    acting,
    channel,
    http,
    join,
    join_too,
    mesh,
    pytest_runtest_teardown,
    sign_up,
    trust,
)

__all__ = ["channel", "http", "mesh", "pytest_runtest_teardown", "trust"]


# Of a module and no longer: their tokens are good for ten minutes, and all modules together may
# take longer than that.


@pytest_asyncio.fixture(scope="module")
async def ann(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Has something that others want."""
    return await sign_up(http, channel)


@pytest_asyncio.fixture(scope="module")
async def bob(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Wants it."""
    return await sign_up(http, channel)


@pytest_asyncio.fixture(scope="module")
async def cy(mesh: Mesh, http: httpx.AsyncClient, channel: grpc.aio.Channel, ann: User) -> User:
    """Wants it too, and is of Ann's tenant."""
    return await join(mesh, http, channel, ann)


@pytest_asyncio.fixture(scope="module")
async def ann_at_bobs(
    mesh: Mesh, http: httpx.AsyncClient, channel: grpc.aio.Channel, ann: User, bob: User
) -> User:
    """Whom Ann is in Bob's tenant: what is hers at home is not for whoever runs that."""
    return await join_too(mesh, http, channel, ann, bob)


@pytest_asyncio.fixture(scope="module")
async def principal(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Lets agents act. Has no others: a user has room for few."""
    user = await sign_up(http, channel)
    await agree(user, users.CONSENT_PURPOSE_MEMORY_AGENT_ACCESS)
    return user


@pytest_asyncio.fixture(scope="module")
async def agent(http: httpx.AsyncClient, channel: grpc.aio.Channel, principal: User) -> User:
    """An agent with every scope that agents can have."""
    return (await acting(http, channel, principal, sorted({*Scope} - {Scope.USER})))[0]


@pytest_asyncio.fixture(scope="module")
async def narrow_agent(http: httpx.AsyncClient, channel: grpc.aio.Channel, principal: User) -> User:
    """An agent with a scope that opens nothing by itself."""
    return (await acting(http, channel, principal, [Scope.MEMORY_SENSITIVE]))[0]


@pytest.fixture(scope="session")
def wire(mesh: Mesh) -> Wire:
    """Raw connections to the edge."""
    return Wire(mesh, str(mesh.ca))


@pytest_asyncio.fixture(scope="session")
async def doors(mesh: Mesh) -> AsyncIterator[Doors]:
    """Sidecars and services, past the edge."""
    # Not pytest's: the path of a socket must be short.
    directory = Path(tempfile.mkdtemp(prefix="kimberly-"))
    async with AsyncExitStack() as stack:
        yield Doors(mesh, directory, stack)
    shutil.rmtree(directory)


@pytest_asyncio.fixture(scope="module")
async def forger(mesh: Mesh, bob: User) -> Forger:
    """Bob, with the key that signs access tokens: what he forges fails for one reason only."""
    pool = await open_pool(mesh.stores.dsn(SYSTEM), size=1, name="forger")
    master_key = LocalKms(mesh.stores.secrets.path(MASTER_KEY))
    keyring = Keyring(KeyStore(SystemDatabase(pool)), master_key, access_token_seconds=600)
    signer = await keyring.signer()
    await pool.close()
    pem = signer.as_pem(private=True)
    key = serialization.load_pem_private_key(pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Forger(key, str(signer.kid), mesh.edge, bob.id, bob.tenant_id)
