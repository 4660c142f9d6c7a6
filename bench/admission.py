"""python -m bench.admission: what a call pays for being known, counted and limited.

One service that does nothing is served by four chains beside each other: everybody is believed; the
token is checked, which was seen before; another one for every call; and the call is counted and
its user's limit kept besides. Of the calls one half writes and the other asks: either is counted,
and what was counted is added up in PostgreSQL meanwhile. The rounds alternate, so that
what else the machine does hits all four alike, and a figure is the median of the differences of the
rounds, with their spread.
"""

import asyncio
import logging
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

import grpc
import structlog
import typer
from joserfc.jwk import ECKey
from kimberly.memory.v1 import memory_pb2, memory_pb2_grpc

from bench.logging_in import OneKey
from bench.table import Markdown, Row, show
from local.layout import Layout
from local.mesh import Mesh
from local.postgres import SYSTEM
from server import ids
from server.access import Scope
from server.auth.access_tokens import Mint
from server.billing.plans import Usage
from server.billing.store import BillingStore
from server.billing.toll import Toll
from server.cache import open_cache
from server.caller import Caller, Credentials
from server.clock import utc_now
from server.database import SystemDatabase, open_pool
from server.metering import ledger
from server.rpc.interceptors import Gate, Verifier, chain
from server.rpc.serving import Server
from server.tokens import TokenVerifier

Stub: TypeAlias = "memory_pb2_grpc.MemoryServiceAsyncStub"

ROUNDS: Final = 40
CALLS: Final = 250
"""Of each chain in a round."""
WARM_UP: Final = 300
NAME: Final = "https://bench"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Measure. Let nothing else run meanwhile; it takes a minute."""
    # A line a call is not what is to be measured, and services do not write it either.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    rows = asyncio.run(_measure())
    show(rows, markdown=markdown)


class _Idle(memory_pb2_grpc.MemoryServiceServicer):
    """Does nothing, and says that it wrote what it was given."""

    async def CreateMemory(
        self, request: memory_pb2.CreateMemoryRequest, context: Any
    ) -> memory_pb2.CreateMemoryResponse:
        if noted := ledger():
            noted.committed(1)
        return memory_pb2.CreateMemoryResponse()

    async def QueryMemories(
        self, request: memory_pb2.QueryMemoriesRequest, context: Any
    ) -> memory_pb2.QueryMemoriesResponse:
        return memory_pb2.QueryMemoriesResponse()


class _Believing:
    """Believes everybody to be the same user."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def verify(self, token: str) -> Credentials:
        return self._credentials


async def _measure() -> list[Row]:
    key = ECKey.generate_key("P-256", auto_kid=True)
    caller = Caller(ids.new_id(), ids.new_id())
    believing = _Believing(_credentials(caller))
    verifier = TokenVerifier(OneKey(key), issuer=NAME, audience="bench", ended=())
    async with AsyncExitStack() as stack:
        state = Path(stack.enter_context(TemporaryDirectory(prefix="kimberly-bench-")))
        toll, billing = await stack.enter_async_context(_toll(state / "mesh"))
        chains: Mapping[str, tuple[Verifier, Gate | None]] = {
            "believed": (believing, None),
            "known": (verifier, None),
            "new": (verifier, None),
            "admitted": (verifier, toll),
        }
        stubs = {
            name: await stack.enter_async_context(_serving(state / name, *parts))
            for name, parts in chains.items()
        }
        times = await _alternate(stubs, caller, key)
        await toll.flush()
        (month,) = await billing.used(caller)
        _check(month.used)
    return [
        Row(
            "a call whose token nobody checks: p50",
            f"{statistics.median(times['believed']):.2f} ms",
        ),
        _added("the check of a token seen before adds", times["known"], times["believed"]),
        _added("the check of a token never seen adds", times["new"], times["believed"]),
        _added("metering and rate limits add", times["admitted"], times["known"]),
    ]


@asynccontextmanager
async def _toll(state: Path) -> AsyncIterator[tuple[Toll, BillingStore]]:
    """Run a mesh for its stores, and return what counts and limits calls by them, and where."""
    async with Mesh(Layout(state), workers=0) as mesh:
        await mesh.wait_ready()
        pool = await open_pool(mesh.stores.dsn(SYSTEM), size=2, name="bench")
        redis = open_cache(mesh.stores.valkey.url)
        billing = BillingStore(SystemDatabase(pool))
        toll = Toll(redis, billing, scale=50)
        flushing = asyncio.create_task(toll.run())
        yield toll, billing
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
        await redis.aclose()
        await pool.close()


@asynccontextmanager
async def _serving(directory: Path, verifier: Verifier, gate: Gate | None) -> AsyncIterator[Stub]:
    directory.mkdir(mode=0o700)
    layers = chain(verifier, worker_id="", unary_seconds=10, stream_seconds=10, gate=gate)
    server = Server(directory / "s", layers, services=())
    idle = _Idle()  # type: ignore[abstract] # two methods are called
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(idle, server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{directory / 's'}") as channel:
        yield memory_pb2_grpc.MemoryServiceStub(channel)
    await server.grpc.stop(None)


async def _alternate(
    stubs: Mapping[str, Stub], caller: Caller, key: ECKey
) -> dict[str, list[float]]:
    """Return the median of each chain in each round, in milliseconds."""
    medians: dict[str, list[float]] = {name: [] for name in stubs}
    same = _tokens(caller, key, 1) * CALLS
    for stub in stubs.values():
        await _call(stub, same, WARM_UP)
    for number in range(ROUNDS):
        names = list(stubs)
        # Whoever comes first in one round comes last in another.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            tokens = _tokens(caller, key, CALLS) if name == "new" else same
            medians[name].append(statistics.median(await _call(stubs[name], tokens, CALLS)))
    return medians


async def _call(stub: Stub, tokens: Sequence[str], calls: int) -> list[float]:
    taken = []
    write = memory_pb2.CreateMemoryRequest(memory=memory_pb2.Memory(content="tea, not coffee"))
    ask = memory_pb2.QueryMemoriesRequest(query="tea or coffee")
    for number in range(calls):
        metadata = (("authorization", f"Bearer {tokens[number % len(tokens)]}"),)
        started = time.perf_counter()
        if number % 2:
            await stub.QueryMemories(ask, metadata=metadata)
        else:
            await stub.CreateMemory(write, metadata=metadata)
        taken.append((time.perf_counter() - started) * 1000)
    return taken


def _check(used: Usage) -> None:
    """Make sure that the calls of one chain were counted, and of no other.

    Raises:
        RuntimeError: Others were, or too few: what was measured is not metering.
    """
    expected = (WARM_UP + ROUNDS * CALLS) // 2
    if (used.writes, used.queries) != (expected, expected):
        raise RuntimeError(f"{expected} writes and as many queries, and counted were {used}")


def _tokens(caller: Caller, key: ECKey, count: int) -> list[str]:
    mint, now = Mint(NAME, "bench", timedelta(minutes=10)), utc_now()
    return [mint.make(_credentials(caller), key, now, now + mint.lifetime) for _ in range(count)]


def _credentials(caller: Caller) -> Credentials:
    return Credentials(caller, ids.SESSION, ids.new_id(), frozenset({Scope.USER.value}))


def _added(what: str, one: Sequence[float], other: Sequence[float]) -> Row:
    """Return by how much rounds of one chain took longer than those of another."""
    differences = sorted(a - b for a, b in zip(one, other, strict=True))
    low, high = differences[len(differences) // 10], differences[-len(differences) // 10]
    middle = statistics.median(differences)
    spread = f"{ROUNDS} rounds: 8 in 10 between {low:+.3f} and {high:+.3f} ms; goal: 0.3 ms"
    return Row(what, f"{middle:+.3f} ms p50", spread)


if __name__ == "__main__":
    app()
