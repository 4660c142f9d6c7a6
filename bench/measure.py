"""Latency of one call after the other, and calls a second of many at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles of the time that single calls took, in milliseconds."""

    p50: float
    p99: float

    def __str__(self) -> str:
        """Return both, for a table."""
        return f"{self.p50:.2f} / {self.p99:.2f} ms"


async def latency(call: Call, *, calls: int, warm_up: int = 50) -> Latency:
    """Return the latency of `calls` calls, one at a time, after a warm-up."""
    for _ in range(warm_up):
        await call()
    taken = np.empty(calls)
    for number in range(calls):
        started = time.perf_counter()
        await call()
        taken[number] = time.perf_counter() - started
    p50, p99 = np.percentile(taken * 1000, [50, 99])
    return Latency(float(p50), float(p99))


async def rate(call: Call, *, seconds: float, at_once: int) -> float:
    """Return how many calls a second end when `at_once` are always under way."""
    ended = 0
    stop_at = time.perf_counter() + seconds

    async def repeat() -> None:
        nonlocal ended
        while time.perf_counter() < stop_at:
            await call()
            ended += 1

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(repeat())
    return ended / (time.perf_counter() - started)
