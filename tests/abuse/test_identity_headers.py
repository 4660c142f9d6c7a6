"""What a client says of itself counts for nothing; only its token does."""

from __future__ import annotations

import json

import grpc
import httpx
import pytest
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from server.access import EDGE, WORKER
from tests.abuse.doors import DOMAIN, Doors
from tests.abuse.wire import Wire
from tests.mesh import PASSWORD, User, bearer
from tests.refusals import refusal_of
from tests.transports import Rest

GET_USER = "/kimberly.users.v1.UserService/GetUser"
WORK = "/kimberly.jobs.v1.WorkerService/Work"
WORKER_CERTIFICATE = f"Hash=00;URI={DOMAIN.identity(WORKER)}"

NAMES = (
    "x-user-id",
    "x-tenant-id",
    "x-mesh-user",
    "x-mesh-tenant-id",
    "x-jwt-payload",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-real-ip",
    "forwarded",
    "x-original-url",
    "x-rewrite-url",
    "x-http-method-override",
    "x-envoy-original-path",
    "x-envoy-internal",
)
UNDERSCORED = tuple(sorted({name.replace("-", "_") for name in NAMES if "-" in name}))


def claim(name: str, ann: User) -> str:
    """Return what somebody would write who wants to be Ann, a worker, or elsewhere."""
    values = {
        "x-tenant-id": ann.tenant_id,
        "x-mesh-tenant-id": ann.tenant_id,
        "x-jwt-payload": "eyJzdWIiOiJ1c3JfMSJ9",
        "x-forwarded-client-cert": WORKER_CERTIFICATE,
        "x-forwarded-host": "evil.example",
        "x-forwarded-for": "127.0.0.1",
        "x-real-ip": "127.0.0.1",
        "forwarded": "for=127.0.0.1;host=evil.example",
        "x-original-url": "/v1/memories",
        "x-rewrite-url": "/v1/memories",
        "x-http-method-override": "DELETE",
        "x-envoy-original-path": "/v1/memories",
        "x-envoy-internal": "true",
    }
    return values.get(name.replace("_", "-"), ann.id)


def everything(ann: User) -> dict[str, str]:
    return {name: claim(name, ann) for name in NAMES}


def of_http2(path: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    pseudo = {":method": "GET", ":scheme": "https", ":authority": "localhost", ":path": path}
    return [*pseudo.items(), *more]


# --- with a token ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_bob_stays_bob_over_http1(ann: User, bob: User, name: str) -> None:
    said = {name: claim(name, ann)}
    response = await bob.rest.raw("GET", "/v1/user", headers=said)
    assert response.json()["user"]["id"] == bob.id, response.text


@pytest.mark.parametrize("name", NAMES)
async def test_bob_stays_bob_over_http2(wire: Wire, ann: User, bob: User, name: str) -> None:
    said = (*bearer(bob.token), (name, claim(name, ann)))
    stream = await wire.http2(of_http2("/v1/user", *said))
    assert json.loads(stream.body)["user"]["id"] == bob.id


@pytest.mark.parametrize("name", NAMES)
async def test_bob_stays_bob_over_grpc(
    channel: grpc.aio.Channel, ann: User, bob: User, name: str
) -> None:
    said = (*bearer(bob.token), (name, claim(name, ann)))
    answer = await channel.unary_unary(GET_USER, bytes, bytes)(b"", metadata=said, timeout=30)
    assert users.GetUserResponse.FromString(answer).user.id == bob.id


async def test_bob_stays_bob_whatever_he_says_twice(wire: Wire, ann: User, bob: User) -> None:
    twice = [*everything(ann).items()] * 2
    answer = await wire.get("/v1/user", [*bearer(bob.token), *twice])
    assert json.loads(answer.body)["user"]["id"] == bob.id


async def test_bob_stays_bob_for_whoever_holds_the_edges_certificate(
    doors: Doors, ann: User, bob: User
) -> None:
    said = (*bearer(bob.token), *everything(ann).items())
    for door in (await doors.sidecar("auth", EDGE), await doors.service("auth")):
        answer = await door.unary_unary(GET_USER, bytes, bytes)(b"", metadata=said, timeout=30)
        assert users.GetUserResponse.FromString(answer).user.id == bob.id


async def test_bob_logs_in_as_bob(http: httpx.AsyncClient, ann: User, bob: User) -> None:
    # A method that needs no token: nobody has said yet who is calling.
    account = {"email": bob.email, "password": PASSWORD}
    tokens = (await http.post("/v1/login", json=account, headers=everything(ann))).json()["tokens"]
    seen = await Rest(http, tokens["accessToken"])(users.GetUserRequest())
    assert seen.user.id == bob.id


async def test_bob_writes_as_bob(ann: User, bob: User) -> None:
    body = {"memory": {"content": "whose is this?"}}
    made = await bob.rest.raw("POST", "/v1/memories", body, headers=everything(ann))
    memory = pb.GetMemoryRequest(id=made.json()["memory"]["id"])
    assert (await bob.grpc(memory)).memory.content == "whose is this?"
    events = (await bob.grpc(users.ListAuditEventsRequest(page_size=1))).events
    assert events[0].actor == bob.id
    await bob.grpc(pb.DeleteMemoryRequest(id=memory.id))


# --- without a token ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_a_header_is_no_token_over_http1(
    http: httpx.AsyncClient, ann: User, name: str
) -> None:
    response = await http.get("/v1/user", headers={name: claim(name, ann)})
    assert response.status_code == httpx.codes.UNAUTHORIZED


@pytest.mark.parametrize("name", NAMES)
async def test_a_header_is_no_token_over_http2(wire: Wire, ann: User, name: str) -> None:
    stream = await wire.http2(of_http2("/v1/user", (name, claim(name, ann))))
    assert json.loads(stream.body)["code"] == grpc.StatusCode.UNAUTHENTICATED.value[0]


@pytest.mark.parametrize("name", NAMES)
async def test_a_header_is_no_token_over_grpc(
    channel: grpc.aio.Channel, ann: User, name: str
) -> None:
    said = ((name, claim(name, ann)),)
    call = channel.unary_unary(GET_USER, bytes, bytes)(b"", metadata=said, timeout=30)
    assert (await refusal_of(call)).code is grpc.StatusCode.UNAUTHENTICATED


async def test_no_header_makes_a_service_believe(doors: Doors, ann: User) -> None:
    channel = await doors.service("auth")
    said = tuple(everything(ann).items())
    call = channel.unary_unary(GET_USER, bytes, bytes)(b"", metadata=said, timeout=30)
    assert (await refusal_of(call)).reason == "TOKEN_INVALID"


# --- with underscores --------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNDERSCORED)
async def test_an_underscore_is_refused_over_http1(
    wire: Wire, ann: User, bob: User, name: str
) -> None:
    answer = await wire.get("/v1/user", [*bearer(bob.token), (name, claim(name, ann))])
    assert answer.status == httpx.codes.BAD_REQUEST


@pytest.mark.parametrize("name", UNDERSCORED)
async def test_an_underscore_ends_the_stream_over_http2(
    wire: Wire, ann: User, bob: User, name: str
) -> None:
    said = (*bearer(bob.token), (name, claim(name, ann)))
    stream = await wire.http2(of_http2("/v1/user", *said))
    assert (stream.body, len(stream.resets)) == (b"", 1)


@pytest.mark.parametrize("name", UNDERSCORED)
async def test_an_underscore_ends_the_call_over_grpc(
    channel: grpc.aio.Channel, ann: User, bob: User, name: str
) -> None:
    said = (*bearer(bob.token), (name, claim(name, ann)))
    call = channel.unary_unary(GET_USER, bytes, bytes)(b"", metadata=said, timeout=30)
    assert (await refusal_of(call)).code is grpc.StatusCode.INTERNAL


# --- what else headers might do ----------------------------------------------------------------


async def test_nobody_becomes_a_worker_through_the_edge(
    channel: grpc.aio.Channel, bob: User
) -> None:
    said = (*bearer(bob.token), ("x-forwarded-client-cert", WORKER_CERTIFICATE))
    call = channel.unary_unary(WORK, bytes, bytes)(b"", metadata=said, timeout=30)
    assert (await refusal_of(call)).code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "name", ["x-http-method-override", "x-http-method", "x-method-override", "_method"]
)
async def test_a_get_deletes_nothing(wire: Wire, bob: User, name: str) -> None:
    memory = pb.Memory(content=f"kept, whatever {name} says")
    kept = (await bob.grpc(pb.CreateMemoryRequest(memory=memory))).memory
    await wire.get(f"/v1/memories/{kept.id}", [*bearer(bob.token), (name, "DELETE")])
    assert (await bob.grpc(pb.GetMemoryRequest(id=kept.id))).memory == kept
    await bob.grpc(pb.DeleteMemoryRequest(id=kept.id))


async def test_a_client_does_not_set_the_timeouts_of_the_mesh(bob: User) -> None:
    said = {"x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-expected-rq-timeout-ms": "1"}
    for _ in range(10):
        response = await bob.rest.raw("GET", "/v1/user", headers=said)
        assert response.status_code == httpx.codes.OK


async def test_a_client_does_not_choose_its_request_id(bob: User) -> None:
    response = await bob.rest.raw("GET", "/v1/user", headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] != "mine"
