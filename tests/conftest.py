"""Real stores for every test: started once, one cloned database a test."""

import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from uuid import UUID

import asyncpg
import grpc
import pytest
import pytest_asyncio

from local.layout import Layout
from local.postgres import APPLICATION, OWNER, SUPERUSER, SYSTEM
from local.servers import BUCKET, Stores
from server import ids
from server.access import WORKER, spiffe_id
from server.blobs import Blobs
from server.cache import Redis, open_cache
from server.caller import Caller
from server.database import Database, SystemDatabase, open_pool
from server.errors import Unauthenticated
from server.migrate import migrate, read_migrations
from server.rpc.interceptors import chain
from server.rpc.serving import Server

TEMPLATE = "template_kimberly"
WORKER_ID = spiffe_id("kimberly.local", "test", WORKER)


@pytest_asyncio.fixture(scope="session")
async def stores(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stores]:
    """PostgreSQL, Valkey and an S3 server of this test run."""
    async with Stores(Layout(tmp_path_factory.mktemp("stores")), durable=False) as running:
        yield running


@pytest_asyncio.fixture(scope="session")
async def template(stores: Stores) -> str:
    """Name of a migrated, empty database, to be cloned."""
    await stores.postgres.provision(TEMPLATE)
    connection = await asyncpg.connect(stores.postgres.dsn(OWNER, TEMPLATE))
    try:
        await migrate(connection, read_migrations())
    finally:
        await connection.close()
    return TEMPLATE


@dataclass(frozen=True, slots=True)
class Urls:
    """How the roles reach the database of one test."""

    superuser: str
    owner: str
    application: str
    system: str


@pytest_asyncio.fixture
async def urls(stores: Stores, template: str) -> AsyncIterator[Urls]:
    """A database of this test only."""
    name = f"test_{ids.new_id().hex}"
    connection = await asyncpg.connect(stores.postgres.dsn(SUPERUSER, "postgres"))
    try:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} OWNER {OWNER}")
        yield Urls(*(stores.postgres.dsn(r, name) for r in (SUPERUSER, OWNER, APPLICATION, SYSTEM)))
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


@pytest_asyncio.fixture
async def database(urls: Urls) -> AsyncIterator[Database]:
    """The database as the application role."""
    pool = await open_pool(urls.application, size=10, name="test")
    yield Database(pool)
    await pool.close()


@pytest_asyncio.fixture
async def system_database(urls: Urls) -> AsyncIterator[SystemDatabase]:
    """The database as the system role."""
    pool = await open_pool(urls.system, size=10, name="test")
    yield SystemDatabase(pool)
    await pool.close()


@pytest_asyncio.fixture
async def owner(urls: Urls) -> AsyncIterator[asyncpg.Connection]:
    """A connection past row-level security, to look at what is really there."""
    connection = await asyncpg.connect(urls.superuser)
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def redis(stores: Stores) -> AsyncIterator[Redis]:
    """Valkey. Tests do not meet in it: their users are new."""
    client = open_cache(stores.valkey.url)
    yield client
    await client.aclose()


@pytest.fixture
def blobs(stores: Stores) -> Blobs:
    """The bucket of this test run."""
    return Blobs.open(
        endpoint=stores.s3.endpoint,
        access_key=stores.s3.access_key,
        secret_key=stores.s3.secret_key,
        region="us-east-1",
        secure=False,
        bucket=BUCKET,
    )


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = dt.datetime(2026, 5, 4, 12, tzinfo=dt.UTC)

    def __call__(self) -> dt.datetime:
        """Return the instant it stands at."""
        return self.now

    def advance(self, **duration: float) -> None:
        """Move it, by the arguments of timedelta."""
        self.now += dt.timedelta(**duration)


@pytest.fixture
def clock() -> FakeClock:
    """A clock that the test moves."""
    return FakeClock()


async def new_caller(database: Database, *, consenting: bool = True) -> Caller:
    """Return a user whom nobody met before."""
    caller = Caller(tenant_id=ids.new_id(), user_id=ids.new_id())
    if consenting:
        async with database.transaction(caller) as connection:
            await connection.execute(
                """
                INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
                VALUES ($1, $2, 'memory.store', 1, true)
                """,
                caller.tenant_id,
                caller.user_id,
            )
    return caller


@pytest_asyncio.fixture
async def caller(database: Database) -> Caller:
    """A user who consented to memory.store."""
    return await new_caller(database)


class PlainTokens:
    """Takes `bearer(caller)` for a token: real tokens are the subject of tests/auth."""

    async def verify(self, token: str) -> Caller:
        """Return whom the token names."""
        tenant, _, user = token.partition(".")
        try:
            return Caller(tenant_id=UUID(tenant), user_id=UUID(user))
        except ValueError as error:
            raise Unauthenticated("the access token is not valid") from error


def bearer(caller: Caller) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call by this user."""
    return (("authorization", f"Bearer {caller.tenant_id}.{caller.user_id}"),)


def as_worker(identity: str = WORKER_ID) -> tuple[tuple[str, str], ...]:
    """Return the metadata that the sidecar adds to a call by a workload."""
    return (("x-forwarded-client-cert", f"Hash=00;URI={identity}"),)


Register = Callable[[grpc.aio.Server], None]
Serve = Callable[[Register], Awaitable[grpc.aio.Channel]]


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve servicers through the real chain on a Unix socket; returns a channel to them."""
    directory = Path(mkdtemp(prefix="kimberly-"))
    running: list[tuple[Server, grpc.aio.Channel]] = []

    async def start(register: Register) -> grpc.aio.Channel:
        socket = directory / str(len(running))
        layers = chain(PlainTokens(), worker_id=WORKER_ID, unary_seconds=10, stream_seconds=60)
        server = Server(socket, layers, services=())
        register(server.grpc)
        await server.start()
        channel = grpc.aio.insecure_channel(f"unix:{socket}")
        running.append((server, channel))
        return channel

    yield start
    for server, channel in running:
        await channel.close(None)
        await server.grpc.stop(None)
