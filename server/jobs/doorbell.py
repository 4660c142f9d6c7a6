"""Tells who waits for jobs that there may be some."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import structlog

from server.enqueue import DOORBELL

log = structlog.get_logger()

_CONNECT_SECONDS = 5.0
_AGAIN_SECONDS = 0.5


class Doorbell:
    """Rings when a job was enqueued, and every `poll_seconds`: a notification may be lost."""

    def __init__(self, system_database_url: str, *, poll_seconds: float = 1.0) -> None:
        self._url = system_database_url
        self._poll_seconds = poll_seconds
        self._waiting: set[asyncio.Event] = set()

    @contextmanager
    def heard_by(self, event: asyncio.Event) -> Iterator[None]:
        """Set the event at every ring."""
        self._waiting.add(event)
        try:
            yield
        finally:
            self._waiting.discard(event)

    def ring(self) -> None:
        """Tell everybody."""
        for event in self._waiting:
            event.set()

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
            yield lost
        finally:
            connection.terminate()

    def _notified(self, *_: Any) -> None:
        self.ring()
