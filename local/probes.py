"""Questions to a server whose answer tells that it is ready. No answer means: not yet."""

import asyncio
import hashlib
import hmac
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ANSWER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an HTTP server listens: a Unix socket, or a port of the loopback interface."""

    socket: Path | None = None
    port: int = 0
    tls: ssl.SSLContext | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        if self.socket is not None:
            return await asyncio.open_unix_connection(str(self.socket))
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an HTTP server answered; status 0 if nothing."""

    status: int = 0
    body: bytes = b""
    """As it came: perhaps in chunks."""


async def http(
    endpoint: Endpoint,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> Answer:
    """Make one HTTP/1.1 request."""
    sent = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body))}
    sent |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await endpoint.connect()
            try:
                writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
                return await _read_answer(reader)
            finally:
                writer.close()
    except (OSError, EOFError, ValueError, TimeoutError):
        return Answer()


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(maxsplit=2)[1])
    if "transfer-encoding: chunked" in head:
        return Answer(status, await reader.readuntil(b"\r\n0\r\n\r\n"))
    length = re.search(r"content-length: *(\d+)", head)
    # Never to the end of the connection: a server may keep that open although it was asked not to.
    return Answer(status, await reader.readexactly(int(length[1])) if length else b"")


async def valkey_answers(socket: Path, user: str, password: str) -> bool:
    """Tell whether a Valkey server lets this user in and has loaded its data."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(f"AUTH {user} {password}\r\nPING\r\n".encode())
                return [await reader.readline(), await reader.readline()] == [
                    b"+OK\r\n",
                    b"+PONG\r\n",
                ]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


async def grpc_serving(socket: Path) -> bool:
    """Tell whether a gRPC server on a Unix socket reports SERVING."""
    # On a thread: grpc.aio does not go together with a second event loop in the same process,
    # such as that of a test.
    return await asyncio.to_thread(_health, socket)


def _health(socket: Path) -> bool:
    if not socket.exists():
        return False
    # A pool of its own: the shared one would wait a second before it tries the socket again.
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@dataclass(frozen=True, slots=True)
class S3Key:
    """An S3 access key. It signs requests as AWS Signature Version 4 describes."""

    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def sign(self, method: str, host: str, path: str, body: bytes, now: float) -> dict[str, str]:
        """Return the headers that authorize one request without a query."""
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        scope = f"{moment[:8]}/{self.region}/s3/aws4_request"
        digest = hashlib.sha256(body).hexdigest()
        names = "host;x-amz-content-sha256;x-amz-date"
        request = (
            f"{method}\n{path}\n\nhost:{host}\nx-amz-content-sha256:{digest}\n"
            f"x-amz-date:{moment}\n\n{names}\n{digest}"
        )
        summary = hashlib.sha256(request.encode()).hexdigest()
        key = f"AWS4{self.secret_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{summary}"
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        return {
            "Host": host,
            "x-amz-date": moment,
            "x-amz-content-sha256": digest,
            "Authorization": (
                f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, "
                f"SignedHeaders={names}, Signature={signature}"
            ),
        }
