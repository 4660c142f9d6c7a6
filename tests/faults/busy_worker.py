"""`python -m tests.faults.busy_worker`: the worker, with jobs that take a moment, and poison."""

import asyncio
import os
import random
import signal
from collections.abc import Mapping
from typing import Any

from tests.faults.jobs import CONCURRENCY, KIND, POISON
from workers.__main__ import Settings, open_channel
from workers.stream import Task, Worker


async def dawdle(task: Task) -> Mapping[str, Any]:
    """Take up to a tenth of a second."""
    await asyncio.sleep(random.uniform(0, 0.1))
    return {"token": task.lease_token, "worker": os.getpid()}


async def die(_task: Task) -> Mapping[str, Any]:
    """Take the whole process along."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


async def main() -> None:
    """Work until SIGTERM."""
    settings = Settings()
    async with open_channel(settings.outbound_socket) as channel:
        handlers = {KIND: dawdle, POISON: die}
        worker = Worker(channel, handlers, concurrency=CONCURRENCY, drain_seconds=1)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.drain)
        await worker.run()


if __name__ == "__main__":
    asyncio.run(main())
