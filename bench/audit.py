"""python -m bench.audit: whether writers of one tenant wait for each other at the audit log.

Every write appends its event in its own transaction, and the sealer chains the events of a tenant
one after the other. Were writers part of that order, sixteen of one tenant would be slower than
sixteen tenants with one writer each.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import asyncpg
import grpc
import typer
from kimberly.client import connect
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.memory.v1 import memory_pb2_grpc
from kimberly.users.v1 import users_pb2 as users
from rich.console import Console

from bench.measure import rate
from bench.table import Markdown, Row, show
from local.layout import Layout
from local.mesh import Mesh
from local.postgres import APPLICATION, SYSTEM
from server import audit, ids
from server.caller import Caller
from server.database import Database, open_pool

WRITERS = 16
_WARM_UP_SECONDS = 1.0
_WAITING_EVENTS = 50_000
_POLL_SECONDS = 0.02

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Written:
    """What writers got done, and what the sealer did beside them."""

    per_second: float
    chained_per_second: float
    seconds_behind: float
    """How long after the last write its event was chained."""


class Log:
    """The audit log as the system role sees it."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def chained(self) -> int:
        """Return how many events are chained."""
        return int(await self._connection.fetchval("SELECT sum(position) FROM audit_heads") or 0)

    async def caught_up(self) -> int:
        """Wait until all events are chained; return how many they are."""
        events = int(await self._connection.fetchval("SELECT count(*) FROM audit_events"))
        while await self.chained() < events:  # noqa: ASYNC110 - another process chains them
            await asyncio.sleep(_POLL_SECONDS)
        return events

    async def append(self, events: int) -> None:
        """Append many events of one tenant at once."""
        await self._connection.execute(
            """
            INSERT INTO audit_events (id, tenant_id, user_id, actor, action, resource)
            SELECT uuidv7(), $1, $1, 'usr_bench', 'memory.create', 'mem_' || number
              FROM generate_series(1, $2) AS number
            """,
            ids.new_id(),
            events,
        )


@app.command()
def main(
    seconds: Annotated[float, typer.Option(help="How long each kind of writers writes.")] = 5.0,
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Measure durable writes with the audit log on. Let nothing else run meanwhile."""
    console = Console()
    with console.status("measuring …"):
        rows = asyncio.run(_measure(seconds))
    show(rows, markdown=markdown)


async def _measure(seconds: float) -> list[Row]:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(TemporaryDirectory(prefix="kimberly-bench-"))
        mesh = await stack.enter_async_context(Mesh(Layout(Path(directory))))
        await mesh.wait_ready()
        log = await stack.enter_async_context(_log(mesh))
        stub = await stack.enter_async_context(_stub(mesh))
        tokens = [await _sign_up(mesh, stack) for _ in range(WRITERS)]
        await _write(stub, log, tokens, _WARM_UP_SECONDS)
        many = await _write(stub, log, tokens, seconds)
        one = await _write(stub, log, tokens[:1] * WRITERS, seconds)
        return [
            *_rows(one, many),
            *await _appends(mesh, seconds),
            await _sealer_alone(log),
        ]


def _rows(one: Written, many: Written) -> list[Row]:
    return [
        Row(f"durable writes, {WRITERS} tenants of one writer", f"{many.per_second:.0f}/s"),
        Row(
            f"durable writes, one tenant of {WRITERS} writers",
            f"{one.per_second:.0f}/s",
            f"{one.per_second / many.per_second:.0%} of the line above",
        ),
        Row(
            "events chained beside them",
            f"{one.chained_per_second:.0f}/s",
            f"{many.chained_per_second:.0f}/s of {WRITERS} tenants",
        ),
        Row(
            "last event chained after",
            f"{one.seconds_behind:.1f} s",
            f"{many.seconds_behind:.1f} s of {WRITERS} tenants; sealed every second",
        ),
    ]


async def _write(
    stub: "memory_pb2_grpc.MemoryServiceAsyncStub", log: Log, tokens: Sequence[str], seconds: float
) -> Written:
    """Let one writer a token write without a pause."""

    async def write_as(token: str) -> float:
        metadata = (("authorization", f"Bearer {token}"),)

        async def write() -> None:
            draft = memory.Memory(content=f"Tea with milk at four, {secrets.token_hex(4)}")
            await stub.CreateMemory(memory.CreateMemoryRequest(memory=draft), metadata=metadata)

        return await rate(write, seconds=seconds, at_once=1)

    before = await log.caught_up()
    began = time.perf_counter()
    rates = await asyncio.gather(*(write_as(token) for token in tokens))
    chained, lasted = await log.chained() - before, time.perf_counter() - began
    ended = time.perf_counter()
    await log.caught_up()
    return Written(sum(rates), chained / lasted, time.perf_counter() - ended)


async def _appends(mesh: Mesh, seconds: float) -> list[Row]:
    """Measure transactions of one event and nothing else: only the audit log could slow them."""
    pool = await open_pool(mesh.stores.dsn(APPLICATION), size=WRITERS, name="bench")
    database = Database(pool)

    async def append_as(caller: Caller) -> float:
        async def append() -> None:
            async with database.transaction(caller) as connection:
                await audit.record(connection, caller, "memory.create", "mem_bench")

        return await rate(append, seconds=seconds, at_once=1)

    callers = [Caller(tenant_id=ids.new_id(), user_id=ids.new_id()) for _ in range(WRITERS)]
    many = sum(await asyncio.gather(*map(append_as, callers)))
    one = sum(await asyncio.gather(*map(append_as, callers[:1] * WRITERS)))
    await pool.close()
    return [
        Row(f"bare audit events, {WRITERS} tenants of one writer", f"{many:.0f}/s"),
        Row(
            f"bare audit events, one tenant of {WRITERS} writers",
            f"{one:.0f}/s",
            f"{one / many:.0%} of the line above",
        ),
    ]


async def _sealer_alone(log: Log) -> Row:
    """Measure how fast events are chained that all wait already."""
    await log.append(_WAITING_EVENTS)
    before = await log.chained()
    began = time.perf_counter()
    chained = await log.caught_up() - before
    per_second = chained / (time.perf_counter() - began)
    return Row("events chained when many wait", f"{per_second:.0f}/s", "one tenant, one sealer")


async def _sign_up(mesh: Mesh, stack: AsyncExitStack) -> str:
    client = await stack.enter_async_context(connect(_address(mesh), mesh.ca))
    await client.sign_up(f"bench-{secrets.token_hex(6)}@example.com", secrets.token_hex(12))
    await client.users.RecordConsent(
        users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=True)
    )
    return client.access_token


@asynccontextmanager
async def _log(mesh: Mesh) -> AsyncIterator[Log]:
    connection = await asyncpg.connect(mesh.stores.dsn(SYSTEM))
    try:
        yield Log(connection)
    finally:
        await connection.close()


@asynccontextmanager
async def _stub(mesh: Mesh) -> AsyncIterator["memory_pb2_grpc.MemoryServiceAsyncStub"]:
    credentials = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    async with grpc.aio.secure_channel(_address(mesh), credentials) as channel:
        yield memory_pb2_grpc.MemoryServiceStub(channel)


def _address(mesh: Mesh) -> str:
    return mesh.edge.removeprefix("https://")


if __name__ == "__main__":
    app()
