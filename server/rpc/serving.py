"""A gRPC server on a Unix socket, with health, reflection and a graceful end."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import _async as async_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from server.rpc.around import Around, Layer

log = structlog.get_logger()

MESSAGE_BYTES = 4 * 1024 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", 2 * MESSAGE_BYTES),
    # The edge lets 16 KiB of headers pass, to which the Envoys add theirs. gRPC refuses by chance
    # what is between the two.
    ("grpc.max_metadata_size", 24 * 1024),
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    # The sidecar bounds connections; the server must not close its only one under it.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class _Symbols:
    """The descriptor pool, which also finds methods: grpcurl asks for those by name."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service_name, _, method = symbol.rpartition(".")
            service = self._pool.FindServiceByName(service_name)
            return service.methods_by_name[method].containing_service.file


class UnsafeSocketDirectory(Exception):
    """The directory of the listening socket lets others in."""


class Server:
    """Serves registered services until it is drained."""

    def __init__(
        self,
        socket: Path,
        layers: Sequence[Layer],
        services: Sequence[str],
    ) -> None:
        self.grpc = grpc.aio.server(interceptors=[Around(layers)], options=_OPTIONS)
        self._socket = socket
        self._services = tuple(services)
        self._health = async_health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)

    def reflect(self, services: Sequence[str]) -> None:
        """Answer reflection for these services, wherever in the mesh they are served."""
        for service in services:
            package = service.rpartition(".")[0]
            # Their descriptors: a process imports of itself only what it serves.
            import_module(f"{package}.{package.split('.')[1]}_pb2")
        names = (*services, reflection.SERVICE_NAME)
        symbols: Any = _Symbols()
        reflection.enable_server_reflection(names, self.grpc, pool=symbols)

    async def start(self) -> None:
        """Listen, and report SERVING.

        Raises:
            UnsafeSocketDirectory: Other users could reach the socket, past the sidecar.
        """
        directory = self._socket.parent.stat()
        if stat.S_IMODE(directory.st_mode) & 0o077 or directory.st_uid != os.getuid():
            raise UnsafeSocketDirectory(
                f"{self._socket.parent} must belong to this user and have mode 0700"
            )
        self._socket.unlink(missing_ok=True)
        self.grpc.add_insecure_port(f"unix:{self._socket}")
        await self.grpc.start()
        await self._report(health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", socket=str(self._socket))

    async def drain(
        self, *, health_seconds: float, grace_seconds: float, announce: Callable[[], None]
    ) -> None:
        """Stop without failing a call.

        First the health turns, then the peers get time to notice, then open streams are told
        by `announce`, then the server waits for calls under way.
        """
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(health_seconds)
        announce()
        await self.grpc.stop(grace_seconds)

    async def _report(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *self._services):
            await self._health.set(service, status)


@asynccontextmanager
async def channel_to_peers(outbound_socket: Path) -> AsyncIterator[grpc.aio.Channel]:
    """Open the channel to every peer: the sidecar's outbound listener routes by method."""
    async with grpc.aio.insecure_channel(
        f"unix:{outbound_socket}",
        options=(
            ("grpc.max_receive_message_length", 2 * MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ),
    ) as channel:
        yield channel
