"""One process: what it is made of is served until a signal stops it."""

import asyncio
import signal
from contextlib import AsyncExitStack
from functools import partial
from importlib import import_module

import structlog

from server import access, telemetry, tracing
from server.garbage import collect_rarely
from server.metrics import read_forever
from server.processes.parts import Application, Loop
from server.rpc.interceptors import chain
from server.rpc.serving import Server
from server.settings import Settings
from server.tokens import TokenVerifier

log = structlog.get_logger()


async def serve(process: str, settings: Settings) -> None:
    """Run one process until SIGTERM or SIGINT, then drain it."""
    if settings.otlp_endpoint:
        tracing.begin(process, settings.otlp_endpoint, settings.trace_ratio)
    stopped = _stop_signal()
    async with AsyncExitStack() as stack:
        application = await _compose(process, settings, stack)
        server = _server(process, settings, application)
        application.register(server.grpc)
        stack.enter_context(telemetry.exposed(settings.metrics_socket))
        async with asyncio.TaskGroup() as tasks:
            read = partial(read_forever, application.readings, settings.metrics_seconds)
            every_loop: list[Loop] = [*application.every_loop(), read]
            loops = [tasks.create_task(_forever(loop)) for loop in every_loop]
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


async def _compose(process: str, settings: Settings, stack: AsyncExitStack) -> Application:
    """Return what a process serves.

    It imports what it is made of and no more: the metrics of the others are not its own.
    """
    module = import_module(f"server.processes.{process}")
    application: Application = await module.compose(settings, stack)
    return application


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
        edge_id=access.spiffe_id(settings.trust_domain, settings.namespace, access.EDGE),
        erased=application.erased,
        ended=application.ended,
        gate=application.toll,
        turnstile=application.turnstile,
    )
    server = Server(settings.listen_socket, layers, access.PROCESSES[process])
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
