"""Renders the Envoy configurations of the mesh, from the contract and from server.access.

The same templates serve a local mesh and Kubernetes: whatever differs is a field of Edge or
Sidecar. What may be called, and by whom, differs nowhere and is therefore no field.
"""

import base64
import ipaddress
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from google.api import annotations_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from local.layout import CHECKOUT
from local.processes import installed
from server import access
from server.access import Access

DESCRIPTOR_SET = CHECKOUT / "build" / "kimberly.binpb"
TEMPLATES = CHECKOUT / "envoy"

JWKS_METHOD = "/kimberly.auth.v1.AuthService/GetJwks"
TOKEN_METHOD = "/kimberly.auth.v1.AuthService/IssueToken"  # noqa: S105 - the name of a method
"""The token endpoint of OAuth: its errors are answers with an HTTP status of their own."""
STREAMS_OF_GRPC = frozenset({"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"})
"""What gRPC itself defines and both sides stream: our descriptor set does not hold it."""


# --- the contract ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Binding:
    """One way to call a method over REST."""

    verb: str
    path: str


@dataclass(frozen=True, slots=True)
class Method:
    """What Envoy has to know of a method."""

    path: str
    """Full name with slashes, such as /kimberly.auth.v1.AuthService/LogIn."""
    streams: bool = False
    """Whether either side sends more than one message."""
    client_streams: bool = False
    """Whether the client does."""
    bindings: tuple[Binding, ...] = ()

    @property
    def service(self) -> str:
        """Full name of the service that has the method."""
        return self.path.split("/")[1]


def descriptor_set(path: Path = DESCRIPTOR_SET) -> FileDescriptorSet:
    """Return the contract that `buf build` wrote, imports included."""
    return FileDescriptorSet.FromString(path.read_bytes())


def methods_of_contract(contract: FileDescriptorSet) -> tuple[Method, ...]:
    """Return every method that the mesh serves: those of the contract, then those of gRPC.

    Raises:
        LookupError: a method has no row in server.access, or a row has no method.
    """
    ours = tuple(
        _method(f"/{file.package}.{service.name}/{method.name}", method)
        for file in contract.file
        for service in file.service
        for method in service.method
    )
    grpcs = tuple(
        Method(path, streams=path in STREAMS_OF_GRPC, client_streams=path in STREAMS_OF_GRPC)
        for path in access.METHODS
        if path.startswith("/grpc.")
    )
    listed, served = set(access.METHODS), {method.path for method in (*ours, *grpcs)}
    if listed != served:
        raise LookupError(f"contract and server.access differ: {sorted(listed ^ served)}")
    return (*ours, *grpcs)


def _method(path: str, method: MethodDescriptorProto) -> Method:
    streams = method.client_streaming or method.server_streaming
    return Method(path, streams, method.client_streaming, _bindings(method))


def _bindings(method: MethodDescriptorProto) -> tuple[Binding, ...]:
    if not method.options.HasExtension(annotations_pb2.http):
        return ()
    rule = method.options.Extensions[annotations_pb2.http]
    return tuple(
        Binding(verb.upper(), getattr(each, verb))
        for each in (rule, *rule.additional_bindings)
        for verb in [each.WhichOneof("pattern")]
    )


# --- what an environment chooses ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address. The host is an IP address or, for a peer, a DNS name."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return host:port."""
        return f"{self.host}:{self.port}"

    @property
    def listener(self) -> str:
        """Where a listener of Envoy listens, as JSON; on :: it is that and every IPv4 address."""
        socket = {"address": self.host, "port_value": self.port}
        if self.host == "::":
            socket["ipv4_compat"] = True
        return json.dumps({"socket_address": socket})

    @property
    def is_numeric(self) -> bool:
        """Whether the host needs no name server."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Domain:
    """Whom the mesh trusts: a SPIFFE trust domain and the namespace within it."""

    trust_domain: str = "kimberly.local"
    namespace: str = "local"

    def identity(self, process: str) -> str:
        """Return the SPIFFE id of a process."""
        return access.spiffe_id(self.trust_domain, self.namespace, process)

    @property
    def identities(self) -> str:
        """The prefix that all SPIFFE ids of the namespace share."""
        return self.identity("")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which access tokens are accepted."""

    issuer: str
    """https://host:port of the edge."""
    audience: str = "kimberly"
    longest_lifetime_seconds: int = 900
    clock_skew_seconds: int = 30
    jwks_cache_seconds: int = 20
    """For how long, at most, a withdrawn key is still accepted."""


@dataclass(frozen=True, slots=True)
class Traces:
    """Where spans go, and how many."""

    collector: Address
    """Takes OTLP over gRPC, without TLS."""
    ratio: float
    """Of the calls that come to the edge, how many are traced; 0 to 1."""

    @classmethod
    def to(cls, endpoint: str, ratio: float) -> "Traces | None":
        """Return where http://host:port is; None for an empty endpoint."""
        host, _, port = endpoint.removeprefix("http://").rpartition(":")
        return cls(Address(host, int(port)), ratio) if endpoint else None


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What one edge process takes from the outside."""

    calls_per_second_per_address: int = 2_000
    calls_per_second_per_user: int = 1_000
    retry_seconds: int = 1
    """After how long a bucket is full again."""
    rest_body_bytes: int = 1 << 20
    message_bytes: int = 5 << 20
    """Of a request that is one gRPC message: more than services take, who refuse it themselves."""
    rest_response_bytes: int = 4 << 20
    unary_seconds: int = 10
    stream_seconds: int = 900
    stream_idle_seconds: int = 60
    connection_seconds: int = 3600
    connections: int = 2000
    streams_per_connection: int = 100
    stream_window_bytes: int = 1 << 20
    connection_window_bytes: int = 4 << 20
    heap_bytes: int = 512 << 20


@dataclass(frozen=True, slots=True)
class SidecarLimits:
    """What one sidecar takes from its peers and its application."""

    unary_seconds: int = 10
    connection_seconds: int = 900
    """After this long a connection drains, which bounds how long a rotated-out peer can stay."""
    connections: int = 1000
    stream_window_bytes: int = 1 << 20
    connection_window_bytes: int = 8 << 20
    heap_bytes: int = 256 << 20


Peers = Mapping[str, tuple[Address, ...]]
"""Where the sidecars of each process listen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """The Envoy that faces clients."""

    name: str = "edge"
    listen: Address
    peers: Peers
    """Sidecars of auth, memory and jobs."""
    admin_socket: Path
    sds: Path
    """Identity directory (local.certificates) with the SPIFFE id of the edge."""
    public_sds: Path
    """Identity directory with the certificate that clients see."""
    descriptor: Path = DESCRIPTOR_SET
    domain: Domain = Domain()
    tokens: Tokens
    host_names: tuple[str, ...] = ("localhost", "127.0.0.1")
    """Names by which clients may call; any other is answered 404."""
    health: Address | None = None
    """Where, without TLS, a kubelet asks how this Envoy is, and Prometheus for what it measures;
    None: nowhere."""
    proxy_protocol: bool = False
    """Whether a load balancer opens each connection with the address of its client, in the PROXY
    protocol; then a connection without one is closed."""
    cors_origins: tuple[str, ...] = ()
    limits: EdgeLimits = EdgeLimits()
    traces: Traces | None = None
    access_log: Path | None = None
    """None: standard output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """The Envoy of one process. A worker's has no inbound side."""

    process: str
    name: str
    """Unique within the mesh, such as worker-2: several workers share one identity."""
    inbound: Address | None = None
    app_socket: Path | None = None
    health: Address | None = None
    """Where, without TLS, a kubelet asks how this Envoy and its process are, and Prometheus for
    what they measure; None: nowhere."""
    metrics_socket: Path | None = None
    """Where the process tells what it measures; None: nowhere."""
    outbound_socket: Path
    peers: Peers
    """Sidecars of every process in peers_of(process)."""
    admin_socket: Path
    sds: Path
    descriptor: Path = DESCRIPTOR_SET
    domain: Domain = Domain()
    tokens: Tokens
    limits: SidecarLimits = SidecarLimits()
    traces: Traces | None = None
    access_log: Path | None = None


# --- who may call what -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Route:
    """Where calls of one method go."""

    path: str
    cluster: str
    streams: bool
    client_streams: bool


@dataclass(frozen=True, slots=True)
class Peer:
    """A cluster of sidecars."""

    process: str
    identity: str
    addresses: tuple[Address, ...]
    health_service: str

    @property
    def needs_dns(self) -> bool:
        """Whether a name server has to be asked for the addresses."""
        return not all(address.is_numeric for address in self.addresses)


def process_of(service: str) -> str:
    """Return the process that serves a service."""
    return next(process for process, served in access.PROCESSES.items() if service in served)


def calls_of(process: str) -> tuple[str, ...]:
    """Return the methods that a process may call through its sidecar."""
    if process == access.WORKER:
        return _with_access(access.METHODS, Access.WORKER)
    # Every service verifies tokens itself; the one that signs them has the keys.
    return () if process == process_of(_service(JWKS_METHOD)) else (JWKS_METHOD,)


def peers_of(process: str) -> tuple[str, ...]:
    """Return the processes whose sidecars a process reaches, the edge included.

    A sidecar that verifies tokens reaches auth for the keys: the one of auth reaches itself.
    """
    if process == access.EDGE:
        return tuple(access.PROCESSES)
    jwks = (process_of(_service(JWKS_METHOD)),) if process in access.PROCESSES else ()
    called = (process_of(_service(path)) for path in calls_of(process))
    return tuple(dict.fromkeys((*jwks, *called)))


def public_methods(methods: Iterable[Method]) -> tuple[Method, ...]:
    """Return the methods that the edge passes on."""
    return tuple(each for each in methods if access.METHODS[each.path] in access.PUBLIC)


def bindings_without_token(methods: Iterable[Method]) -> tuple[Binding, ...]:
    """Return the REST calls that need no token.

    Raises:
        ValueError: such a path has a variable, and Envoy could not match it exactly.
    """
    bindings = tuple(
        binding
        for method in methods
        if access.METHODS[method.path] is Access.ANYONE
        for binding in method.bindings
    )
    for binding in bindings:
        if "{" in binding.path or "*" in binding.path:
            raise ValueError(f"{binding.path} needs no token and must be a fixed path")
    return bindings


def policies(rows: Mapping[str, Access]) -> dict[str, tuple[str, ...]]:
    """Group exact method names by the name of their access. A kind nobody uses is left out."""
    groups = {kind.value: _with_access(rows, kind) for kind in Access}
    return {kind: paths for kind, paths in groups.items() if paths}


def _roles() -> dict[str, list[str]]:
    """Return the roles that open what asks for one, by the name of the access."""
    return {kind.value: sorted(roles) for kind, roles in access.ROLES.items()}


def _with_access(rows: Mapping[str, Access], kind: Access) -> tuple[str, ...]:
    return tuple(path for path, row in rows.items() if row is kind)


def _service(path: str) -> str:
    return path.split("/")[1]


# --- rendering ---------------------------------------------------------------------------------


def render_edge(edge: Edge, methods: tuple[Method, ...] | None = None) -> str:
    """Return the configuration of the edge; the contract is the built one unless given."""
    methods = methods or methods_of_contract(descriptor_set())
    public = public_methods(methods)
    return _template("edge.yaml.j2").render(
        edge=edge,
        peers=_peers(edge.domain, edge.peers, peers_of(access.EDGE)),
        routes=[_route_to_peer(method) for method in public],
        policies=policies({method.path: access.METHODS[method.path] for method in public}),
        open_bindings=bindings_without_token(public),
        # The rest of the contract has no REST form, and the transcoder must not learn of it.
        rest_services=sorted({method.service for method in public if method.bindings}),
        rest_matches=_rest_matches(public),
        jwks=_jwks(methods),
        roles=_roles(),
        token_endpoint=_first_path(methods, TOKEN_METHOD),
        rate_limited=_rate_limited(edge.limits.retry_seconds),
        too_large=_exhausted("MESSAGE_TOO_LARGE"),
    )


def render_sidecar(sidecar: Sidecar, methods: tuple[Method, ...] | None = None) -> str:
    """Return the configuration of a sidecar; the contract is the built one unless given."""
    methods = methods or methods_of_contract(descriptor_set())
    rows = access.methods_of(sidecar.process) if sidecar.inbound else {}
    by_path = {method.path: method for method in methods}
    jwks, serves_jwks = _jwks(methods), JWKS_METHOD in rows
    without_token = [path for path, row in rows.items() if row not in access.ROLES]
    return _template("sidecar.yaml.j2").render(
        sidecar=sidecar,
        peers=_peers(sidecar.domain, sidecar.peers, peers_of(sidecar.process)),
        inbound=[_route(by_path[path], "app") for path in rows],
        outbound=[_route_to_peer(by_path[path]) for path in calls_of(sidecar.process)],
        policies=policies(rows),
        health_service=access.PROCESSES.get(sidecar.process, ("",))[0],
        jwks=jwks,
        serves_jwks=serves_jwks,
        without_token=[*without_token, jwks] if serves_jwks else without_token,
        jwks_service=_service(JWKS_METHOD),
        roles=_roles(),
        edge_identity=sidecar.domain.identity(access.EDGE),
        worker_identity=sidecar.domain.identity(access.WORKER),
    )


def command(config: Path, *, drain_seconds: int = 2) -> tuple[str, ...]:
    """Return the command that runs an Envoy; several may run on one machine."""
    binary = next(installed("envoy").glob("_bin/envoy*"))
    drain = ("--drain-time-s", str(drain_seconds))
    # Access logs are flushed often enough to be read while one waits.
    flags = ("--concurrency", "1", "--disable-hot-restart", "--file-flush-interval-msec", "1000")
    return (str(binary), "--config-path", str(config), "--log-level", "warning", *flags, *drain)


def _route(method: Method, cluster: str) -> Route:
    return Route(method.path, cluster, method.streams, method.client_streams)


def _route_to_peer(method: Method) -> Route:
    return _route(method, process_of(method.service))


def _peers(domain: Domain, peers: Peers, needed: Iterable[str]) -> list[Peer]:
    return [
        Peer(process, domain.identity(process), peers[process], access.PROCESSES[process][0])
        for process in needed
    ]


def _rest_matches(methods: Iterable[Method]) -> list[str]:
    paths = (binding.path for method in methods for binding in method.bindings)
    matches = ({"prefix": "/v1/"} if path.startswith("/v1/") else {"path": path} for path in paths)
    return list(dict.fromkeys(json.dumps(match) for match in matches))


def _jwks(methods: Iterable[Method]) -> str:
    return _first_path(methods, JWKS_METHOD)


def _first_path(methods: Iterable[Method], path: str) -> str:
    return next(method for method in methods if method.path == path).bindings[0].path


def _rate_limited(retry_seconds: int) -> str:
    """Return what gRPC callers over a limit of the edge are told beside the code, in base64."""
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=retry_seconds))
    return _exhausted("RATE_LIMITED", retry)


def _exhausted(reason: str, *more: Message) -> str:
    """Return the details of a refusal of the edge, in base64."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="kimberly")
    status = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED)
    for detail in (info, *more):
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return base64.b64encode(status.SerializeToString()).decode()


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - YAML, not HTML; every value goes through `quoted`
    )
    environment.filters["quoted"] = lambda value: json.dumps(str(value))
    environment.filters["listed"] = lambda values: json.dumps([str(value) for value in values])
    return environment.get_template(name)
