"""Procrastinate on psycopg: `run_worker_async` until it has caught up."""

import asyncio
import os
from importlib.metadata import version

import procrastinate  # type: ignore[import-not-found] # an extra
import uvloop

from bench.peers.queueing import serve

_AT_ONCE = 1000
_CONCURRENCY = 20
"""How many jobs it does at once: more made it no faster here."""


class Procrastinate:
    """A queue with one task."""

    def __init__(self, app: procrastinate.App) -> None:
        self._app = app

        @app.task(name="noop")  # type: ignore[untyped-decorator] # an extra
        async def noop() -> None:
            """Do nothing."""

        self._noop = noop

    async def enqueue(self, jobs: int) -> None:
        """Enqueue many jobs by one statement a thousand."""
        for start in range(0, jobs, _AT_ONCE):
            await self._noop.batch_defer_async(*[{}] * min(_AT_ONCE, jobs - start))

    async def enqueue_one(self) -> None:
        """Enqueue one job."""
        await self._noop.defer_async()

    async def work(self) -> None:
        """Do all jobs that wait."""
        await self._app.run_worker_async(
            wait=False, concurrency=_CONCURRENCY, install_signal_handlers=False
        )


async def main(dsn: str) -> None:
    """Serve one queue in an empty database."""
    connector = procrastinate.PsycopgConnector(conninfo=dsn, min_size=2, max_size=20)
    app = procrastinate.App(connector=connector)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await serve(f"Procrastinate {version('procrastinate')}", Procrastinate(app))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(os.environ["PEER_DSN"]))
