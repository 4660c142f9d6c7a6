"""One process: what it is made of is served until a signal stops it."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import structlog

from server import access, telemetry
from server.garbage import collect_rarely
from server.processes import auth, jobs, memory
from server.processes.parts import Application, Loop
from server.rpc.interceptors import chain
from server.rpc.serving import Server
from server.settings import Settings
from server.tokens import TokenVerifier

log = structlog.get_logger()

COMPOSERS: dict[str, Callable[[Settings, AsyncExitStack], Awaitable[Application]]] = {
    "auth": auth.compose,
    "memory": memory.compose,
    "jobs": jobs.compose,
}


async def serve(process: str, settings: Settings) -> None:
    """Run one process until SIGTERM or SIGINT, then drain it."""
    stopped = _stop_signal()
    async with AsyncExitStack() as stack:
        application = await COMPOSERS[process](settings, stack)
        server = _server(process, settings, application)
        application.register(server.grpc)
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(_forever(loop)) for loop in application.every_loop()]
            collect_rarely()
            await server.start()
            await stopped.wait()
            log.info("draining")
            await server.drain(
                health_seconds=settings.health_interval_seconds,
                grace_seconds=settings.drain_seconds,
                announce=application.announce_drain,
            )
            for task in loops:
                task.cancel()
    log.info("stopped")


def _server(process: str, settings: Settings, application: Application) -> Server:
    verifier = TokenVerifier(
        application.keys,
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        ended=application.ended,
    )
    layers = chain(
        verifier,
        worker_id=access.spiffe_id(settings.trust_domain, settings.namespace, access.WORKER),
        unary_seconds=settings.unary_seconds,
        stream_seconds=settings.stream_seconds,
        erased=application.erased,
        gate=application.toll,
    )
    server = Server(
        settings.listen_socket,
        layers,
        access.PROCESSES[process],
        telemetry.server_interceptors(process),
    )
    if access.REFLECTION in access.PROCESSES[process]:
        server.reflect(access.public_services())
    return server


async def _forever(loop: Loop) -> None:
    await loop()


def _stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stopped = asyncio.Event()
    running = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        running.add_signal_handler(number, stopped.set)
    return stopped
