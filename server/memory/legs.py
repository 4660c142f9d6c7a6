"""Parts of an answer that it can do without: waited for until one instant, then left behind."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

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


class Legs:
    """Waits for legs, and holds those that were given up until they have ended.

    A leg that is given up is cancelled, but not waited for: a store that hangs may take seconds to
    let go of its connection.
    """

    def __init__(self) -> None:
        self._going: set[asyncio.Task[Any]] = set()

    async def wait(self, leg: str, work: Coroutine[Any, Any, T], until: float) -> T | None:
        """Return what a leg brings; None if that is late, or its store is out of reach.

        Args:
            leg: Its name.
            work: What it does. Whatever else that raises is raised.
            until: When it is late, by the clock of the event loop.
        """
        task = asyncio.create_task(timed(leg, work))
        self._going.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait([task], timeout=max(0.0, until - asyncio.get_running_loop().time()))
            if task.done():
                return task.result()
            failure: Exception = TimeoutError()
        except (TimeoutError, StoreUnavailable) as error:
            failure = error
        finally:
            task.cancel()
        log.warning("leg given up", leg=leg, error=repr(failure))
        LATE.labels(leg).inc()
        return None

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._going.discard(task)
        if not task.cancelled():
            # Nobody else asks one that was given up how it ended.
            task.exception()
