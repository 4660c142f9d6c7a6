"""PgQueuer on asyncpg, its tables logged: `QueueManager.run` until the queue is empty."""

import asyncio
import os
from importlib.metadata import version

import asyncpg
import uvloop
from pgqueuer import AsyncpgDriver, Queries, QueueManager  # type: ignore[import-not-found] # an extra
from pgqueuer.types import QueueExecutionMode  # type: ignore[import-not-found] # an extra

from bench.peers.queueing import serve

_AT_ONCE = 1000
"""How many jobs it takes at once: from 100 on, more made it no faster here."""


class PgQueuer:
    """A queue with one entrypoint."""

    def __init__(self, dsn: str, queries: Queries) -> None:
        self._dsn = dsn
        self._queries = queries

    async def enqueue(self, jobs: int) -> None:
        """Enqueue many jobs by one statement a thousand."""
        for start in range(0, jobs, _AT_ONCE):
            some = min(_AT_ONCE, jobs - start)
            await self._queries.enqueue(["noop"] * some, [None] * some, [0] * some)

    async def enqueue_one(self) -> None:
        """Enqueue one job."""
        await self._queries.enqueue("noop", None)

    async def work(self) -> None:
        """Do all jobs that wait."""
        connection = await asyncpg.connect(self._dsn)
        manager = QueueManager(queries=Queries(AsyncpgDriver(connection)))

        @manager.entrypoint("noop")  # type: ignore[untyped-decorator] # an extra
        async def noop(_job: object) -> None:
            """Do nothing."""

        await manager.run(batch_size=_AT_ONCE, mode=QueueExecutionMode.drain)
        await connection.close()


async def main(dsn: str) -> None:
    """Serve one queue in an empty database."""
    connection = await asyncpg.connect(dsn)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    await serve(f"PgQueuer {version('pgqueuer')}", PgQueuer(dsn, queries))
    await connection.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(os.environ["PEER_DSN"]))
