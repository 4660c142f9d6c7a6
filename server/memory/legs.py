"""Parts of an answer that it can do without: waited for until one instant, then left behind."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar

import structlog

from server.errors import StoreUnavailable
from server.memory.metrics import LATE, LATENCY

PATIENCE_SECONDS: Final = 1.0
"""Nobody waits for longer, however late the deadline of the call is."""
_MARGIN_SECONDS: Final = 0.1
_MARGIN_PART: Final = 0.25
"""Of what is left of a call, so much at most is kept to answer in: short calls need legs too."""

log = structlog.get_logger()

T = TypeVar("T")


def patience_ends(now: float, seconds_left: float | None) -> float:
    """Return until when legs are waited for that an answer can do without.

    Args:
        now: By the clock of the event loop.
        seconds_left: Until the caller gives up; None: the caller has all the time.
    """
    if seconds_left is None:
        return now + PATIENCE_SECONDS
    margin = min(_MARGIN_SECONDS, seconds_left * _MARGIN_PART)
    return now + min(PATIENCE_SECONDS, seconds_left - margin)


async def timed(leg: str, work: Coroutine[Any, Any, T]) -> T:
    """Do a leg's work, and tell how long that took if it came to an end."""
    started = time.perf_counter()
    result = await work
    LATENCY.labels(leg).observe(time.perf_counter() - started)
    return result


class Leg(Generic[T]):
    """A part of an answer that is under way."""

    __slots__ = ("_name", "_task")

    def __init__(self, name: str, task: "asyncio.Task[T]") -> None:
        self._name = name
        self._task = task

    async def by(self, until: float) -> T | None:
        """Return what it brings; None if that is late, or its store is out of reach.

        What else it raises is raised.

        Args:
            until: When it is late, by the clock of the event loop.
        """
        try:
            if not self._task.done():
                left = until - asyncio.get_running_loop().time()
                await asyncio.wait([self._task], timeout=max(0.0, left))
            if self._task.done():
                return self._task.result()
            failure: Exception = TimeoutError()
        except (TimeoutError, StoreUnavailable) as error:
            failure = error
        log.warning("leg given up", leg=self._name, error=repr(failure))
        LATE.labels(self._name).inc()
        return None

    def stop(self) -> None:
        """Have it end, if it has not."""
        self._task.cancel()


class Legs:
    """Begins legs, and holds them until they have ended.

    One that is given up is cancelled, but nobody waits for it: a store that hangs may take seconds
    to let go of its connection.
    """

    def __init__(self) -> None:
        self._going: set[asyncio.Task[Any]] = set()

    @contextmanager
    def of_a_query(self) -> "Iterator[Round]":
        """Provide for the legs of one query: what is still under way at the end is given up."""
        legs = Round(self._begin)
        try:
            yield legs
        finally:
            legs.stop()

    def _begin(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._going.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._going.discard(task)
        if not task.cancelled():
            # Nobody else asks one that was given up how it ended.
            task.exception()


class Round:
    """The legs of one query."""

    def __init__(self, begin: Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]) -> None:
        self._begin = begin
        self._legs: list[Leg[Any]] = []

    def begin(self, name: str, work: Coroutine[Any, Any, T]) -> Leg[T]:
        """Begin a leg."""
        leg: Leg[T] = Leg(name, self._begin(timed(name, work)))
        self._legs.append(leg)
        return leg

    def stop(self) -> None:
        """Give up what is still under way."""
        for leg in self._legs:
            leg.stop()
