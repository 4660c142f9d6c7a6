"""The Envoys as they are rendered: they boot, they refuse strangers, and they pass calls on."""

import contextlib
import datetime as dt
import json
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import httpx
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection
from joserfc import jwt
from joserfc.jwk import ECKey
from kimberly.auth.v1 import auth_pb2
from kimberly.memory.v1 import memory_pb2

from local import envoy
from local.certificates import Authority, KeyPair, Names, make_leaf, make_root
from local.envoy import Address, Binding, Domain, Edge, Method, Sidecar
from server import access
from server.access import Access

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


# --- what the tests stand on -------------------------------------------------------------------


def eventually(check: Callable[[], T], seconds: float = 8.0) -> T:
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


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    # Not pytest's: the path of a socket must be short.
    path = Path(tempfile.mkdtemp(prefix="kimberly-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def authority(directory: Path) -> Authority:
    return Authority.open(directory / "certificates", now=NOW)


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
WATCHED_SECONDS = 12


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


@pytest.fixture(scope="module")
def app(directory: Path) -> Iterator[App]:
    app = App()
    server = grpc.server(ThreadPoolExecutor(8), handlers=[app])
    names = [name for names in access.PROCESSES.values() for name in names]
    reflection.enable_server_reflection(names, server)
    for process in access.PROCESSES:
        server.add_insecure_port(f"unix:{directory / process}.app")
    server.start()
    yield app
    server.stop(None).wait()


@pytest.fixture(scope="module")
def mesh(directory: Path, authority: Authority, app: App) -> Iterator[Site]:
    """Edge, sidecars and a worker's sidecar, in front of `app`."""
    site = Site(directory, authority, LOCAL)
    # The edge first, the one that everybody waits for last: any order must do.
    with site.running(access.EDGE, access.WORKER, "jobs", "memory", "auth"):
        with rest(site) as client:
            eventually(lambda: expect(client.get("/healthz"), 200))
            eventually(lambda: expect(client.get("/v1/user", headers=bearer(token())), 200))
        yield site


@pytest.fixture
def client(mesh: Site) -> Iterator[httpx.Client]:
    with rest(mesh) as client:
        yield client


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
        [str(binary), "-max-time", "5", *arguments], check=False, capture_output=True, text=True
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


# --- what is rendered --------------------------------------------------------------------------


def test_every_role_validates_and_boots_as_in_kubernetes(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kimberly-") as directory:
        authority = Authority.open(tmp_path / "certificates", now=NOW)
        # A name that resolves everywhere stands for the headless services of a cluster.
        site = Site(Path(directory), authority, KUBERNETES, host="localhost", listen_host="0.0.0.0")
        for role in ROLES:
            check = [*envoy.command(site.write(role)), "--mode", "validate"]
            assert subprocess.run(check, check=False, capture_output=True).returncode == 0, role
        assert "STRICT_DNS" in site.render_edge()
        with site.running(access.EDGE, "memory"), rest(site) as client:
            # Nobody can verify a token while auth is away, which does not make it a wrong one.
            refused = client.get("/v1/user", headers=bearer(token()))
            expect(refused, 503)
            assert refused.json()["code"] == grpc.StatusCode.UNAVAILABLE.value[0]
            expect(client.get("/healthz"), 503)


def test_every_local_role_validates_boots_and_shows_its_certificate(mesh: Site) -> None:
    for role in ROLES:
        check = [*envoy.command(mesh.directory / f"{role}.yaml"), "--mode", "validate"]
        assert subprocess.run(check, check=False, capture_output=True).returncode == 0, role
        shown = mesh.admin(role, "/certs").json()["certificates"]
        names = {
            name.get("uri") for each in shown for name in each["cert_chain"][0]["subject_alt_names"]
        }
        assert LOCAL.identity(role) in names


def policies_of(site: Site, role: str) -> dict[str, set[str]]:
    """Return the exact methods of each RBAC policy, as the running Envoy holds them."""
    filters = list(find(site.admin(role, "/config_dump").json(), RBAC))
    policies = filters[0]["rules"]["policies"] if filters else {}
    return {
        name: {rule["url_path"]["path"]["exact"] for rule in rules}
        for name, policy in policies.items()
        for rules in [policy["permissions"][0]["or_rules"]["rules"]]
    }


def find(node: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Find the messages of one type anywhere in a configuration."""
    if isinstance(node, dict):
        if node.get("@type") == kind:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from find(child, kind)


@pytest.mark.parametrize("process", access.PROCESSES)
def test_a_sidecar_opens_each_method_of_its_process_to_whom_it_is_meant_for(
    mesh: Site, process: str
) -> None:
    services = {*access.PROCESSES[process], "grpc.health.v1.Health"}
    rows = {path: row for path, row in access.METHODS.items() if path.split("/")[1] in services}
    assert policies_of(mesh, process) == {
        row.value: {path for path in rows if rows[path] is row} for row in rows.values()
    }


def test_the_edge_opens_what_is_meant_for_users_and_nothing_else(mesh: Site) -> None:
    assert policies_of(mesh, access.EDGE) == {
        row.value: {path for path, each in access.METHODS.items() if each is row}
        for row in access.PUBLIC
    }


def test_the_sidecar_of_a_worker_has_no_inbound_side(mesh: Site) -> None:
    assert policies_of(mesh, access.WORKER) == {}
    listeners = mesh.admin(access.WORKER, "/listeners?format=json").json()["listener_statuses"]
    assert [listener["name"] for listener in listeners] == ["outbound"]


def test_a_method_without_an_access_row_is_refused() -> None:
    contract = envoy.descriptor_set()
    service = next(file for file in contract.file if file.package == "kimberly.jobs.v1").service[0]
    service.method.add(name="PurgeJobs")
    with pytest.raises(LookupError, match="JobService/PurgeJobs"):
        envoy.methods_of_contract(contract)


def test_an_access_row_without_a_method_is_refused() -> None:
    with pytest.raises(LookupError, match="AuthService/LogIn"):
        envoy.methods_of_contract(FileDescriptorSet())


def test_a_rest_path_without_token_must_be_a_fixed_one() -> None:
    method = Method(LOG_IN, bindings=(Binding("POST", "/v1/login/{name}"),))
    with pytest.raises(ValueError, match="fixed path"):
        envoy.bindings_without_token([method])


def test_rest_calls_without_token_are_those_of_methods_for_anyone() -> None:
    methods = envoy.methods_of_contract(envoy.descriptor_set())
    bindings = {(binding.verb, binding.path) for binding in envoy.bindings_without_token(methods)}
    assert bindings == {
        ("POST", "/v1/signup"),
        ("POST", "/v1/login"),
        ("POST", "/v1/token:refresh"),
        ("POST", "/v1/logout"),
        ("POST", "/v1/user/erasures:receipt"),
        ("GET", "/.well-known/jwks.json"),
        ("GET", "/.well-known/oauth-authorization-server"),
        ("GET", "/.well-known/openid-configuration"),
        ("POST", "/v1/oauth/token"),
        ("POST", "/v1/token:exchange"),
        ("POST", "/v1/password:requestReset"),
        ("POST", "/v1/password:reset"),
        ("POST", "/v1/email:verify"),
    }


def test_a_worker_reaches_the_methods_of_workers_and_a_service_the_keys() -> None:
    assert WORK in envoy.calls_of(access.WORKER)
    assert all(access.METHODS[path] is Access.WORKER for path in envoy.calls_of(access.WORKER))
    assert envoy.calls_of("memory") == envoy.calls_of("jobs") == (envoy.JWKS_METHOD,)
    assert envoy.peers_of("auth") == ("auth",)


# --- peers -------------------------------------------------------------------------------------


HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What an HTTP/2 client says first: the server does not speak before."""


@contextlib.contextmanager
def connected(site: Site, caller: KeyPair | None) -> Iterator[ssl.SSLSocket]:
    """Connect to the sidecar of auth and check its certificate."""
    trust = ssl.create_default_context(cafile=str(site.authority.bundle))
    trust.check_hostname = False
    trust.set_alpn_protocols(["h2"])
    if caller:
        pem = site.directory / "handshake.pem"
        pem.write_bytes(caller.certificate_pem + caller.key_pem)
        trust.load_cert_chain(pem)
    address = ("127.0.0.1", site.ports["auth"])
    with (
        socket.create_connection(address, timeout=5) as plain,
        trust.wrap_socket(plain) as secure,
    ):
        yield secure


def certificate_shown_to(site: Site, caller: KeyPair) -> bytes:
    """Return the certificate that the sidecar of auth shows to a peer whom it lets in."""
    with connected(site, caller) as secure:
        secure.sendall(HTTP2_PREFACE)
        assert secure.recv(1)
        return secure.getpeercert(binary_form=True) or b""


def refusal_of(site: Site, caller: KeyPair | None) -> str:
    """Return the alert with which the sidecar of auth refuses a peer."""
    # With TLS 1.3 a client reads only after its handshake that its certificate was refused.
    with pytest.raises(ssl.SSLError) as refused, connected(site, caller) as secure:
        secure.recv(1)
    return str(refused.value.reason).partition("_ALERT_")[2]


def test_a_peer_of_the_mesh_is_let_in(mesh: Site) -> None:
    assert certificate_shown_to(mesh, leaf(mesh, "memory"))


def test_a_peer_without_a_certificate_is_refused(mesh: Site) -> None:
    assert refusal_of(mesh, None) == "CERTIFICATE_REQUIRED"


def test_a_certificate_of_another_authority_is_refused(mesh: Site) -> None:
    stranger = make_root("Kimberly local authority", now=NOW)
    forged = make_leaf(stranger, Names(LOCAL.identity(access.EDGE)), now=NOW)
    assert refusal_of(mesh, forged) == "UNKNOWN_CA"


def test_an_expired_certificate_is_refused(mesh: Site) -> None:
    names, day = Names(LOCAL.identity(access.EDGE)), dt.timedelta(days=1)
    expired = make_leaf(mesh.authority.root, names, now=NOW - day, lifetime=day / 2)
    assert refusal_of(mesh, expired) == "CERTIFICATE_EXPIRED"


@pytest.mark.parametrize(
    "spiffe_id",
    [
        KUBERNETES.identity(access.EDGE),
        "spiffe://kimberly.local/ns/other/sa/edge",
        "spiffe://kimberly.local/ns/local/elsewhere/edge",
    ],
)
def test_an_identity_of_another_namespace_is_refused(mesh: Site, spiffe_id: str) -> None:
    outsider = make_leaf(mesh.authority.root, Names(spiffe_id), now=NOW)
    assert refusal_of(mesh, outsider) == "CERTIFICATE_UNKNOWN"


def test_the_certificate_that_clients_see_is_no_identity(mesh: Site) -> None:
    public = make_leaf(mesh.authority.root, Names(dns_names=("localhost",)), now=NOW)
    assert refusal_of(mesh, public) == "UNSUPPORTED_CERTIFICATE"


@pytest.mark.parametrize(
    ("process", "method", "caller", "answer"),
    [
        # A user's method: from the edge, and with a token.
        ("auth", GET_USER, access.EDGE, "Jwt is missing"),
        ("auth", f"{GET_USER} token", access.EDGE, ""),
        ("auth", f"{GET_USER} token", "memory", "PermissionDenied"),
        ("auth", f"{GET_USER} token", access.WORKER, "PermissionDenied"),
        # A worker's method: a token opens it to nobody.
        ("jobs", WORK, access.WORKER, ""),
        ("jobs", f"{WORK} token", access.EDGE, "PermissionDenied"),
        ("jobs", WORK, "memory", "PermissionDenied"),
        # Anyone's: every workload of the namespace.
        ("auth", envoy.JWKS_METHOD, "jobs", ""),
        ("auth", LOG_IN, access.EDGE, ""),
        # Another process's.
        ("memory", f"{GET_USER} token", access.EDGE, "PermissionDenied"),
    ],
)
def test_who_may_call_what_at_a_sidecar(
    mesh: Site, process: str, method: str, caller: str, answer: str
) -> None:
    path, *with_token = method.split()
    headers = [f"authorization: Bearer {token()}"] if with_token else []
    result = call_sidecar(mesh, process, path, leaf(mesh, caller), *headers)
    assert answer in result.stderr
    assert (result.returncode == 0) is (not answer), result.stderr


def test_a_renewed_certificate_is_served_without_a_restart(mesh: Site) -> None:
    caller = leaf(mesh, "memory")
    before = certificate_shown_to(mesh, caller)
    directory = mesh.authority.issue("auth", Names(LOCAL.identity("auth")), now=NOW)
    renewed = ssl.PEM_cert_to_DER_cert((directory / "current" / "tls.crt").read_text())

    def served() -> None:
        assert certificate_shown_to(mesh, caller) == renewed

    assert before != renewed
    eventually(served)


def test_a_worker_reaches_its_services_through_its_own_sidecar(mesh: Site, app: App) -> None:
    with grpc.insecure_channel(f"unix:{mesh.directory / access.WORKER}.out") as channel:
        eventually_called(channel, WORK)
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, GET_MEMORY)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    certificate = app.seen[WORK]["x-forwarded-client-cert"]
    assert f"URI={LOCAL.identity(access.WORKER)}" in str(certificate)


def call(channel: grpc.Channel, method: str) -> bytes:
    """Send one empty message and return the answer."""
    answer: bytes = channel.unary_unary(method, bytes, bytes)(b"", timeout=5)
    return answer


def eventually_called(channel: grpc.Channel, method: str) -> None:
    # Its sidecar may yet have to see that the peer is well.
    def attempt() -> None:
        try:
            call(channel, method)
        except grpc.RpcError as error:
            raise AssertionError(error) from error

    eventually(attempt)


# --- clients -----------------------------------------------------------------------------------


def test_a_rest_call_with_a_token_reaches_the_service(client: httpx.Client) -> None:
    expect(client.get("/v1/memories/mem_1", headers=bearer(token())), 200)


def test_a_rest_call_without_a_token_is_refused_in_json(client: httpx.Client) -> None:
    response = client.post("/v1/memories", json={"content": "x"})
    expect(response, 401)
    error_info = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": "TOKEN_INVALID",
        "domain": "kimberly",
    }
    assert response.json() == {"code": 16, "message": "Jwt is missing", "details": [error_info]}


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        # Made when it is asked with: the tests before this one may take longer than it lives.
        (lambda: token(ECKey.generate_key("P-256")), 401),
        (lambda: token(exp=1), 401),
        (lambda: token(iss="https://elsewhere.example"), 401),
        (lambda: token(aud="other"), 403),
        (lambda: token(sub=""), 403),
        (lambda: token(exp=int(time.time()) + 86_400), 401),
        (lambda: "rubbish", 401),
    ],
)
def test_a_bad_token_is_refused(client: httpx.Client, bad: Callable[[], str], status: int) -> None:
    expect(client.get("/v1/user", headers=bearer(bad())), status)


def test_a_token_in_the_query_is_no_token(client: httpx.Client) -> None:
    expect(client.get("/v1/user", params={"access_token": token()}), 401)


def test_an_unknown_query_parameter_is_refused(client: httpx.Client) -> None:
    response = client.get("/v1/user", params={"verbose": "1"}, headers=bearer(token()))
    expect(response, 400)
    assert response.json()["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


@pytest.mark.parametrize("path", ["/v1/memories", "/v1/memories:import"])
def test_a_rest_body_over_a_mebibyte_is_refused(client: httpx.Client, path: str) -> None:
    body = b'{"content": "' + b"x" * (1 << 20) + b'"}'
    response = client.post(path, content=body, headers=bearer(token()))
    expect(response, 413)
    assert response.json()["code"] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


def test_a_stream_comes_over_rest_as_lines_of_json_however_long_it_is(
    client: httpx.Client,
) -> None:
    with client.stream("GET", "/v1/memories:export", headers=bearer(token())) as response:
        expect_streamed(response)
        lines = [json.loads(line) for line in response.iter_lines()]
    assert len(lines) == EXPORTED + 1
    assert {len(line["memory"]["content"]) for line in lines[:-1]} == {60_000}
    assert lines[-1]["end"]["count"] == str(EXPORTED)


def test_a_stream_over_rest_outlasts_other_calls_and_is_not_held_back(
    client: httpx.Client,
) -> None:
    assert envoy.EdgeLimits().unary_seconds < WATCHED_SECONDS
    began = time.monotonic()
    with client.stream("GET", "/v1/memories:watch", headers=bearer(token())) as response:
        expect_streamed(response)
        arrived = [(json.loads(line), time.monotonic() - began) for line in response.iter_lines()]
    assert [line.get("cursor") for line, _ in arrived[:-1]] == [
        f"{second}" for second in range(WATCHED_SECONDS)
    ]
    assert arrived[0][1] < 1, "the first line does not wait for the others"
    assert arrived[-1][0]["end"] == {"reason": "WATCH_END_REASON_AGE"}


def expect_streamed(response: httpx.Response) -> None:
    assert response.status_code == httpx.codes.OK, response.read()


IDENTITY_HEADERS = (
    "forwarded",
    "grpc-tags-bin",
    "x-envoy-external-address",
    "x-envoy-upstream-rq-timeout-ms",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-http-method-override",
    "x-jwt-payload",
    "x-mesh-user",
    "x-original-url",
    "x-real-ip",
    "x-request-id",
    "x-rewrite-url",
    "x-tenant-id",
    "x-user-id",
)


def test_forged_headers_never_reach_the_app(client: httpx.Client, app: App) -> None:
    forged = dict.fromkeys(IDENTITY_HEADERS, "Zm9yZ2Vk")
    expect(client.get("/v1/user", headers=bearer(token()) | forged), 200)
    assert not [name for name, value in app.seen[GET_USER].items() if value == "Zm9yZ2Vk"]
    assert f"URI={LOCAL.identity(access.EDGE)}" in str(app.seen[GET_USER])


def test_a_header_with_an_underscore_is_refused(client: httpx.Client) -> None:
    expect(client.get("/v1/user", headers=bearer(token()) | {"x_user_id": "forged"}), 400)


def test_a_foreign_host_is_not_served(client: httpx.Client) -> None:
    expect(client.get("/v1/user", headers=bearer(token()) | {"host": "evil.example"}), 404)


def test_a_method_of_workers_is_hidden_from_users(client: httpx.Client, mesh: Site) -> None:
    expect(client.post(WORK, json={}, headers=bearer(token())), 404)
    contract = ("-protoset", str(envoy.DESCRIPTOR_SET))
    result = grpcurl(*contract, *edge_arguments(mesh, token()), WORK.lstrip("/"))
    assert "PermissionDenied" in result.stderr


def edge_arguments(site: Site, value: str) -> tuple[str, ...]:
    address = f"localhost:{site.ports[access.EDGE]}"
    return ("-cacert", str(site.authority.bundle), "-H", f"authorization: Bearer {value}", address)


def test_reflection_works_with_a_token_only(mesh: Site) -> None:
    listed = grpcurl(*edge_arguments(mesh, token()), "list")
    assert "kimberly.memory.v1.MemoryService" in listed.stdout
    assert "Unauthenticated" in grpcurl(*edge_arguments(mesh, "rubbish"), "list").stderr


def test_a_refusal_over_grpc_is_plain_text(mesh: Site) -> None:
    bundle = mesh.authority.bundle.read_bytes()
    address = f"localhost:{mesh.ports[access.EDGE]}"
    with (
        grpc.secure_channel(address, grpc.ssl_channel_credentials(bundle)) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        call(channel, GET_MEMORY)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert refused.value.details() == "Jwt is missing"


# --- limits ------------------------------------------------------------------------------------

WAIT_SECONDS = 600


@contextlib.contextmanager
def strict(mesh: Site, **limits: int) -> Iterator[Site]:
    """Run another edge of the same mesh, whose buckets are not filled again during the test."""
    directory = Path(tempfile.mkdtemp(prefix="kimberly-"))
    ports = {**mesh.ports, access.EDGE: free_port()}
    edge_limits = envoy.EdgeLimits(retry_seconds=WAIT_SECONDS, **limits)
    site = Site(directory, mesh.authority, LOCAL, edge_limits, ports=ports)
    with site.running(access.EDGE), rest(site) as client:
        # Health counts against no limit.
        eventually(lambda: expect(client.get("/healthz"), 200))
        yield site
    shutil.rmtree(directory)


def retry_in(details: object) -> str:
    """Return when the details of a refusal say to come back."""
    assert isinstance(details, list)
    assert details[0]["reason"] == "RATE_LIMITED"
    delay: str = details[1]["retryDelay"]
    return delay


def call_over_grpc(site: Site) -> grpc.RpcError:
    bundle = site.authority.bundle.read_bytes()
    address = f"127.0.0.1:{site.ports[access.EDGE]}"
    metadata = tuple(bearer(token()).items())
    with (
        grpc.secure_channel(address, grpc.ssl_channel_credentials(bundle)) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary(GET_USER, bytes, bytes)(b"", metadata=metadata, timeout=5)
    return refused.value


def expect_limited_over_grpc(site: Site) -> None:
    error: Any = call_over_grpc(site)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(error.trailing_metadata())
    assert trailing["retry-after"] == f"{WAIT_SECONDS}"
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert retry_in(json_format.MessageToDict(status)["details"]) == f"{WAIT_SECONDS}s"


def test_an_address_over_its_limit_is_told_when_to_come_back_on_both_transports(
    mesh: Site,
) -> None:
    with strict(mesh, calls_per_second_per_address=1) as site, rest(site) as client:
        answers = [client.get("/v1/user") for _ in range(WAIT_SECONDS + 20)]
        assert {answer.status_code for answer in answers[:WAIT_SECONDS]} == {401}
        refused = answers[-1]
        expect(refused, 429)
        assert refused.headers["retry-after"] == f"{WAIT_SECONDS}"
        assert refused.json()["code"] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert retry_in(refused.json()["details"]) == f"{WAIT_SECONDS}s"
        expect_limited_over_grpc(site)
        # What one claims changes nothing; where one is does.
        expect(client.get("/v1/user", headers={"x-forwarded-for": "192.0.2.1"}), 429)
        with rest(site, "127.0.0.2") as elsewhere:
            expect(elsewhere.get("/v1/user"), 401)


def test_a_user_over_their_limit_is_told_so_wherever_they_call_from(mesh: Site) -> None:
    with strict(mesh, calls_per_second_per_user=1) as site, rest(site) as client:
        mine, others = bearer(token()), bearer(token(sub="usr_2"))
        answers = [client.get("/v1/user", headers=mine) for _ in range(WAIT_SECONDS + 20)]
        assert {answer.status_code for answer in answers[:WAIT_SECONDS]} == {200}
        expect(answers[-1], 429)
        assert answers[-1].headers["retry-after"] == f"{WAIT_SECONDS}"
        assert retry_in(answers[-1].json()["details"]) == f"{WAIT_SECONDS}s"
        expect_limited_over_grpc(site)
        with rest(site, "127.0.0.2") as elsewhere:
            expect(elsewhere.get("/v1/user", headers=mine), 429)
        expect(client.get("/v1/user", headers=others), 200)


def test_grpc_web_is_served(client: httpx.Client) -> None:
    headers = bearer(token()) | {"content-type": "application/grpc-web+proto"}
    response = client.post(GET_MEMORY, content=b"\0\0\0\0\0", headers=headers)
    expect(response, 200)
    assert response.headers["content-type"] == "application/grpc-web+proto"
    assert b"grpc-status:0" in response.content
    refused = client.post(WORK, content=b"\0\0\0\0\0", headers=headers)
    assert refused.headers["grpc-status"] == "7"


def test_a_page_of_a_listed_origin_may_call(client: httpx.Client) -> None:
    def preflight(origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return client.options(GET_MEMORY, headers=headers)

    allowed = preflight("https://app.example").headers["access-control-allow-origin"]
    assert allowed == "https://app.example"
    assert "access-control-allow-origin" not in preflight("https://evil.example").headers


def test_the_access_log_holds_the_method_and_neither_path_nor_query_nor_token(
    client: httpx.Client, mesh: Site
) -> None:
    secret = token()
    answered = client.get("/v1/memories/seen-in-path", headers=bearer(secret))
    nameless = client.get("/v1/nothing/seen-in-path", headers=bearer(secret))
    wrong = client.get("/v1/user", params={"seen-in-name": "seen-in-query"}, headers=bearer(secret))
    refused = client.get("/v1/memories/seen-in-path")

    def logged() -> None:
        text = (mesh.directory / "edge.access").read_text()
        lines = map(json.loads, text.splitlines())
        routes = {line["request_id"]: line["route"] for line in lines}
        calls = [each.headers["x-request-id"] for each in (answered, nameless, wrong, refused)]
        assert [routes.get(call) for call in calls] == [GET_MEMORY, "rest", "rest", "rest"]
        assert "seen-in" not in text
        assert secret not in text

    eventually(logged)
