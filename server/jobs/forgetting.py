"""Deletes jobs that ended long ago."""

import asyncio
from datetime import timedelta

import structlog

from server.errors import StoreUnavailable
from server.jobs.queue import Queue

log = structlog.get_logger()

_ROUND_SECONDS = 60.0
_PAUSE_SECONDS = 0.1


class Forgetting:
    """Deletes a little at a time, so that nobody waits for it. Replicas share the work."""

    def __init__(self, queue: Queue, done_for: timedelta, given_up_for: timedelta) -> None:
        """Keep jobs for a while.

        Args:
            queue: Where they are.
            done_for: How long jobs are kept that succeeded or were cancelled.
            given_up_for: How long dead ones are.
        """
        self._queue = queue
        self._done_for = done_for
        self._given_up_for = given_up_for

    async def run(self) -> None:
        """Delete what is old, every minute, until cancelled."""
        while True:
            try:
                while forgotten := await self._queue.forget(self._done_for, self._given_up_for):
                    log.info("old jobs deleted", jobs=forgotten)
                    await asyncio.sleep(_PAUSE_SECONDS)
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("old jobs out of reach", error=repr(error))
            await asyncio.sleep(_ROUND_SECONDS)
