"""python -m bench.jobs: how fast jobs are enqueued, begun and done, others beside it."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final

import asyncpg
import numpy as np
import typer

from bench.measure import Latency, latency
from bench.peers import beside
from bench.peers.beside import PeerError
from bench.progress import notices
from bench.table import Markdown, Row, show
from local.layout import CHECKOUT, Layout
from local.mesh import Mesh
from local.postgres import APPLICATION, DATABASE, SUPERUSER, SYSTEM
from server import ids
from server.access import WORKER, spiffe_id
from server.caller import Caller
from server.database import Database, SystemDatabase, open_pool
from server.enqueue import NewJob, enqueue, enqueue_all
from server.jobs.queue import LEASE, PLANS_OF_QUEUE

NOOP: Final = "bench.noop"
CLOCK: Final = "bench.clock"
BACKLOG: Final = "bench.backlog"
CONCURRENCY: Final = 1000
"""How many jobs our worker has in hand at once; peers take as many at a time."""
WAYS: Final = ("at the service's socket", "behind two sidecars")
"""Where our worker is."""
PEERS: Final = {"procrastinate_queue": 5_000, "pgqueuer_queue": 1_000_000}
"""How many jobs each does at most in a round; its database has the same name."""
_BATCH: Final = 1000
_POLL_SECONDS: Final = 0.005
_LEASED: Final = 100
_USERS: Final = 1000

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    jobs: Annotated[int, typer.Option(min=1000, help="How many jobs are done.")] = 50_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often, in turn with the others.")] = 5,
    backlog: Annotated[int, typer.Option(min=1000, help="How many wait at the end.")] = 1_000_000,
    peers: Annotated[
        Path, typer.Option(help="The environment that the peers are installed in.")
    ] = beside.HOME,
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Measure the queue of a mesh of its own, and other queues on the same Postgres.

    Done: jobs whose handler returns at once, by one worker process, each leased and settled by
    commits that are on disk. The worker is that of the mesh, on the stream that workers have. Once
    it is at the socket of the jobs service, which is what peers, who run within the worker's
    process, can be held against; once it is where workers are, behind two sidecars with mTLS.
    All take turns, round after round; what is said of many rounds is the median.

    Let nothing else run meanwhile; it takes three minutes.
    """
    rows = asyncio.run(_measure(jobs, rounds, backlog, peers / "bin" / "python"))
    show(rows, markdown=markdown)


async def _measure(jobs: int, rounds: int, backlog: int, python: Path) -> list[Row]:
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        async with (
            Mesh(Layout(Path(directory)), workers=1) as mesh,
            AsyncExitStack() as stack,
        ):
            await mesh.wait_ready()
            ours = await stack.enter_async_context(opened(mesh))
            peers = [
                peer
                for module, some in PEERS.items()
                if (peer := await _peer(stack, mesh, module, python, min(jobs, some)))
            ]
            rates = await _take_turns([*ours.ways(jobs), *(peer.do_all for peer in peers)], rounds)
            rows = _done([*WAYS, *(peer.name for peer in peers)], rates)
            rows += await ours.measure(jobs)
            for peer in peers:
                rows += await peer.measure()
            return rows + await ours.among(backlog)


async def _take_turns(
    do_all: Sequence[Callable[[], Awaitable[float]]], rounds: int
) -> list[list[float]]:
    """Return how many jobs a second each has done, round by round."""
    rates = [[await each() for each in do_all] for _ in range(rounds)]
    return [list(own) for own in zip(*rates, strict=True)]


def _done(names: Sequence[str], rates: Sequence[Sequence[float]]) -> list[Row]:
    """Show the medians, and those of what each is to the fastest peer in the same round."""
    best = max(rates[len(WAYS) :], key=median, default=None)
    rows = []
    for number, (name, own) in enumerate(zip(names, rates, strict=True)):
        note = f"median of {len(own)}: {min(own):,.0f} to {max(own):,.0f}"
        if best and number < len(WAYS):
            times = sorted(mine / others for mine, others in zip(own, best, strict=True))
            peer = names[rates.index(best)]
            note += f"; {median(times):.2f} times {peer} ({times[0]:.2f} to {times[-1]:.2f})"
        rows.append(Row(f"jobs done, {name}", f"{median(own):,.0f}/s", note))
    return rows


@asynccontextmanager
async def opened(mesh: Mesh) -> AsyncIterator["Ours"]:
    """Open the queue of a mesh."""
    async with (
        await open_pool(mesh.stores.dsn(APPLICATION), size=4, name="bench") as pool,
        # As the queue's own: looking is to cost nothing, however many jobs have been done.
        await open_pool(
            mesh.stores.dsn(SYSTEM), size=2, name="bench", settings=PLANS_OF_QUEUE
        ) as system,
    ):
        yield Ours(mesh, Database(pool), SystemDatabase(system))


class Ours:
    """The queue of the mesh."""

    def __init__(self, mesh: Mesh, database: Database, watched: SystemDatabase) -> None:
        self._mesh = mesh
        self._database = database
        self._watched = watched
        self._caller = Caller(ids.new_id(), ids.new_id())

    def ways(self, jobs: int) -> list[Callable[[], Awaitable[float]]]:
        """Return what does so many jobs and tells how many a second: one for each of WAYS."""
        layout = self._mesh.layout
        identity = spiffe_id("kimberly.local", "local", WORKER)
        return [
            partial(self._do_all, jobs, layout.app_socket("jobs"), identity),
            partial(self._do_all, jobs, layout.outbound_socket("worker-1"), None),
        ]

    async def _do_all(self, jobs: int, socket: Path, identity: str | None) -> float:
        await self._enqueue(jobs)
        await beside.tidy(self._mesh, DATABASE)
        async with worker(socket, identity, jobs) as saying:
            started = time.perf_counter()
            await _heard(saying, b"done\n")
            await _until_done(self._watched, NOOP)
            return jobs / (time.perf_counter() - started)

    async def measure(self, jobs: int) -> list[Row]:
        """Measure the rest: what is enqueued, and how soon it begins."""
        started = await self._start()
        batched = await self._enqueue(jobs)
        single = await self._single()
        return [
            Row("jobs enqueued, a thousand a commit", f"{jobs / batched:,.0f}/s"),
            Row("one job enqueued", str(single), "p50 / p99, one after the other"),
            Row("enqueued to begun, idle, behind sidecars", str(started), "goal: p50 20 ms"),
        ]

    async def _enqueue(self, jobs: int) -> float:
        """Return in how many seconds so many were enqueued."""
        started = time.perf_counter()
        for _ in range(0, jobs, _BATCH):
            async with self._database.transaction(self._caller) as connection:
                await enqueue_all(connection, [NewJob(NOOP)] * _BATCH, caller=self._caller)
        return time.perf_counter() - started

    async def _single(self) -> Latency:
        async def one() -> None:
            async with self._database.transaction(self._caller) as connection:
                await enqueue(connection, kind=BACKLOG, payload={}, caller=self._caller)

        return await latency(one, calls=300)

    async def _start(self) -> Latency:
        """Return how long after its commit was asked for a job begins, when nothing else does."""
        enqueued: list[float] = []
        async with worker(self._mesh.layout.outbound_socket("worker-1"), None, 0):
            await asyncio.sleep(1)
            for _ in range(200):
                async with self._database.transaction(self._caller) as connection:
                    await enqueue(connection, kind=CLOCK, payload={}, caller=self._caller)
                    enqueued.append(time.time())
                await _until_done(self._watched, CLOCK)
                await asyncio.sleep(0.02)
        rows = await self._watched.fetch_alone(
            "SELECT (result ->> 'at')::float8 AS at FROM jobs WHERE kind = $1 ORDER BY id", CLOCK
        )
        taken = np.array([row["at"] for row in rows]) - np.array(enqueued)
        p50, p99 = np.percentile(taken * 1000, [50, 99])
        return Latency(float(p50), float(p99))

    async def among(self, backlog: int) -> list[Row]:
        """Lease from few jobs and from many."""
        connection = await asyncpg.connect(
            self._mesh.stores.dsn(SUPERUSER), server_settings=PLANS_OF_QUEUE
        )
        try:
            few, _ = await _lease(connection, NOOP, 10_000)
            many, pages = await _lease(connection, BACKLOG, backlog)
        finally:
            await connection.close()
        return [
            Row(f"statement that leases {_LEASED} of 10,000", str(few)),
            Row(f"the same, of {backlog:,}", str(many), f"{pages} pages looked at"),
        ]


@asynccontextmanager
async def worker(
    socket: Path, identity: str | None, jobs: int
) -> AsyncIterator[asyncio.StreamReader]:
    """Run a worker process of ours; yields, when it begins to work, what says "done".

    It says so after so many jobs. 0: it never does.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.noop_worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=CHECKOUT,
        env={
            "PATH": os.defpath,
            "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'client'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "KIMBERLY_OUTBOUND_SOCKET": str(socket),
            **({"WORKER_IDENTITY": identity} if identity else {}),
        },
    )
    assert process.stdin
    assert process.stdout
    try:
        await _heard(process.stdout, b"ready\n")
        process.stdin.write(f"{jobs}\n".encode())
        await process.stdin.drain()
        yield process.stdout
    finally:
        process.stdin.close()
        await process.wait()


async def _heard(output: asyncio.StreamReader, expected: bytes) -> None:
    # Before that come lines of its log.
    while (line := await output.readline()) != expected:
        if not line:
            raise EOFError


async def _until_done(database: SystemDatabase, kind: str) -> None:
    unfinished = """
        SELECT EXISTS (SELECT FROM jobs WHERE state = 'running' AND kind = $1)
               OR EXISTS (SELECT FROM jobs WHERE state = 'waiting' AND due AND kind = $1)
    """
    while (await database.fetch_alone(unfinished, kind))[0][0]:  # noqa: ASYNC110 - others do it
        await asyncio.sleep(_POLL_SECONDS)


async def _lease(connection: asyncpg.Connection, kind: str, waiting: int) -> tuple[Latency, int]:
    """Have so many jobs of a thousand users wait, and time the statement that leases of them."""
    await connection.execute(
        """
        INSERT INTO jobs (id, tenant_id, user_id, kind, max_attempts, payload)
        SELECT uuidv7(), user_id, user_id, $1, 5, '{}'
          FROM generate_series(1, $2::integer) AS number
         CROSS JOIN LATERAL (
               SELECT md5((number % $3::integer)::text)::uuid AS user_id) AS own
        """,
        *(kind, waiting, _USERS),
    )
    await connection.execute("VACUUM (ANALYZE) jobs")
    arguments = ("w" * 32, [kind], [2**31 - 1], [ids.new_id()], _LEASED, 30.0)
    taken = await latency(lambda: connection.fetch(LEASE, *arguments), calls=50, warm_up=10)
    plan = json.loads(
        await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {LEASE}", *arguments)
    )[0]["Plan"]
    return taken, plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


async def _peer(
    stack: AsyncExitStack, mesh: Mesh, module: str, python: Path, jobs: int
) -> "PeerQueue | None":
    try:
        peer = await stack.enter_async_context(beside.running(python, module, mesh))
    except PeerError as error:
        notices.print(f"Left out: {error}")
        return None
    return PeerQueue(mesh, module, peer, jobs)


class PeerQueue:
    """The queue of another project. The clock runs in its own process."""

    def __init__(self, mesh: Mesh, module: str, peer: beside.Peer, jobs: int) -> None:
        self._mesh = mesh
        self._module = module
        self._peer = peer
        self._jobs = jobs
        self._enqueued: list[float] = []

    @property
    def name(self) -> str:
        """What it is, and of which version."""
        return self._peer.name

    async def do_all(self) -> float:
        """Have jobs done, and return how many a second."""
        self._enqueued.append(self._jobs / await self._ask("enqueue", self._jobs))
        await beside.tidy(self._mesh, self._module)
        seconds: float = await self._ask("work")
        return self._jobs / seconds

    async def measure(self) -> list[Row]:
        """Measure how fast jobs are enqueued."""
        p50, p99 = np.percentile(np.array(await self._ask("enqueue_one", 300)) * 1000, [50, 99])
        return [
            Row(f"jobs enqueued in batches, {self.name}", f"{median(self._enqueued):,.0f}/s"),
            Row(f"one job enqueued, {self.name}", str(Latency(float(p50), float(p99)))),
        ]

    async def _ask(self, do: str, jobs: int = 0) -> Any:
        return (await self._peer.exchange({"do": do, "jobs": jobs}))["seconds"]


if __name__ == "__main__":
    app()
