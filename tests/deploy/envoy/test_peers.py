"""Peers are let in by their certificates, to the methods that they may call."""

import contextlib
import datetime as dt
import socket
import ssl
from collections.abc import Iterator

import grpc
import pytest

from local import envoy
from local.certificates import KeyPair, Names, make_leaf, make_root
from server import access
from tests.deploy.envoy.site import (
    GET_MEMORY,
    GET_USER,
    KUBERNETES,
    LOCAL,
    LOG_IN,
    NOW,
    WORK,
    App,
    Site,
    call,
    call_sidecar,
    eventually,
    leaf,
    token,
)

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
        socket.create_connection(address, timeout=30) as plain,
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


def eventually_called(channel: grpc.Channel, method: str) -> None:
    # Its sidecar may yet have to see that the peer is well.
    def attempt() -> None:
        try:
            call(channel, method)
        except grpc.RpcError as error:
            raise AssertionError(error) from error

    eventually(attempt)
