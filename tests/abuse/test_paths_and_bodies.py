"""Paths that pretend, bodies that are none, sizes that are too much; and then it still serves."""

from __future__ import annotations

import asyncio
import json
import time

import grpc
import httpx
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from local.envoy import EdgeLimits
from local.mesh import Mesh
from server.access import PROCESSES
from tests.abuse.wire import Answer, Wire
from tests.mesh import User, bearer
from tests.refusals import Refusal, refusal_of

GET_USER = "/kimberly.users.v1.UserService/GetUser"
GET_MEMORY = "/kimberly.memory.v1.MemoryService/GetMemory"
CREATE_MEMORY = "/kimberly.memory.v1.MemoryService/CreateMemory"
IMPORT_MEMORIES = "/kimberly.memory.v1.MemoryService/ImportMemories"
MEBIBYTE = 1 << 20
EDGE_SECONDS = EdgeLimits().unary_seconds
"""After so long the edge ends a call by itself."""
NAMELESS = f"mem_{'0' * 32}"
HALF_A_FRAME = b"\0\0\0\0\5ab"
"""A gRPC message that says it has five bytes, and has two."""


# --- paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v1/memories/..%2fuser",
        "/v1/memories/..%2Fuser",
        "/v1/memories/..%5cuser",
        "/v1/memories/mem_1%00",
        "/v1/user#fragment",
        "/v1/memories/ mem_1",
    ],
)
async def test_a_path_with_hidden_separators_is_refused(wire: Wire, bob: User, path: str) -> None:
    answer = await wire.get(path, bearer(bob.token))
    assert answer.status == httpx.codes.BAD_REQUEST
    expect_words(answer, grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_MALFORMED")


def expect_words(answer: Answer, code: grpc.StatusCode, reason: str) -> None:
    """Expect a refusal as the services write them."""
    body = json.loads(answer.body)
    assert (body["code"], body["details"][0]["reason"]) == (code.value[0], reason)
    assert body["message"]


@pytest.mark.parametrize(
    "tail",
    [
        f"{NAMELESS};role=admin",
        f"{NAMELESS}%0d%0ax-user-id:1",
        f"{NAMELESS}%20",
        f"{NAMELESS}.json",
        "%252e%252e%252fuser",
        "..%253buser",
        "mem_%F0%9F%98%80",
        "mem_" + "A" * 32,
        "mem_" + "a" * 4000,
        "'%20OR%201=1--",
    ],
)
async def test_what_reaches_the_service_as_an_id_must_be_one(
    wire: Wire, bob: User, tail: str
) -> None:
    answer = await wire.get(f"/v1/memories/{tail}", bearer(bob.token))
    assert answer.status == httpx.codes.BAD_REQUEST
    assert json.loads(answer.body)["details"][0]["reason"] == "FIELD_INVALID"


@pytest.mark.parametrize(
    "path", ["/v1/memories/../user", "/v1/memories/%2e%2e/user", "//v1//user", "/v1/login/../user"]
)
async def test_a_path_is_judged_as_it_is_served(wire: Wire, bob: User, path: str) -> None:
    # Dots and slashes are resolved first: what needs a token does so by any of its names.
    assert (await wire.get(path)).status == httpx.codes.UNAUTHORIZED
    answer = await wire.get(path, bearer(bob.token))
    assert json.loads(answer.body)["user"]["id"] == bob.id


@pytest.mark.parametrize(
    "path",
    [
        "/v1/signup/../user",
        "/v1/login/%2e%2e/user",
        "/v1/login/..;/user",
        "/v1/login;/../user",
        "/.well-known/jwks.json/../../v1/user",
        "/healthz/../v1/user",
        "/v1/user?x=/v1/login",
        "/v1/user/",
        "/V1/user",
    ],
)
async def test_no_open_path_leads_past_the_token(wire: Wire, path: str) -> None:
    answer = await wire.get(path)
    assert answer.status in {400, 401, 404}, answer.body


@pytest.mark.parametrize("target", ["https://evil.example/v1/user", "http://127.0.0.1:1/v1/user"])
async def test_the_edge_is_no_proxy(wire: Wire, bob: User, target: str) -> None:
    answer = await wire.get(target, bearer(bob.token))
    assert json.loads(answer.body).get("user", {}).get("id") in {None, bob.id}
    assert answer.status == (404 if "evil" in target else 200)


async def test_a_request_without_a_host_is_refused(wire: Wire) -> None:
    answer = await wire.http1("GET /v1/user HTTP/1.1\r\n\r\n")
    assert answer.status == httpx.codes.BAD_REQUEST
    expect_words(answer, grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_MALFORMED")


async def test_a_connection_stays_what_it_is(wire: Wire, bob: User) -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket", **dict(bearer(bob.token))}
    answer = await wire.get("/v1/user", upgrade)
    assert answer.status == httpx.codes.FORBIDDEN
    expect_words(answer, grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED")


# --- HTTP/1.1 framing --------------------------------------------------------------------------

QUERY = '{"query": "boat"}'
CHUNKED = f"{len(QUERY):x}\r\n{QUERY}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("framing", "body", "statuses"),
    [
        ("content-length: 4\r\ntransfer-encoding: chunked", CHUNKED, {400}),
        ("transfer-encoding: chunked\r\ncontent-length: 4", CHUNKED, {400}),
        (f"content-length: 4\r\ncontent-length: {len(QUERY)}", QUERY, {400}),
        ("content-length: -1", QUERY, {400}),
        ("content-length: 4x", QUERY, {400}),
        ("transfer-encoding: chunked, identity", CHUNKED, {400, 501}),
        ("transfer-encoding: xchunked", CHUNKED, {400, 501}),
        ("transfer-encoding : chunked", CHUNKED, {400}),
        ("transfer-encoding: chunked", f"xyz\r\n{QUERY}\r\n0\r\n\r\n", {400}),
    ],
)
async def test_a_body_of_two_minds_about_its_length_is_refused(
    wire: Wire, bob: User, framing: str, body: str, statuses: set[int]
) -> None:
    answer = await wire.http1(
        "POST /v1/memories:query HTTP/1.1\r\nhost: localhost\r\n"
        f"authorization: Bearer {bob.token}\r\ncontent-type: application/json\r\n"
        f"{framing}\r\n\r\n{body}"
    )
    assert answer.status in statuses, answer.body


@pytest.mark.parametrize(
    ("line", "statuses"),
    [
        ("GET /v1/user HTTP/1.0", {426}),
        ("QUERY /v1/user HTTP/1.1", {400, 404}),
        ("TRACE /v1/user HTTP/1.1", {404}),
        ("CONNECT localhost:22 HTTP/1.1", {400, 404}),
        ("GET /v1/user HTTP/9.9", {426}),
        ("GET /v1/user", {426}),
    ],
)
async def test_an_odd_request_line_is_refused(
    wire: Wire, bob: User, line: str, statuses: set[int]
) -> None:
    head = f"{line}\r\nhost: localhost\r\nauthorization: Bearer {bob.token}\r\n\r\n"
    assert (await wire.http1(head)).status in statuses


async def test_two_hosts_are_refused(wire: Wire, bob: User) -> None:
    answer = await wire.get("/v1/user", [*bearer(bob.token), ("host", "evil.example")])
    assert answer.status in {400, 404}


@pytest.mark.parametrize(
    "headers",
    [[("x-big", "a" * 20_000)], [(f"x-{number}", "a") for number in range(100)]],
    ids=["large", "many"],
)
async def test_too_much_of_headers_is_431(
    wire: Wire, bob: User, headers: list[tuple[str, str]]
) -> None:
    answer = await wire.get("/v1/user", [*bearer(bob.token), *headers])
    assert answer.status == 431


# --- JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"memory":' * 3000 + b"1" + b"}" * 3000,
        b"[" * 3000 + b"]" * 3000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
    ],
    ids=["known", "arrays", "unknown"],
)
@pytest.mark.parametrize("path", ["/v1/memories", "/v1/memories:import"])
async def test_json_3000_levels_deep_is_refused(bob: User, path: str, body: bytes) -> None:
    response = await bob.rest.raw("POST", path, content=body)
    assert response.status_code == httpx.codes.BAD_REQUEST, response.text


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_a_page_elsewhere_cannot_post_for_a_user(http: httpx.AsyncClient, kind: str) -> None:
    # These are what a browser sends without asking first. It sends no token with them, and has
    # no cookie to send.
    body = json.dumps({"memory": {"content": "forged"}}).encode()
    headers = {"content-type": kind, "origin": "https://evil.example"}
    response = await http.post("/v1/memories", content=body, headers=headers)
    assert response.status_code == httpx.codes.UNAUTHORIZED
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("value", ["1e400", "-1", "NaN", "9" * 400, '"1e3000"', "2147483648"])
async def test_a_number_out_of_range_is_refused(bob: User, value: str) -> None:
    body = f'{{"query": "boat", "topK": {value}}}'.encode()
    response = await bob.rest.raw("POST", "/v1/memories:query", content=body)
    assert response.status_code == httpx.codes.BAD_REQUEST, response.text


# --- gRPC messages -----------------------------------------------------------------------------


async def answer_to(bob: User, method: str, data: bytes) -> Refusal:
    call = bob.grpc.channel.unary_unary(method, bytes, bytes)
    return await refusal_of(call(data, metadata=bob.grpc.metadata, timeout=10))


GOOD = pb.CreateMemoryRequest(memory=pb.Memory(content="a whole sentence")).SerializeToString()


@pytest.mark.parametrize("method", [GET_USER, GET_MEMORY, CREATE_MEMORY, IMPORT_MEMORIES])
@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff",
        b"\x0a\x05ab",
        b"\x0a" + b"\xff" * 11,
        b"\x0e\x01",
        b"\x0c",
        b'{"id": "mem_1"}',
    ],
    ids=[
        "rubbish",
        "cut short",
        "overlong varint",
        "no such wire type",
        "stray end of group",
        "JSON",
    ],
)
async def test_bytes_that_are_no_message_are_refused_with_a_reason(
    bob: User, method: str, data: bytes
) -> None:
    answer = await answer_to(bob, method, data)
    assert answer == Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "MESSAGE_MALFORMED",
        (),
        "the request is not a valid message of its type",
    )


@pytest.mark.parametrize("size", range(1, len(GOOD)))
async def test_a_message_that_is_cut_anywhere_stores_nothing(bob: User, size: int) -> None:
    answer = await answer_to(bob, CREATE_MEMORY, GOOD[:size])
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_deeply_nested_unknown_field_is_refused(bob: User) -> None:
    data = b""
    for _ in range(2000):
        data = b"\xfb\x01" + data + b"\xfc\x01"
    assert (await answer_to(bob, GET_USER, data)).reason == "MESSAGE_MALFORMED"


@pytest.mark.parametrize("method", [GET_USER, CREATE_MEMORY, IMPORT_MEMORIES])
async def test_five_mebibytes_are_too_much_and_the_connection_serves_on(
    mesh: Mesh, bob: User, method: str
) -> None:
    before = {name: mesh.process(name).pid for name in PROCESSES}
    answer = await answer_to(bob, method, b"x" * (5 * MEBIBYTE))
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert bob.grpc.channel.get_state() is grpc.ChannelConnectivity.READY
    call = bob.grpc.channel.unary_unary(GET_USER, bytes, bytes)
    assert bob.id.encode() in await call(b"", metadata=bob.grpc.metadata, timeout=30)
    assert {name: mesh.process(name).pid for name in PROCESSES} == before


async def test_what_is_too_large_for_the_edge_is_told_so_over_grpc_web(
    http: httpx.AsyncClient, bob: User
) -> None:
    size = 6 * MEBIBYTE
    status, response = await web(http, bob, b"\0" + size.to_bytes(4) + bytes(size))
    assert response.status_code == httpx.codes.OK
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


async def test_many_unknown_fields_are_just_ignored(bob: User) -> None:
    data = b"\xf8\x07\x01" * 100_000
    call = bob.grpc.channel.unary_unary(GET_USER, bytes, bytes)
    assert bob.id.encode() in await call(data, metadata=bob.grpc.metadata, timeout=30)


# --- gRPC metadata -----------------------------------------------------------------------------


async def web(
    http: httpx.AsyncClient, bob: User, body: bytes, **headers: str
) -> tuple[int, httpx.Response]:
    """Call GetUser with gRPC-Web, whose headers go as given; return the gRPC status as well."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    common = {"content-type": "application/grpc-web+proto", **dict(bearer(bob.token))}
    response = await http.post(GET_USER, content=body, headers=common | named)
    return int(response.headers.get("grpc-status", "0")), response


@pytest.mark.parametrize("frame", [b"\0\0\0\0\0", b"\1\0\0\0\2ab"], ids=["plain", "compressed"])
async def test_an_unknown_compression_is_refused(
    http: httpx.AsyncClient, bob: User, frame: bytes
) -> None:
    status, _ = await web(http, bob, frame, grpc_encoding="weird")
    code = grpc.StatusCode.UNIMPLEMENTED.value[0]
    assert status in {code, grpc.StatusCode.INTERNAL.value[0]}


@pytest.mark.parametrize("given", ["99999999S", "99999999H", "rubbish", "-1S", "1"])
async def test_no_timeout_is_too_odd_to_serve(
    http: httpx.AsyncClient, bob: User, given: str
) -> None:
    status, response = await web(http, bob, b"\0\0\0\0\0", grpc_timeout=given)
    assert status == 0
    assert bob.id.encode() in response.content


@pytest.mark.parametrize("body", [b"", b"\0\0\0\0", HALF_A_FRAME, b"\0\xff\xff\xff\xffab"])
async def test_a_message_that_never_ends_is_given_up_at_the_deadline(
    http: httpx.AsyncClient, bob: User, body: bytes
) -> None:
    started = time.monotonic()
    status, response = await web(http, bob, body, grpc_timeout="200m")
    assert status != 0
    assert b"usr_" not in response.content
    assert time.monotonic() - started < EDGE_SECONDS


async def test_the_edge_serves_on_while_hundreds_of_messages_never_end(
    http: httpx.AsyncClient, bob: User
) -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(90):
            tasks.create_task(web(http, bob, HALF_A_FRAME, grpc_timeout="500m"))
        call = bob.grpc.channel.unary_unary(GET_USER, bytes, bytes)
        assert bob.id.encode() in await call(b"", metadata=bob.grpc.metadata, timeout=30)
