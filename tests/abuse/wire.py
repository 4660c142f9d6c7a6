"""HTTP as nobody's library would send it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from local.mesh import Mesh
from local.ports import LOOPBACK

SECONDS = 15.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4
CANCEL = (8).to_bytes(4)

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The first answer to what was sent."""

    status: int
    body: bytes


@dataclass(slots=True)
class Stream:
    """What an HTTP/2 server sent on one stream. Its headers stay compressed."""

    body: bytes = b""
    resets: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wire:
    """Connections to the edge."""

    mesh: Mesh
    ca: str

    async def http1(self, request: str) -> Answer:
        """Send a request, byte by byte as given, and read the answer."""
        async with asyncio.timeout(SECONDS), self._connect("http/1.1") as (reader, writer):
            writer.write(request.encode())
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().lower().split("\r\n")
            lengths = [line.split(":")[1] for line in lines if line.startswith("content-length:")]
            body = await reader.readexactly(int(lengths[0])) if lengths else b""
            return Answer(int(lines[0].split()[1]), body)

    async def get(self, path: str, headers: Mapping[str, str] | Headers = ()) -> Answer:
        """GET a path, which nobody normalises on the way."""
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in pairs)
        return await self.http1(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n{lines}\r\n")

    async def http2(self, headers: Headers) -> Stream:
        """Send a request without body over HTTP/2 and read until its stream ends."""
        async with asyncio.timeout(SECONDS), self._connect("h2") as (reader, writer):
            writer.write(PREFACE + _frame(SETTINGS, 0, 0, b""))
            writer.write(_frame(HEADERS, END_STREAM | END_HEADERS, 1, _block(headers)))
            return await _read(reader)

    async def rapid_resets(self, path: str, headers: Headers, count: int) -> None:
        """Open so many streams and reset each at once, until the edge ends the connection.

        Raises:
            TimeoutError: It does not.
        """
        block = _request("GET", path, headers)
        async with asyncio.timeout(SECONDS), self._connect("h2") as (reader, writer):
            writer.write(PREFACE + _frame(SETTINGS, 0, 0, b""))
            for stream in range(1, 2 * count, 2):
                writer.write(_frame(HEADERS, END_STREAM | END_HEADERS, stream, block))
                writer.write(_frame(RST_STREAM, 0, stream, CANCEL))
            with contextlib.suppress(ConnectionError):
                await writer.drain()
                await reader.read()

    @asynccontextmanager
    async def unfinished(
        self, method: str, headers: Headers, connections: int, streams: int
    ) -> AsyncIterator[None]:
        """Begin so many calls of a gRPC method on each of so many connections, and end none.

        The edge has seen all of them.
        """
        grpc = [("content-type", "application/grpc"), ("te", "trailers"), *headers]
        block = _request("POST", method, grpc)
        async with AsyncExitStack() as stack:
            for _ in range(connections):
                async with asyncio.timeout(SECONDS):
                    reader, writer = await stack.enter_async_context(self._connect("h2"))
                    writer.write(PREFACE + _frame(SETTINGS, 0, 0, b""))
                    for stream in range(1, 2 * streams, 2):
                        writer.write(_frame(HEADERS, END_HEADERS, stream, block))
                    writer.write(_frame(PING, 0, 0, bytes(8)))
                    await _echoed(reader)
            yield

    @asynccontextmanager
    async def _connect(
        self, protocol: str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        trust = ssl.create_default_context(cafile=self.ca)
        trust.set_alpn_protocols([protocol])
        port = int(self.mesh.edge.rpartition(":")[2])
        reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=trust)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> Stream:
    stream = Stream()
    while True:
        head = await reader.readexactly(9)
        payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
        kind, flags, number = head[3], head[4], int.from_bytes(head[5:], "big")
        if kind == DATA:
            stream.body += payload
        if kind in {RST_STREAM, GOAWAY}:
            stream.resets.append(int.from_bytes(payload[-4:], "big"))
            return stream
        if number and kind in {DATA, HEADERS} and flags & END_STREAM:
            return stream


async def _echoed(reader: asyncio.StreamReader) -> None:
    """Read until a PING is answered, and so all that was sent before it has been read."""
    while True:
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == PING and head[4] & ACK:
            return


def _request(verb: str, path: str, headers: Headers) -> bytes:
    pseudo = {":method": verb, ":scheme": "https", ":authority": "localhost", ":path": path}
    return _block([*pseudo.items(), *headers])


def _block(headers: Headers) -> bytes:
    return b"".join(_literal(name) + _literal(value, b"") for name, value in headers)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _literal(text: str, prefix: bytes = b"\0") -> bytes:
    """Write a string of HPACK: no index, no Huffman code (RFC 7541, sections 5.2 and 6.2.2)."""
    return prefix + _length(len(text.encode())) + text.encode()


def _length(size: int) -> bytes:
    if size < 127:
        return bytes([size])
    rest, encoded = size - 127, [127]
    while rest >= 128:
        encoded.append(rest % 128 + 128)
        rest //= 128
    return bytes([*encoded, rest])
