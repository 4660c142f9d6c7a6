"""Tells who waits for jobs that there may be some, and who does them that they are not wanted."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final
from uuid import UUID

import asyncpg
import structlog

from server.enqueue import DOORBELL
from server.jobs.model import Held

CANCELLATIONS: Final = "jobs_cancelled"
"""Channel that is told of each running job whose end was asked for, as "id/token"."""

log = structlog.get_logger()

_CONNECT_SECONDS = 5.0
_AGAIN_SECONDS = 0.5


class Doorbell:
    """Rings when a job was enqueued, and every `poll_seconds`: a notification may be lost.

    A cancellation that is lost is made up for by heartbeats.
    """

    def __init__(self, system_database_url: str, *, poll_seconds: float = 1.0) -> None:
        self._url = system_database_url
        self._poll_seconds = poll_seconds
        self._waiting: set[Callable[[], None]] = set()
        self._working: set[Callable[[Held], None]] = set()

    @contextmanager
    def heard_by(self, hear: Callable[[], None]) -> Iterator[None]:
        """Call at every ring."""
        self._waiting.add(hear)
        try:
            yield
        finally:
            self._waiting.discard(hear)

    @contextmanager
    def cancellations_heard_by(self, hear: Callable[[Held], None]) -> Iterator[None]:
        """Call with every lease whose job is not wanted any more."""
        self._working.add(hear)
        try:
            yield
        finally:
            self._working.discard(hear)

    def ring(self) -> None:
        """Tell everybody."""
        for hear in self._waiting:
            hear()

    async def run(self) -> None:
        """Ring until cancelled. Reconnects whenever the connection is lost."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._poll())
            tasks.create_task(self._listen())

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            self.ring()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._listening() as lost:
                    self.ring()
                    await lost.wait()
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("doorbell out of order", error=repr(error))
            await asyncio.sleep(_AGAIN_SECONDS)

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[asyncio.Event]:
        """Listen on a connection of its own; the event says that the connection is lost."""
        lost = asyncio.Event()
        connection = await asyncpg.connect(
            self._url,
            timeout=_CONNECT_SECONDS,
            server_settings={"application_name": "kimberly-doorbell"},
        )
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(DOORBELL, self._notified)
            await connection.add_listener(CANCELLATIONS, self._cancelled)
            yield lost
        finally:
            connection.terminate()

    def _notified(self, *_: Any) -> None:
        self.ring()

    def _cancelled(self, _connection: Any, _pid: int, _channel: str, lease: str) -> None:
        job_id, _, token = lease.partition("/")
        for hear in self._working:
            hear(Held(UUID(job_id), int(token)))
