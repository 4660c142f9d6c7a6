"""What stands before the edges of a mesh: hands each new connection to one that is in service."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from local.ports import LOOPBACK

_AT_ONCE = 64 * 1024


class Balancer:
    """Knows nothing of TLS and of calls: whoever has a connection keeps it until it is closed."""

    def __init__(self, edges: Mapping[str, int]) -> None:
        self._edges = edges
        self.serving = set(edges)
        """The edges that get new connections."""
        self._turn = itertools.count()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Take connections until the context ends; yields host:port."""
        server = await asyncio.start_server(self._carry, LOOPBACK, 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            yield f"{host}:{port}"

    async def _carry(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        serving = sorted(self.serving)
        port = self._edges[serving[next(self._turn) % len(serving)]]
        far, forth = await asyncio.open_connection(LOOPBACK, port)
        # When either side ends, so does the other, as it would without anybody in between.
        with suppress(OSError):
            await asyncio.gather(_copy(near, forth), _copy(far, back))


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while piece := await source.read(_AT_ONCE):
            sink.write(piece)
            await sink.drain()
    finally:
        sink.close()
