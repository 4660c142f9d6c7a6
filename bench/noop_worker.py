"""python -m bench.noop_worker: the worker of `workers.stream` with handlers that do nothing.

Says "ready" on standard output, begins to work when standard input says how many jobs there are,
says "done" after so many, and goes on until standard input ends. `KIMBERLY_OUTBOUND_SOCKET` is
where the jobs service is reached, `WORKER_IDENTITY` whom the worker says it is where no sidecar
says it.
"""

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop

from bench.jobs import CLOCK, CONCURRENCY, NOOP
from server.garbage import collect_rarely
from workers.__main__ import open_channel
from workers.stream import Task, Worker


class Counting:
    """Does nothing, and tells when it has done so often enough."""

    def __init__(self) -> None:
        self.left = 0

    async def noop(self, _task: Task) -> Mapping[str, Any]:
        """Do nothing."""
        self.left -= 1
        if not self.left:
            print("done", flush=True)
        return {}


async def tell_time(_task: Task) -> Mapping[str, Any]:
    """Say when the work began."""
    return {"at": time.time()}


async def main() -> None:
    """Work from the first line of standard input to its end."""
    identity = os.environ.get("WORKER_IDENTITY")
    counting = Counting()
    metadata = (("x-forwarded-client-cert", f"Hash=00;URI={identity}"),) if identity else ()
    async with open_channel(Path(os.environ["KIMBERLY_OUTBOUND_SOCKET"])) as channel:
        worker = Worker(
            channel,
            {NOOP: counting.noop, CLOCK: tell_time},
            concurrency=CONCURRENCY,
            drain_seconds=5,
            metadata=metadata,
        )
        print("ready", flush=True)
        counting.left = int(await asyncio.to_thread(sys.stdin.readline))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(worker.run())
            await asyncio.to_thread(sys.stdin.readline)
            worker.drain()


if __name__ == "__main__":
    # As workers do.
    collect_rarely()
    uvloop.run(main())
