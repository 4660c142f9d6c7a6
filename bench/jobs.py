"""python -m bench.jobs: how fast jobs are enqueued, begun and done, others beside it."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
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
MODULES: Final = ("procrastinate_queue", "pgqueuer_queue")
"""The peers; the database of each has the same name."""
_BATCH: Final = 1000
_POLL_SECONDS: Final = 0.025
"""Looking costs our side what it does not cost peers, who end by themselves."""
_LEASED: Final = 100
_USERS: Final = 1000

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    jobs: Annotated[int, typer.Option(min=1000, help="How many jobs are done.")] = 50_000,
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

    Let nothing else run meanwhile; it takes two minutes.
    """
    rows = asyncio.run(_measure(jobs, backlog, peers / "bin" / "python"))
    show(rows, markdown=markdown)


async def _measure(jobs: int, backlog: int, python: Path) -> list[Row]:
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        async with Mesh(Layout(Path(directory)), workers=1) as mesh:
            await mesh.wait_ready()
            ours = Ours(mesh)
            rows = [*await ours.measure(jobs)]
            for module in MODULES:
                rows += await _peer(mesh, module, python, jobs)
            return rows + await ours.among(backlog)


class Ours:
    """The queue of the mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._caller = Caller(ids.new_id(), ids.new_id())

    async def measure(self, jobs: int) -> list[Row]:
        """Enqueue and do jobs of one user."""
        async with (
            await open_pool(self._mesh.stores.dsn(APPLICATION), size=4, name="bench") as pool,
            await open_pool(self._mesh.stores.dsn(SYSTEM), size=4, name="bench") as system,
        ):
            database, watched = Database(pool), SystemDatabase(system)
            rows = []
            for where, socket, identity in self._ways():
                batched = await self._enqueue(database, jobs)
                await beside.tidy(self._mesh, DATABASE)
                seconds = await self._work(watched, socket, identity)
                rows.append(Row(f"jobs done, {where}", f"{jobs / seconds:,.0f}/s"))
            started = await self._start(database, watched, *self._ways()[1][1:])
        single = await self._single(self._mesh)
        return [
            *rows,
            Row("jobs enqueued, a thousand a commit", f"{jobs / batched:,.0f}/s"),
            Row("one job enqueued", str(single), "p50 / p99, one after the other"),
            Row("enqueued to begun, idle, behind sidecars", str(started), "goal: p50 20 ms"),
        ]

    def _ways(self) -> list[tuple[str, Path, str | None]]:
        layout = self._mesh.layout
        identity = spiffe_id("kimberly.local", "local", WORKER)
        return [
            ("at the service's socket", layout.app_socket("jobs"), identity),
            ("behind two sidecars", layout.outbound_socket("worker-1"), None),
        ]

    async def _enqueue(self, database: Database, jobs: int) -> float:
        started = time.perf_counter()
        for _ in range(0, jobs, _BATCH):
            async with database.transaction(self._caller) as connection:
                await enqueue_all(connection, [NewJob(NOOP)] * _BATCH, caller=self._caller)
        return time.perf_counter() - started

    async def _single(self, mesh: Mesh) -> Latency:
        async with await open_pool(mesh.stores.dsn(APPLICATION), size=2, name="bench") as pool:
            database = Database(pool)

            async def one() -> None:
                async with database.transaction(self._caller) as connection:
                    await enqueue(connection, kind=BACKLOG, payload={}, caller=self._caller)

            return await latency(one, calls=300)

    async def _work(self, watched: SystemDatabase, socket: Path, identity: str | None) -> float:
        """Return how long a worker takes until no job is left."""
        async with worker(socket, identity):
            started = time.perf_counter()
            await _until_done(watched, NOOP)
            return time.perf_counter() - started

    async def _start(
        self, database: Database, watched: SystemDatabase, socket: Path, identity: str | None
    ) -> Latency:
        """Return how long after its commit was asked for a job begins, when nothing else does."""
        enqueued: list[float] = []
        async with worker(socket, identity):
            await asyncio.sleep(1)
            for _ in range(200):
                async with database.transaction(self._caller) as connection:
                    await enqueue(connection, kind=CLOCK, payload={}, caller=self._caller)
                    enqueued.append(time.time())
                await _until_done(watched, CLOCK)
                await asyncio.sleep(0.02)
        rows = await watched.fetch_alone(
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
async def worker(socket: Path, identity: str | None) -> AsyncIterator[None]:
    """Run a worker process of ours; yields when it begins to work."""
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
        process.stdin.write(b"go\n")
        await process.stdin.drain()
        yield
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


async def _peer(mesh: Mesh, module: str, python: Path, jobs: int) -> list[Row]:
    try:
        async with beside.running(python, module, mesh) as peer:
            return await _rows_of_peer(mesh, module, peer, jobs)
    except PeerError as error:
        notices.print(f"Left out: {error}")
        return []


async def _rows_of_peer(mesh: Mesh, module: str, peer: beside.Peer, jobs: int) -> list[Row]:
    async def ask(do: str, jobs: int = 0) -> Any:
        return (await peer.exchange({"do": do, "jobs": jobs}))["seconds"]

    some = min(jobs, 5_000) if module == MODULES[0] else jobs
    batched = await ask("enqueue", some)
    await beside.tidy(mesh, module)
    done = await ask("work")
    p50, p99 = np.percentile(np.array(await ask("enqueue_one", 300)) * 1000, [50, 99])
    return [
        Row(f"jobs done, {peer.name}", f"{some / done:,.0f}/s", "in the worker's process"),
        Row(f"jobs enqueued in batches, {peer.name}", f"{some / batched:,.0f}/s"),
        Row(f"one job enqueued, {peer.name}", str(Latency(float(p50), float(p99)))),
    ]


if __name__ == "__main__":
    app()
