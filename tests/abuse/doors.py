"""The doors of the mesh: its edge, its sidecars, the sockets of its services."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from local.certificates import Authority, KeyPair, Names, make_leaf
from local.envoy import Domain
from local.mesh import Mesh
from local.ports import LOOPBACK
from server.access import EDGE, PROCESSES
from tests.transports import Grpc, method_taking

DOMAIN = Domain()
NOW = dt.datetime.now(dt.UTC)
_PART = 65536


@dataclass(frozen=True, slots=True)
class Doors:
    """Ways past the edge, for whoever holds a certificate or the rights of a service."""

    mesh: Mesh
    directory: Path
    """Where to put sockets; short."""
    stack: AsyncExitStack
    _open: dict[tuple[str, str], grpc.aio.Channel] = field(default_factory=dict)

    @property
    def authority(self) -> Authority:
        """The authority of the mesh."""
        return Authority.open(self.mesh.layout.certificates, now=NOW)

    def port(self, process: str) -> int:
        """Return the port of a sidecar."""
        address = self.mesh.process(f"{process}-sidecar").program.address
        return int(address.rpartition(":")[2])

    def workload(self, identity: str) -> KeyPair:
        """Return a certificate of the mesh for one of its identities."""
        return make_leaf(self.authority.root, Names(DOMAIN.identity(identity)), now=NOW)

    async def sidecar(self, process: str, identity: str) -> grpc.aio.Channel:
        """Return a channel to a sidecar, as the workload with this identity."""
        if (process, identity) not in self._open:
            context = self.context(self.workload(identity))
            socket = self.directory / f"{process}.{identity}"
            tunnel = _tunnel(socket, self.port(process), context)
            self._open[process, identity] = await self.stack.enter_async_context(tunnel)
        return self._open[process, identity]

    async def holder(self, process: str, caller: KeyPair) -> grpc.aio.Channel:
        """Return a channel to a sidecar, as whoever holds a certificate and trusts everybody."""
        context = self.context(caller)
        context.verify_mode = ssl.CERT_NONE
        socket = self.directory / f"{process}.{caller.certificate.serial_number:x}"
        return await self.stack.enter_async_context(_tunnel(socket, self.port(process), context))

    async def edge(self, address: str) -> grpc.aio.Channel:
        """Return a channel to the edge, from an address of this machine."""
        if (EDGE, address) not in self._open:
            context = ssl.create_default_context(cafile=self.authority.bundle)
            context.set_alpn_protocols(["h2"])
            port = int(self.mesh.edge.rpartition(":")[2])
            tunnel = _tunnel(self.directory / f"edge.{address}", port, context, address)
            self._open[EDGE, address] = await self.stack.enter_async_context(tunnel)
        return self._open[EDGE, address]

    async def service(self, process: str) -> grpc.aio.Channel:
        """Return a channel to a service, past its sidecar."""
        if (process, "") not in self._open:
            socket = self.mesh.layout.app_socket(process)
            channel = grpc.aio.insecure_channel(f"unix:{socket}")
            self._open[process, ""] = await self.stack.enter_async_context(channel)
        return self._open[process, ""]

    def context(self, caller: KeyPair | None) -> ssl.SSLContext:
        """Return how a peer connects to sidecars."""
        context = ssl.create_default_context(cafile=self.authority.bundle)
        # A sidecar has a SPIFFE id and no name that ssl could check.
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        if caller:
            file = self.directory / "caller.pem"
            file.write_bytes(caller.certificate_pem + caller.key_pem)
            context.load_cert_chain(file)
        return context


@dataclass(frozen=True, slots=True)
class PastTheEdge:
    """Calls with a user's token past the edge: a transport like the edge's own two."""

    doors: Doors
    token: str = ""
    to_service: bool = False
    """Whether to go past the sidecars, too."""

    async def __call__(self, request: Message, *more: Message) -> Any:
        """Return the response, as `Transport` has it."""
        return await (await self.over(request))(request, *more)

    async def stream(self, request: Message) -> AsyncIterator[Any]:
        """Yield the responses, as `Transport` has it."""
        async for response in (await self.over(request)).stream(request):
            yield response

    async def over(self, request: Message) -> Grpc:
        """Return how to call the method that takes a request."""
        process = process_of(method_taking(request).containing_service.full_name)
        if self.to_service:
            channel = await self.doors.service(process)
        else:
            channel = await self.doors.sidecar(process, EDGE)
        return Grpc(channel, (("authorization", f"Bearer {self.token}"),) if self.token else ())


def process_of(service: str) -> str:
    """Return the process that serves a service."""
    return next(process for process, services in PROCESSES.items() if service in services)


@asynccontextmanager
async def _tunnel(
    socket: Path, port: int, context: ssl.SSLContext, address: str = LOOPBACK
) -> AsyncIterator[grpc.aio.Channel]:
    """Open a channel that goes through TLS: gRPC for Python insists on checking host names."""

    carrying: set[asyncio.Task[None]] = set()

    async def carry(near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_connection(
                LOOPBACK, port, ssl=context, local_addr=(address, 0)
            )
        except OSError:
            # The door was shut: the channel is to see that.
            back.close()
            return
        try:
            await asyncio.gather(_pump(near, forth), _pump(far, back))
        finally:
            # TLS waits for the other side's last word, and nobody stays to hear it.
            for writer in (forth, back):
                writer.transport.abort()

    def begin(near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        # Somebody has to hold it: else it may be garbage before it has ended.
        task = asyncio.create_task(carry(near, back))
        carrying.add(task)
        task.add_done_callback(carrying.discard)

    # The edge serves no other host.
    options = (("grpc.default_authority", "localhost"),)
    async with await asyncio.start_unix_server(begin, socket):
        async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel:
            yield channel
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with contextlib.suppress(OSError):
            while part := await reader.read(_PART):
                writer.write(part)
                await writer.drain()
    finally:
        writer.close()
