"""The peer's side when queues are measured: JSON Lines come in, JSON Lines go out.

Standard library only.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol


class Queue(Protocol):
    """A queue that is measured. Its one handler returns at once."""

    async def enqueue(self, jobs: int) -> None:
        """Enqueue many jobs in the way that is the fastest."""

    async def enqueue_one(self) -> None:
        """Enqueue one job, durably."""

    async def work(self) -> None:
        """Do all jobs that wait, by one worker, until their outcomes are durable."""


async def serve(name: str, queue: Queue) -> None:
    """Answer until standard input ends. The clock runs around the peer's own call only."""
    # What libraries print must not come between the lines.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, object]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    async def timed(call: Callable[[], Awaitable[None]]) -> float:
        started = time.perf_counter()
        await call()
        return time.perf_counter() - started

    say({"name": name})
    while line := await asyncio.to_thread(sys.stdin.readline):
        request: dict[str, Any] = json.loads(line)
        jobs: int = request["jobs"]
        match request["do"]:
            case "enqueue":
                say({"seconds": await timed(partial(queue.enqueue, jobs))})
            case "enqueue_one":
                say({"seconds": [await timed(queue.enqueue_one) for _ in range(jobs)]})
            case "work":
                say({"seconds": await timed(queue.work)})
