"""Clients reach the services over gRPC, REST and gRPC-Web, as whom their token names."""

import json
import time
from collections.abc import Callable

import grpc
import httpx
import pytest
from joserfc.jwk import ECKey

from local import envoy
from server import access
from tests.deploy.envoy.site import (
    EXPORTED,
    GET_MEMORY,
    GET_USER,
    LOCAL,
    WATCHED_SECONDS,
    WORK,
    App,
    Site,
    bearer,
    call,
    eventually,
    expect,
    grpcurl,
    token,
)


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
    with client.stream("GET", "/v1/memories:watch", headers=bearer(token())) as response:
        expect_streamed(response)
        arrived = [(json.loads(line), time.monotonic()) for line in response.iter_lines()]
    assert [line.get("cursor") for line, _ in arrived[:-1]] == [
        f"{second}" for second in range(WATCHED_SECONDS)
    ]
    # What is held back until the end comes all at once.
    apart = arrived[-1][1] - arrived[0][1]
    assert apart > WATCHED_SECONDS / 2, "the first line does not wait for the others"
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
        # The last one may be half written.
        lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        routes = {line["request_id"]: line["route"] for line in lines}
        calls = [each.headers["x-request-id"] for each in (answered, nameless, wrong, refused)]
        assert [routes.get(call) for call in calls] == [GET_MEMORY, "rest", "rest", "rest"]
        assert "seen-in" not in text
        assert secret not in text

    eventually(logged)
