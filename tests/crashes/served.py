"""The memory service that the crash tests kill: `python -m tests.crashes.served SOCKET [GUARD…]`.

It is composed as in production, from the environment. Only its tokens are those of the tests, it
has crash points, and it lacks the guards that it is told to do without. Every line that it reads
is a fault to come, or null; it answers with what happened since the line before. It serves once it
has read a line: one that is to take over from a dead one has been started before.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import uvloop

from server import requests, telemetry
from server.processes import memory
from server.processes.parts import Application
from server.rpc.interceptors import chain
from server.rpc.serving import Server
from server.settings import Settings
from tests.conftest import WORKER_ID, PlainTokens
from tests.crashes.faults import POINTS, Fault, Kind, watch_stores


async def _always_new(*claimed: Any) -> UUID:
    resource_id: UUID = claimed[-1]
    return resource_id


def _without_request_ids() -> None:
    requests.claim = _always_new  # type: ignore[assignment]


GUARDS: Final[dict[str, Callable[[], None]]] = {"request ids": _without_request_ids}
"""What takes a guard away, by its name."""


Compose = Callable[[Settings, AsyncExitStack], Awaitable[Application]]
"""Returns what a process serves."""


def begin(name: str, compose: Compose, guards: Mapping[str, Callable[[], None]]) -> None:
    """Serve a process as the command line says, until nobody says anything any more.

    Args:
        name: The process, as its log names it.
        compose: What it serves.
        guards: What takes a guard away, by its name.
    """
    telemetry.configure(name, "debug")
    watch_stores()
    for guard in sys.argv[2:]:
        guards[guard]()
    uvloop.run(main(Path(sys.argv[1]), compose))


async def main(socket: Path, compose: Compose) -> None:
    """Serve until nobody says anything any more."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    fault = await lines.readline()
    async with _serving(socket, compose):
        while fault:
            _answer()
            POINTS.arm(_fault_of(fault))
            fault = await lines.readline()


@asynccontextmanager
async def _serving(socket: Path, compose: Compose) -> AsyncIterator[None]:
    settings = Settings()
    async with AsyncExitStack() as stack:
        application = await compose(settings, stack)
        layers = chain(PlainTokens(), worker_id=WORKER_ID, unary_seconds=10, stream_seconds=60)
        server = Server(socket, layers, services=())
        application.register(server.grpc)
        loops = [asyncio.ensure_future(loop()) for loop in application.every_loop()]
        await server.start()
        yield
        await server.grpc.stop(None)
        for running in loops:
            running.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


def _fault_of(line: bytes) -> Fault | None:
    told = json.loads(line)
    return Fault(Kind(told["kind"]), told["point"], told["number"], told["times"]) if told else None


def _answer() -> None:
    answer = {"passes": POINTS.passes, "happened": POINTS.happened}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    begin("memory", memory.compose, GUARDS)
