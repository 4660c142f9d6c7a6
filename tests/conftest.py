"""Real stores for every test: started once, one cloned database a test."""

import asyncio
import datetime as dt
import functools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from uuid import UUID

import asyncpg
import grpc
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from local.layout import Layout
from local.postgres import APPLICATION, OWNER, SUPERUSER, SYSTEM
from local.servers import BUCKET, Stores
from server import ids
from server.access import EDGE, WORKER, Role, Scope, spiffe_id
from server.blobs import Blobs
from server.cache import Redis, open_cache
from server.caller import ActingAgent, Caller, Credentials
from server.data_keys import DataKeys
from server.database import Database, SystemDatabase, open_pool
from server.errors import Unauthenticated
from server.kms import Kms
from server.kms.local import LocalKms
from server.migrate import migrate, read_migrations
from server.rpc.interceptors import Gate, chain
from server.rpc.serving import Server
from tests import shipped_models as shipped
from tests.canaries import (
    overheard,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_sessionstart,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from tests.deciding import write_decision
from tests.kms.key_files import key_file
from tests.unhurried import PATIENT_SECONDS, unhurry

__all__ = [
    "pytest_runtest_logreport",
    "pytest_sessionfinish",
    "pytest_sessionstart",
    "pytest_terminal_summary",
    "pytest_testnodedown",
]

WITH_A_MESH = ("abuse", "deploy", "e2e", "telemetry")
"""A process starts one mesh at a time: of the watchers of files that Linux gives a user, 128, each
Envoy takes four."""
DATABASE = "test"
MASTER_KEY = bytes(range(32))
WORKER_ID = spiffe_id("kimberly.local", "test", WORKER)
EDGE_ID = spiffe_id("kimberly.local", "test", EDGE)

# An example that takes long, or is long in being made, tells of the machine.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def group_of(nodeid: str) -> str:
    """Return what stays together with a test: its file, or the directory that shares a mesh."""
    file = nodeid.partition("::")[0]
    directory = file.split("/")[1]
    return directory if directory in WITH_A_MESH else file


class Together(LoadScopeScheduling):  # type: ignore[misc] # it is untyped
    """Gives each group to one process.

    Marks would say so too, but of xdist 3.8 pytest 9.2 hears none: every test is a group of its
    own, and its neighbours run in another process, beside another mesh.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together:
    """Say which tests stay together where processes share them."""
    return Together(config, log)


@pytest.fixture(scope="session", autouse=True)
def unhurried() -> Iterator[None]:
    """Have nobody refused because a busy machine made others wait longer than they should."""
    with pytest.MonkeyPatch.context() as patch:
        unhurry(
            patch,
            "server.jobs.queue.ACQUIRE_SECONDS",
            "server.kms.vault._ALL_TRIES_SECONDS",
            "server.kms.vault._TRY_SECONDS",
            "server.memory.objects._PATIENCE_SECONDS",
            "server.users.checkpoint_archive._READ_SECONDS",
        )
        yield


@pytest_asyncio.fixture(scope="session")
async def stores(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stores]:
    """PostgreSQL, Valkey and an S3 server of this test run."""
    async with Stores(Layout(tmp_path_factory.mktemp("stores")), durable=False) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Urls:
    """How the roles reach the database of the tests."""

    superuser: str
    owner: str
    application: str
    system: str


@pytest_asyncio.fixture(scope="session")
async def migrated(stores: Stores) -> Urls:
    """The database of all tests."""
    await stores.postgres.provision(DATABASE)
    urls = Urls(
        *(stores.postgres.dsn(role, DATABASE) for role in (SUPERUSER, OWNER, APPLICATION, SYSTEM))
    )
    connection = await asyncpg.connect(urls.owner)
    try:
        await migrate(connection, read_migrations())
    finally:
        await connection.close()
    return urls


@pytest_asyncio.fixture(scope="session")
async def emptying(migrated: Urls) -> str:
    """The SQL that removes every row that the migrations did not insert."""
    connection = await asyncpg.connect(migrated.superuser)
    try:
        tables = await connection.fetch(
            "SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'"
        )
        empty = [
            table["name"]
            for table in tables
            if not await connection.fetchval(f'SELECT true FROM "{table["name"]}" LIMIT 1')
        ]
    finally:
        await connection.close()
    # As a replica, so that neither foreign keys nor append-only triggers object. Statistics say at
    # once what was read for it: a test that asks them asks for what it read itself.
    deletions = "".join(f'DELETE FROM "{name}";' for name in empty)
    return f"SET session_replication_role = replica; {deletions} SELECT pg_stat_force_next_flush()"


class Connections:
    """Connections that outlive a test: a new one reads the catalog for longer than many tests run.

    What a test closed is opened anew for the next one.
    """

    def __init__(self) -> None:
        self._pools: dict[str, asyncpg.Pool] = {}
        self._alone: dict[str, asyncpg.Connection] = {}

    @asynccontextmanager
    async def pool(self, url: str) -> AsyncIterator[asyncpg.Pool]:
        """Lend a pool, until whatever a test began with it has ended."""
        pool = self._pools.get(url)
        if pool is None or pool.is_closing():
            pool = self._pools[url] = await open_pool(url, size=10, name="test")
        yield pool
        async with asyncio.timeout(30):
            while pool.get_idle_size() < pool.get_size():  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.001)

    @asynccontextmanager
    async def one(self, url: str, name: str) -> AsyncIterator[asyncpg.Connection]:
        """Lend the connection of this name, and take back what a test set in it."""
        connection = self._alone.get(name)
        if connection is None or connection.is_closed():
            connection = self._alone[name] = await asyncpg.connect(url)
        yield connection
        await connection.reset()

    async def close(self) -> None:
        """Hang up all of them: a server that is about to stop need not agree."""
        for opened in (*self._pools.values(), *self._alone.values()):
            opened.terminate()
        await asyncio.sleep(0)  # the event loop takes note


@pytest_asyncio.fixture(scope="session")
async def connections() -> AsyncIterator[Connections]:
    """Connections of all tests to their database."""
    lasting = Connections()
    yield lasting
    await lasting.close()


@pytest_asyncio.fixture
async def urls(migrated: Urls, emptying: str, connections: Connections) -> Urls:
    """An empty database. Emptying one takes a millisecond where cloning one takes 300."""
    async with connections.one(migrated.superuser, "emptying") as connection:
        await connection.execute(emptying)
    return migrated


@pytest_asyncio.fixture
async def database(urls: Urls, connections: Connections) -> AsyncIterator[Database]:
    """The database as the application role."""
    async with connections.pool(urls.application) as pool:
        yield Database(pool)


@pytest_asyncio.fixture
async def system_database(urls: Urls, connections: Connections) -> AsyncIterator[SystemDatabase]:
    """The database as the system role."""
    async with connections.pool(urls.system) as pool:
        yield SystemDatabase(pool)


@pytest_asyncio.fixture
async def owner(urls: Urls, connections: Connections) -> AsyncIterator[asyncpg.Connection]:
    """A connection past row-level security, to look at what is really there."""
    async with connections.one(urls.superuser, "owner") as connection:
        yield connection


@pytest_asyncio.fixture
async def redis(stores: Stores) -> AsyncIterator[Redis]:
    """Valkey. Tests do not meet in it: their users are new."""
    client = open_cache(stores.valkey.url)
    yield client
    await client.aclose()


@pytest.fixture
def blobs(stores: Stores) -> Blobs:
    """The bucket of this test run."""
    return open_bucket(stores)


def open_bucket(stores: Stores, name: str = BUCKET) -> Blobs:
    """Open a bucket of some stores."""
    return Blobs.open(
        endpoint=stores.s3.endpoint,
        access_key=stores.s3.access_key,
        secret_key=stores.s3.secret_key,
        region="us-east-1",
        secure=False,
        bucket=name,
    )


@pytest.fixture(scope="session")
def shipped_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of embedding models, as workers and services are given one."""
    return shipped.put(tmp_path_factory.mktemp("models"))


@pytest.fixture
def master_key(tmp_path: Path) -> Path:
    """The file of the master key."""
    return key_file(tmp_path / "master.key", MASTER_KEY)


def data_keys_of(database: Database) -> DataKeys:
    """Return users' data keys, wrapped by the key of `master_key`, as another process has them."""
    return DataKeys(database, _local_kms())


@functools.cache
def _local_kms() -> Kms:
    with TemporaryDirectory() as directory:
        return LocalKms(key_file(Path(directory) / "master.key", MASTER_KEY))


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
        await write_decision(database, caller, "memory.store", granted=True)
    return caller


@pytest_asyncio.fixture
async def caller(database: Database) -> Caller:
    """A user who consented to memory.store."""
    return await new_caller(database)


class PlainTokens:
    """Takes `bearer(caller)` for a token: real tokens are the subject of tests/auth."""

    async def verify(self, token: str) -> Credentials:
        """Return what the token says."""
        try:
            tenant, user, grant, role, scope, acting = token.split("/")
            scopes = frozenset(scope.split())
            agent = ActingAgent(UUID(acting), Scope.MEMORY_SENSITIVE in scopes) if acting else None
            caller = Caller(tenant_id=UUID(tenant), user_id=UUID(user), agent=agent)
            return Credentials(caller, ids.SESSION, UUID(grant), scopes, role)
        except ValueError as error:
            raise Unauthenticated("the access token is not valid") from error


def bearer(
    caller: Caller,
    *,
    scope: str = Scope.USER,
    role: str = Role.OWNER,
    grant_id: UUID | None = None,
) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call by this user, or by the agent that acts for them."""
    grant = grant_id or caller.user_id
    acting = caller.agent.id if caller.agent else ""
    token = f"{caller.tenant_id}/{caller.user_id}/{grant}/{role}/{scope}/{acting}"
    return (("authorization", f"Bearer {token}"),)


def as_worker(identity: str = WORKER_ID) -> tuple[tuple[str, str], ...]:
    """Return the metadata that the sidecar adds to a call by a workload."""
    return (("x-forwarded-client-cert", f"Hash=00;URI={identity}"),)


def through_edge(address: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call that the edge took from an address."""
    return (*as_worker(EDGE_ID), ("x-forwarded-for", address))


Register = Callable[[grpc.aio.Server], None]
Serve = Callable[[Register], Awaitable[grpc.aio.Channel]]


@pytest.fixture
def gate() -> Gate | None:
    """What admits calls of users and counts them; a test that is about that says otherwise."""
    return None


@pytest_asyncio.fixture
async def serve(gate: Gate | None) -> AsyncIterator[Serve]:
    """Serve servicers through the real chain on a Unix socket; returns a channel to them."""
    directory = Path(mkdtemp(prefix="kimberly-"))
    running: list[tuple[Server, grpc.aio.Channel]] = []

    async def start(register: Register) -> grpc.aio.Channel:
        socket = directory / str(len(running))
        layers = chain(
            PlainTokens(),
            worker_id=WORKER_ID,
            edge_id=EDGE_ID,
            unary_seconds=PATIENT_SECONDS,
            stream_seconds=60,
            gate=gate,
        )
        server = Server(socket, layers, services=())
        register(server.grpc)
        await server.start()
        channel = overheard(grpc.aio.insecure_channel(f"unix:{socket}"))
        running.append((server, channel))
        return channel

    yield start
    for server, channel in running:
        await channel.close(None)
        await server.grpc.stop(None)
    shutil.rmtree(directory)
