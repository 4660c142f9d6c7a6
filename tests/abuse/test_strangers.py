"""Who is not who they must be is refused: at the handshake, or at the method."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
import stat

import grpc
import pytest
from google.protobuf.message import Message
from kimberly.embedding.v1 import embedding_pb2 as embedding
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.scoring.v1 import scoring_pb2 as scoring
from kimberly.users.v1 import users_pb2 as users

from local.certificates import KeyPair, Names, make_leaf, make_root
from local.mesh import Mesh
from local.ports import LOOPBACK
from server.access import (
    EDGE,
    METHODS,
    PROCESSES,
    WORKER,
    Access,
    Role,
    Scope,
    methods_of,
    scope_of,
)
from tests.abuse.callers import opened_to
from tests.abuse.cells import NO_TOKEN, answer_to, open_methods, rows
from tests.abuse.doors import DOMAIN, NOW, Doors
from tests.abuse.forgery import Forger
from tests.mesh import User, bearer

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
WORK = "/kimberly.jobs.v1.WorkerService/Work"
PLAN = "/kimberly.scoring.v1.ScoringService/PlanMeditation"
SCORE = "/kimberly.scoring.v1.ScoringService/Score"
EMBED = "/kimberly.embedding.v1.EmbeddingService/Embed"
SIGN = "/kimberly.users.v1.AuditWorkService/SignCheckpoints"
LIST_MEMORIES = "/kimberly.memory.v1.MemoryService/ListMemories"

# --- the handshake -----------------------------------------------------------------------------


async def handshake(doors: Doors, process: str, context: ssl.SSLContext, said: bytes) -> bytes:
    """Connect to a sidecar, say something, and return the first byte of the answer."""
    async with asyncio.timeout(60):
        port = doors.port(process)
        reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context)
        try:
            writer.write(said)
            return await reader.readexactly(1)
        finally:
            writer.transport.abort()


async def alert_for(doors: Doors, process: str, caller: KeyPair | None) -> str:
    """Return the alert with which a sidecar ends the handshake of a peer."""
    # With TLS 1.3 it comes after what the peer takes for the end of the handshake.
    with pytest.raises(ssl.SSLError) as refused:
        await handshake(doors, process, doors.context(caller), b"")
    return str(refused.value.reason).partition("_ALERT_")[2]


def forged(doors: Doors, kind: str) -> KeyPair | None:
    root, edge = doors.authority.root, Names(DOMAIN.identity(EDGE))
    hour = dt.timedelta(hours=1)
    match kind:
        case "another authority":
            return make_leaf(make_root("Kimberly local authority", now=NOW), edge, now=NOW)
        case "expired":
            return make_leaf(root, edge, now=NOW - 2 * hour, lifetime=hour)
        case "not valid yet":
            # A run of all tests may take longer than an hour.
            return make_leaf(root, edge, now=NOW + 24 * hour)
        case "another trust domain":
            return make_leaf(root, Names("spiffe://evil.example/ns/local/sa/edge"), now=NOW)
        case "another namespace":
            return make_leaf(root, Names("spiffe://kimberly.local/ns/prod/sa/edge"), now=NOW)
        case "no identity":
            return make_leaf(root, Names(dns_names=("localhost",)), now=NOW)
        case _:
            return None


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("kind", "alert"),
    [
        ("no certificate", "CERTIFICATE_REQUIRED"),
        ("another authority", "UNKNOWN_CA"),
        ("expired", "CERTIFICATE_EXPIRED"),
        ("not valid yet", "CERTIFICATE_EXPIRED"),
        ("another trust domain", "CERTIFICATE_UNKNOWN"),
        ("another namespace", "CERTIFICATE_UNKNOWN"),
        ("no identity", "UNSUPPORTED_CERTIFICATE"),
    ],
)
async def test_a_stranger_gets_no_further_than_the_handshake(
    doors: Doors, process: str, kind: str, alert: str
) -> None:
    assert await alert_for(doors, process, forged(doors, kind)) == alert


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_workload_of_the_mesh_gets_further(doors: Doors, process: str) -> None:
    assert await handshake(doors, process, doors.context(doors.workload("memory")), HTTP2_PREFACE)


async def test_a_sidecar_speaks_no_tls_before_1_3(doors: Doors) -> None:
    context = doors.context(doors.workload(EDGE))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        await handshake(doors, "auth", context, HTTP2_PREFACE)


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_sidecar_says_nothing_in_the_clear(doors: Doors, process: str) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, doors.port(process))
    async with asyncio.timeout(60):
        writer.write(HTTP2_PREFACE)
        said = await reader.read()
    writer.transport.abort()
    # At most a TLS alert.
    assert said[:1] in {b"", b"\x15"}


async def test_only_the_owner_reaches_the_sockets_of_the_services(mesh: Mesh) -> None:
    directory = mesh.layout.sockets
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    admins = [mesh.layout.admin_socket(name) for name in (EDGE, *PROCESSES)]
    assert {stat.S_IMODE(admin.stat().st_mode) for admin in admins} == {0o600}


# --- what a token is good for: every cell ------------------------------------------------------


def open_to_scope(scope: str) -> set[str]:
    return {method for method in rows(Access.USER) if scope_of(method) == scope}


def test_an_admin_may_more_than_an_auditor_and_an_auditor_more_than_a_member() -> None:
    member, auditor = opened_to(Role.MEMBER), opened_to(Role.AUDITOR)
    assert member < auditor < opened_to(Role.ADMIN) == opened_to(Role.OWNER)


@pytest.mark.parametrize("role", Role)
async def test_a_role_opens_what_the_table_says_at_every_door(
    channel: grpc.aio.Channel, doors: Doors, forger: Forger, role: Role
) -> None:
    token = bearer(forger.token({"role": role.value}))
    assert await open_methods(channel, token) == rows(Access.ANYONE) | opened_to(role)
    for process in PROCESSES:
        inside = methods_of(process).keys() & (rows(*NO_TOKEN) | opened_to(role))
        assert await open_methods(await doors.sidecar(process, EDGE), token) == inside
        assert await open_methods(await doors.service(process), token) == inside


@pytest.mark.parametrize("role", ["", "root", "owner ", "owner,admin", "Owner", ["owner"], None])
async def test_what_is_no_role_opens_nothing(
    channel: grpc.aio.Channel, doors: Doors, forger: Forger, role: object
) -> None:
    token = bearer(forger.token({"role": role}))
    assert await open_methods(channel, token) == rows(Access.ANYONE)
    for process in PROCESSES:
        inside = methods_of(process).keys() & rows(*NO_TOKEN)
        assert await open_methods(await doors.service(process), token) == inside


@pytest.mark.parametrize(
    "scopes",
    ["", "root", "USER", *(scope for scope in Scope), "memory.read jobs.read", "memory.*"],
)
async def test_a_key_opens_what_its_scopes_name_at_every_door(
    channel: grpc.aio.Channel, doors: Doors, forger: Forger, scopes: str
) -> None:
    token = bearer(forger.token({"scope": scopes, "sid": f"key_{'0' * 32}", "role": "owner"}))
    opened = {method for scope in scopes.split() for method in open_to_scope(scope)}
    if Scope.USER in scopes.split():
        opened |= opened_to(Role.OWNER)
    assert await open_methods(channel, token) == rows(Access.ANYONE) | opened
    for process in PROCESSES:
        inside = methods_of(process).keys() & (rows(*NO_TOKEN) | opened)
        assert await open_methods(await doors.service(process), token) == inside


async def test_an_agent_opens_what_its_scopes_name_at_every_door(
    channel: grpc.aio.Channel, doors: Doors, agent: User, narrow_agent: User
) -> None:
    scopes = {*Scope} - {Scope.USER}
    opened = {method for scope in scopes for method in open_to_scope(scope)}
    for user, own in ((agent, opened), (narrow_agent, set[str]())):
        token = bearer(user.token)
        assert await open_methods(channel, token) == rows(Access.ANYONE) | own
        for process in PROCESSES:
            inside = methods_of(process).keys() & (rows(*NO_TOKEN) | own)
            assert await open_methods(await doors.service(process), token) == inside


def test_no_key_makes_keys_or_runs_the_tenant() -> None:
    narrow = {method for method in METHODS if scope_of(method) is not Scope.USER}
    assert not {method for method in narrow if method.startswith("/kimberly.auth.")}
    assert narrow <= rows(Access.USER)


# --- by name -----------------------------------------------------------------------------------

HELLO = jobs.WorkRequest(hello=jobs.Hello(worker_id="mine", kinds=["meditation.shard"]))
OPEN = scoring.ScoreRequest(open=scoring.Open(shard=0, lease_token=1, window=1, batch_size=1))
EMBED_OPEN = embedding.EmbedRequest(
    open=embedding.Open(job_id=f"job_{'0' * 32}", lease_token=1, models=["m"], batch_size=1)
)
WORKERS_CALLS: tuple[tuple[str, str, Message], ...] = (
    ("jobs", WORK, HELLO),
    ("memory", PLAN, scoring.PlanMeditationRequest(job_id=f"job_{'0' * 32}")),
    ("memory", SCORE, OPEN),
    ("memory", EMBED, EMBED_OPEN),
    ("auth", SIGN, users.SignCheckpointsRequest()),
)


@pytest.mark.parametrize(("process", "method", "request_"), WORKERS_CALLS)
async def test_a_user_does_no_work(
    channel: grpc.aio.Channel,
    doors: Doors,
    bob: User,
    process: str,
    method: str,
    request_: Message,
) -> None:
    for door in (channel, await doors.sidecar(process, EDGE), await doors.service(process)):
        answer = await answer_to(door, method, request_.SerializeToString(), bearer(bob.token))
        assert answer.code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("identity", [EDGE, *PROCESSES])
async def test_nobody_becomes_a_worker_by_saying_so(doors: Doors, identity: str) -> None:
    said = (("x-forwarded-client-cert", f"Hash=00;URI={DOMAIN.identity(WORKER)}"),)
    channel = await doors.sidecar("jobs", identity)
    answer = await answer_to(channel, WORK, HELLO.SerializeToString(), said)
    assert answer.code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("identity", [WORKER, *PROCESSES])
async def test_a_workload_with_a_users_token_is_still_no_edge(
    doors: Doors, bob: User, identity: str
) -> None:
    channel = await doors.sidecar("memory", identity)
    answer = await answer_to(channel, LIST_MEMORIES, b"", bearer(bob.token))
    assert answer.code is grpc.StatusCode.PERMISSION_DENIED


async def test_an_identity_that_only_begins_like_the_edges_is_another(
    doors: Doors, bob: User
) -> None:
    channel = await doors.sidecar("memory", f"{EDGE}-2")
    answer = await answer_to(channel, LIST_MEMORIES, b"", bearer(bob.token))
    assert answer.code is grpc.StatusCode.PERMISSION_DENIED
