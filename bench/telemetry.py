"""python -m bench.telemetry: what telemetry costs queries.

Two meshes stand side by side, one with everything on: traces to a collector in a process of its
own, and a scrape of every process each few seconds. They are asked in turns, so that both meet the
same machine. What that gives differs by a tenth from one second to the next: rounds are short and
many, and the ratio is that of all of them together, with the interval that resampling pairs gives.
"""

import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from kimberly.client import connect
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from bench.measure import rate
from bench.pace import pace
from bench.spending import CLIENT, cpu_seconds
from bench.table import Markdown, Row, show
from bench.telling import address, bare_stub
from local import demo
from local.layout import Layout
from local.mesh import Mesh
from server import metrics

_AT_ONCE = 32
_SECONDS = 0.5
_SCRAPE_SECONDS = 15.0
_CHUNK = 200
_QUESTION = "Which allergy does the niece have?"
_OBSERVATIONS = 100_000
_RESAMPLES = 2_000

Ask = Callable[[], Awaitable[None]]
Figures = np.ndarray[Any, np.dtype[np.float64]]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=2, help="Of each mesh.")] = 80,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Part of calls traced.")] = 0.05,
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Compare queries a second with and without telemetry. Let nothing else run meanwhile."""
    rows = asyncio.run(_measure(rounds, ratio))
    show(rows, markdown=markdown)


async def _measure(rounds: int, ratio: float) -> list[Row]:
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        async with AsyncExitStack() as stack:
            port = await stack.enter_async_context(_collector())
            told = {
                "KIMBERLY_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
                "KIMBERLY_TRACE_RATIO": str(ratio),
            }
            off = await stack.enter_async_context(_mesh(Path(directory) / "off", {}))
            on = await stack.enter_async_context(_mesh(Path(directory) / "on", told))
            askers = [await stack.enter_async_context(_asker(mesh)) for mesh in (off, on)]
            scraping = asyncio.create_task(_scrape(on))
            before = pace()
            rates, cpu = await _in_turns(askers, [off, on], rounds)
            scraping.cancel()
            return [before, *_rows(rates, cpu, ratio), _observation(), pace()]


@asynccontextmanager
async def _mesh(state: Path, told: Mapping[str, str]) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        with _environment(told):
            mesh = await stack.enter_async_context(Mesh(Layout(state), workers=1))
            await mesh.wait_ready()
        yield mesh


@contextmanager
def _environment(told: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]


@asynccontextmanager
async def _asker(mesh: Mesh) -> AsyncIterator[Ask]:
    """Return what asks a mesh a question that no cache knows, as a user with a conversation."""
    async with connect(address(mesh), mesh.ca) as client, bare_stub(mesh) as stub:
        await client.sign_up("bench@example.com", os.urandom(12).hex())
        await client.users.RecordConsent(
            users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=True)
        )
        memories = demo.to_memories(demo.read_transcript(demo.SAMPLE))
        await client.memory.ImportMemories(_chunks(memories))
        metadata = (("authorization", f"Bearer {client.access_token}"),)
        numbers = itertools.count()

        async def ask() -> None:
            request = memory.QueryMemoriesRequest(query=f"{_QUESTION} zq{next(numbers)}zq")
            await stub.QueryMemories(request, metadata=metadata)

        yield ask


async def _chunks(memories: list[memory.Memory]) -> AsyncIterator[memory.ImportMemoriesRequest]:
    for start in range(0, len(memories), _CHUNK):
        yield memory.ImportMemoriesRequest(memories=memories[start : start + _CHUNK])


async def _in_turns(askers: list[Ask], meshes: list[Mesh], rounds: int) -> tuple[Figures, Figures]:
    """Return queries a second, and CPU milliseconds of the mesh a query, by round and mesh.

    After a round that does not count. Each mesh begins as often as the other.
    """
    rates, cpu = np.empty((rounds + 1, 2)), np.empty((rounds + 1, 2))
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            used, started = _cpu_seconds(meshes[which]), time.perf_counter()
            rates[number, which] = await rate(askers[which], seconds=_SECONDS, at_once=_AT_ONCE)
            queries = rates[number, which] * (time.perf_counter() - started)
            cpu[number, which] = (_cpu_seconds(meshes[which]) - used) * 1000 / queries
    return rates[1:], cpu[1:]


def _cpu_seconds(mesh: Mesh) -> float:
    spent = cpu_seconds(mesh)
    return float(spent.total() - spent[CLIENT])


def _rows(rates: Figures, cpu: Figures, ratio: float) -> list[Row]:
    off, on = rates.mean(axis=0)
    cpu_off, cpu_on = cpu.mean(axis=0)
    return [
        Row(f"query, {_AT_ONCE} at once, telemetry off", f"{off:.0f}/s"),
        Row(f"query, {_AT_ONCE} at once, {ratio:.0%} traced, scraped", f"{on:.0f}/s"),
        Row(
            f"queries a second, on against off, {len(rates)} pairs",
            _ratio(rates),
            "goal: at least 0.95",
        ),
        Row("CPU of the mesh a query, off / on", f"{cpu_off:.2f} / {cpu_on:.2f} ms"),
        Row("CPU a query, on against off", _ratio(cpu)),
    ]


def _ratio(pairs: Figures) -> str:
    """Return the ratio of the means, with the interval that holds it nine times in ten."""
    chosen = np.random.default_rng(0).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    off, on = np.moveaxis(pairs[chosen].mean(axis=1), -1, 0)
    low, high = np.percentile(on / off, [5, 95])
    return f"{pairs[:, 1].mean() / pairs[:, 0].mean():.3f} ({low:.3f} to {high:.3f})"


def _observation() -> Row:
    """Return what the instruments around each call cost, telemetry on or off."""
    started = time.perf_counter()
    for _ in range(_OBSERVATIONS):
        metrics.RPCS_IN_FLIGHT.inc()
        metrics.RPCS_IN_FLIGHT.dec()
        metrics.rpc_seconds("/kimberly.Bench/Observe", "OK").observe(0.004)
    taken = (time.perf_counter() - started) / _OBSERVATIONS
    return Row("instruments around one call", f"{taken * 1e6:.1f} µs", "goal: 15 µs")


async def _scrape(mesh: Mesh) -> None:
    """Ask all processes what they measure, as Prometheus does."""
    urls = [url for each in mesh.describe()["metrics"].values() for url in each]
    async with httpx.AsyncClient(timeout=5) as client:
        while True:
            for url in urls:
                (await client.get(url)).raise_for_status()
            await asyncio.sleep(_SCRAPE_SECONDS)


# --- the collector -----------------------------------------------------------------------------


@asynccontextmanager
async def _collector() -> AsyncIterator[int]:
    """Run a collector that throws away what comes, and return its port."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.collector"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    if process.stdin is None or process.stdout is None:
        raise TypeError("the collector has no pipes")
    try:
        yield int(await process.stdout.readline())
    finally:
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    app()
