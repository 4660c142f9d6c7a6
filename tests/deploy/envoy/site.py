"""One set of Envoys in front of an application that stands in for every service."""

import contextlib
import datetime as dt
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
import httpx
from google.protobuf import json_format
from grpc_health.v1 import health_pb2
from joserfc import jwt
from joserfc.jwk import ECKey
from kimberly.auth.v1 import auth_pb2
from kimberly.memory.v1 import memory_pb2

from local import envoy
from local.certificates import Authority, KeyPair, Names, make_leaf
from local.envoy import Address, Domain, Edge, Sidecar
from server import access

T = TypeVar("T")

if TYPE_CHECKING:
    Handler = grpc.GenericRpcHandler[bytes, bytes]
else:
    # Generic in its stubs only.
    Handler = grpc.GenericRpcHandler

LOG_IN = "/kimberly.auth.v1.AuthService/LogIn"
GET_USER = "/kimberly.users.v1.UserService/GetUser"
GET_MEMORY = "/kimberly.memory.v1.MemoryService/GetMemory"
EXPORT = "/kimberly.memory.v1.MemoryService/ExportMemories"
WATCH = "/kimberly.memory.v1.MemoryService/WatchMemories"
WORK = "/kimberly.jobs.v1.WorkerService/Work"
HEALTH = "/grpc.health.v1.Health/Check"

ROLES = (access.EDGE, *access.PROCESSES, access.WORKER)
LOCAL, KUBERNETES = Domain(), Domain("kimberly.example", "prod")
RBAC = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC"
TOKENS = envoy.Tokens(issuer="https://auth.example")
NOW = dt.datetime.now(dt.UTC)


def eventually(check: Callable[[], T], seconds: float = 30.0) -> T:
    """Return what `check` returns once it does not raise."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check()
        except (AssertionError, OSError, httpx.TransportError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Site:
    """Files and addresses of one set of Envoys."""

    directory: Path
    authority: Authority
    domain: Domain
    limits: envoy.EdgeLimits = field(default_factory=envoy.EdgeLimits)
    host: str = "127.0.0.1"
    listen_host: str = "127.0.0.1"
    ports: Mapping[str, int] = field(
        default_factory=lambda: {role: free_port() for role in (access.EDGE, *access.PROCESSES)}
    )

    @property
    def peers(self) -> envoy.Peers:
        return {process: (Address(self.host, self.ports[process]),) for process in access.PROCESSES}

    def identity(self, role: str) -> Path:
        return self.authority.ensure(role, Names(self.domain.identity(role)), now=NOW)

    def render(self, role: str) -> str:
        return self.render_edge() if role == access.EDGE else self.render_sidecar(role)

    def render_edge(self) -> str:
        public = Names(dns_names=("localhost",), addresses=("127.0.0.1",))
        return envoy.render_edge(
            Edge(
                listen=Address(self.listen_host, self.ports[access.EDGE]),
                peers=self.peers,
                admin_socket=self.admin_socket(access.EDGE),
                sds=self.identity(access.EDGE),
                public_sds=self.authority.ensure("public", public, now=NOW),
                domain=self.domain,
                tokens=TOKENS,
                cors_origins=("https://app.example",),
                limits=self.limits,
                access_log=self.directory / "edge.access",
            )
        )

    def render_sidecar(self, process: str) -> str:
        serves = process in access.PROCESSES
        return envoy.render_sidecar(
            Sidecar(
                process=process,
                name=f"{process}-1",
                inbound=Address(self.listen_host, self.ports[process]) if serves else None,
                app_socket=self.directory / f"{process}.app" if serves else None,
                outbound_socket=self.directory / f"{process}.out",
                peers=self.peers,
                admin_socket=self.admin_socket(process),
                sds=self.identity(process),
                domain=self.domain,
                tokens=TOKENS,
            )
        )

    def write(self, role: str) -> Path:
        path = self.directory / f"{role}.yaml"
        path.write_text(self.render(role))
        return path

    def admin_socket(self, role: str) -> Path:
        return self.directory / f"{role}.admin"

    def admin(self, role: str, path: str) -> httpx.Response:
        transport = httpx.HTTPTransport(uds=str(self.admin_socket(role)))
        with httpx.Client(transport=transport, base_url="http://envoy") as client:
            return client.get(path)

    def await_ready(self, role: str) -> None:
        def listening() -> None:
            # By a socket that we close: httpx leaves one open for each refused connection.
            with socket.socket(socket.AF_UNIX) as probe:
                assert probe.connect_ex(str(self.admin_socket(role))) == 0

        def ready() -> None:
            assert self.admin(role, "/ready").text == "LIVE\n"

        eventually(listening)
        eventually(ready)

    @contextlib.contextmanager
    def running(self, *roles: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for role in roles:
                log = stack.enter_context((self.directory / f"{role}.log").open("wb"))
                child = subprocess.Popen(envoy.command(self.write(role)), stdout=log, stderr=log)
                stack.callback(child.wait)
                stack.callback(child.terminate)
            for role in roles:
                self.await_ready(role)
            yield


SIGNING_KEY = ECKey.generate_key("P-256", {"kid": "key-1", "use": "sig", "alg": "ES256"})


def token(key: ECKey = SIGNING_KEY, **claims: object) -> str:
    now = int(time.time())
    good = {
        "iss": TOKENS.issuer,
        "aud": TOKENS.audience,
        "sub": "usr_1",
        "tid": "ten_1",
        "role": "owner",
        "iat": now,
        "nbf": now,
        "exp": now + 600,
    }
    return jwt.encode({"alg": "ES256", "kid": "key-1", "typ": "at+jwt"}, good | claims, key)


def bearer(value: str) -> dict[str, str]:
    return {"authorization": f"Bearer {value}"}


EXPORTED = 200
UNARY_SECONDS = 5
WATCHED_SECONDS = UNARY_SECONDS + 2


def export() -> Iterator[bytes]:
    """Yield more than fits into any buffer on the way."""
    for _ in range(EXPORTED):
        memory = memory_pb2.Memory(content="x" * 60_000)
        yield memory_pb2.ExportMemoriesResponse(memory=memory).SerializeToString()
    end = memory_pb2.ExportEnd(count=EXPORTED)
    yield memory_pb2.ExportMemoriesResponse(end=end).SerializeToString()


def watch() -> Iterator[bytes]:
    """Yield for longer than a call may take that does not stream."""
    for second in range(WATCHED_SECONDS):
        mark = memory_pb2.WatchMemoriesResponse(caught_up=memory_pb2.CaughtUp(), cursor=f"{second}")
        yield mark.SerializeToString()
        time.sleep(1)
    end = memory_pb2.WatchEnd(reason=memory_pb2.WATCH_END_REASON_AGE)
    yield memory_pb2.WatchMemoriesResponse(end=end).SerializeToString()


class App(Handler):
    """Answers calls with an empty message, or a stream, and remembers the metadata of the last."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, str | bytes]] = {}
        self._streams = {EXPORT: export, WATCH: watch}
        self._answers = {
            HEALTH: health_pb2.HealthCheckResponse(status="SERVING").SerializeToString(),
            envoy.JWKS_METHOD: json_format.ParseDict(
                {"keys": [SIGNING_KEY.as_dict(private=False)]}, auth_pb2.GetJwksResponse()
            ).SerializeToString(),
        }

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        method = handler_call_details.method
        if method.startswith("/grpc.reflection"):
            return None
        self.seen[method] = dict(handler_call_details.invocation_metadata)

        def answer(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
            for _request in requests:
                pass
            if method in self._streams:
                yield from self._streams[method]()
            else:
                yield self._answers.get(method, b"")

        return grpc.stream_stream_rpc_method_handler(answer)


def rest(site: Site, address: str = "127.0.0.1") -> httpx.Client:
    """Return a client that calls from an address of this machine."""
    trust = ssl.create_default_context(cafile=str(site.authority.bundle))
    transport = httpx.HTTPTransport(verify=trust, local_address=address)
    return httpx.Client(
        base_url=f"https://127.0.0.1:{site.ports[access.EDGE]}", transport=transport
    )


def expect(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text


def grpcurl(*arguments: str) -> subprocess.CompletedProcess[str]:
    binary = Path(sys.executable).with_name("grpcurl")
    return subprocess.run(
        [str(binary), "-max-time", "20", *arguments], check=False, capture_output=True, text=True
    )


def call_sidecar(
    site: Site, process: str, method: str, caller: KeyPair, *headers: str
) -> subprocess.CompletedProcess[str]:
    """Call a sidecar as a peer does. grpcurl cannot check SPIFFE ids and takes any server."""
    files = {"caller.crt": caller.certificate_pem, "caller.key": caller.key_pem}
    for name, content in files.items():
        (site.directory / name).write_bytes(content)
    identity = ("-cert", f"{site.directory}/caller.crt", "-key", f"{site.directory}/caller.key")
    contract = ("-insecure", "-protoset", str(envoy.DESCRIPTOR_SET))
    metadata = [argument for header in headers for argument in ("-H", header)]
    address = f"127.0.0.1:{site.ports[process]}"
    return grpcurl(*contract, *identity, *metadata, address, method.lstrip("/"))


def leaf(site: Site, role: str) -> KeyPair:
    return make_leaf(site.authority.root, Names(site.domain.identity(role)), now=NOW)


def call(channel: grpc.Channel, method: str) -> bytes:
    """Send one empty message and return the answer."""
    answer: bytes = channel.unary_unary(method, bytes, bytes)(b"", timeout=5)
    return answer
