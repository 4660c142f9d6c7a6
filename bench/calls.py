"""One read, one durable write, one query: through TLS, edge, JWT, mTLS, sidecar, audit."""

import itertools
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import grpc
from kimberly.client import Client, connect
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.memory.v1 import memory_pb2_grpc
from kimberly.users.v1 import users_pb2 as users

from bench import echo
from bench.measure import latency, rate
from bench.table import Row
from local import demo
from local.mesh import Mesh

_CALLS = 2_000
_SECONDS = 5.0
_AT_ONCE = 32
_CHUNK = 200
_QUESTION = "Which allergy does the niece have?"


async def run(mesh: Mesh) -> list[Row]:
    """Measure against a running mesh, with a user who has the sample conversation."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_user(mesh)) for _ in range(_AT_ONCE)]
        stub = await stack.enter_async_context(_bare_stub(mesh))
        users_metadata = [(("authorization", f"Bearer {c.access_token}"),) for c in clients]
        memories = demo.to_memories(demo.read_transcript(demo.SAMPLE))
        await clients[0].memory.ImportMemories(_chunks(memories))
        return [
            *await _reads(stub, users_metadata[0]),
            *await _queries(stub, users_metadata[0]),
            *await _writes(stub, users_metadata),
        ]


Stub: TypeAlias = "memory_pb2_grpc.MemoryServiceAsyncStub"
Metadata = tuple[tuple[str, str], ...]


@asynccontextmanager
async def _user(mesh: Mesh) -> AsyncIterator[Client]:
    async with connect(mesh.edge.removeprefix("https://"), mesh.ca) as client:
        await client.sign_up(f"bench-{secrets.token_hex(6)}@example.com", secrets.token_hex(12))
        await client.users.RecordConsent(
            users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=True)
        )
        yield client


@asynccontextmanager
async def _bare_stub(mesh: Mesh) -> AsyncIterator[Stub]:
    """Open a channel that does nothing but call: the yardstick's client does no more either."""
    credentials = _credentials(mesh.ca)
    async with grpc.aio.secure_channel(mesh.edge.removeprefix("https://"), credentials) as channel:
        yield memory_pb2_grpc.MemoryServiceStub(channel)


def _credentials(ca: Path) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(ca.read_bytes())


async def _chunks(memories: list[memory.Memory]) -> AsyncIterator[memory.ImportMemoriesRequest]:
    for start in range(0, len(memories), _CHUNK):
        yield memory.ImportMemoriesRequest(memories=memories[start : start + _CHUNK])


async def _reads(stub: Stub, metadata: Metadata) -> list[Row]:
    page = await stub.ListMemories(memory.ListMemoriesRequest(page_size=1), metadata=metadata)
    request = memory.GetMemoryRequest(id=page.memories[0].id)
    answer = await stub.GetMemory(request, metadata=metadata)
    async with echo.running(answer) as bare:
        bare_latency = await latency(lambda: bare.GetMemory(request), calls=_CALLS)
        bare_rate = await rate(lambda: bare.GetMemory(request), seconds=_SECONDS, at_once=_AT_ONCE)
    ours_latency = await latency(lambda: stub.GetMemory(request, metadata=metadata), calls=_CALLS)
    ours_rate = await rate(
        lambda: stub.GetMemory(request, metadata=metadata), seconds=_SECONDS, at_once=_AT_ONCE
    )
    return [
        Row("bare grpc.aio echo, p50 / p99", str(bare_latency)),
        Row(f"bare grpc.aio echo, {_AT_ONCE} at once", f"{bare_rate:.0f}/s"),
        Row("GetMemory, p50 / p99", str(ours_latency)),
        Row(
            f"GetMemory, {_AT_ONCE} at once",
            f"{ours_rate:.0f}/s",
            f"{ours_rate / bare_rate:.0%} of the echo",
        ),
    ]


async def _writes(stub: Stub, users_metadata: Sequence[Metadata]) -> list[Row]:
    numbers = itertools.count()
    writers = itertools.cycle(users_metadata)

    async def write(metadata: Metadata = users_metadata[0]) -> None:
        draft = memory.Memory(content=f"Number {next(numbers)} likes tea with milk at four")
        await stub.CreateMemory(memory.CreateMemoryRequest(memory=draft), metadata=metadata)

    taken = await latency(write, calls=_CALLS)
    many = await rate(lambda: write(next(writers)), seconds=_SECONDS, at_once=_AT_ONCE)
    # What a user keeps is counted to the byte: their own writes commit one after the other.
    of_one = await rate(write, seconds=_SECONDS, at_once=_AT_ONCE)
    return [
        Row("durable write, p50 / p99", str(taken), "goal: p50 4 ms"),
        Row(f"durable write, {_AT_ONCE} at once", f"{many:.0f}/s", "goal: 800/s"),
        Row(f"durable write, {_AT_ONCE} at once, all of one user", f"{of_one:.0f}/s"),
    ]


async def _queries(stub: Stub, metadata: Metadata) -> list[Row]:
    numbers = itertools.count()

    async def ask_anew() -> None:
        # A word that nobody said costs next to nothing, but no cache knows the question.
        request = memory.QueryMemoriesRequest(query=f"{_QUESTION} zq{next(numbers)}zq")
        await stub.QueryMemories(request, metadata=metadata)

    async def ask_again() -> None:
        request = memory.QueryMemoriesRequest(query=_QUESTION)
        await stub.QueryMemories(request, metadata=metadata)

    taken = await latency(ask_anew, calls=_CALLS)
    many = await rate(ask_anew, seconds=_SECONDS, at_once=_AT_ONCE)
    again = await latency(ask_again, calls=_CALLS)
    return [
        Row("query, p50 / p99", str(taken), "goal: p50 4 ms, p99 15 ms"),
        Row(f"query, {_AT_ONCE} at once", f"{many:.0f}/s"),
        Row("the same query again, p50 / p99", str(again), "from the cache"),
    ]
