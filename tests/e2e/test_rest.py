"""What is particular to REST: its JSON, its HTTP codes, its parameters."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from tests.mesh import PASSWORD, User
from tests.transports import Rest

ABSENT = {"score", "feedback", "expireTime", "archiveTime", "deleteTime"}
"""What a new memory has not; in JSON it is not there."""
MEMORY_KEYS = {field.json_name for field in pb.Memory.DESCRIPTOR.fields} - ABSENT
MEBIBYTE = 1 << 20
UNKNOWN = "0" * 32


def ok(response: httpx.Response) -> Any:
    assert response.status_code == httpx.codes.OK, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


async def keep(user: User, content: str, **fields: object) -> dict[str, Any]:
    body = {"memory": {"content": content, **fields}}
    kept: dict[str, Any] = ok(await user.rest.raw("POST", "/v1/memories", body))["memory"]
    return kept


def expect(response: httpx.Response, status: int, code: int, reason: str) -> None:
    """Expect the JSON of a refusal, whole."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"code", "message", "details"}
    assert (body["code"], bool(body["message"])) == (code, True)
    reasons = [detail["reason"] for detail in body["details"] if "domain" in detail]
    assert reasons == ([reason] if reason else [])


# --- JSON --------------------------------------------------------------------------------------


async def test_a_memory_is_written_in_lower_camel_case(user: User) -> None:
    kept = await keep(user, "Ann sails", sessionId="s", sessionPosition=0, tier="TIER_PERMANENT")
    assert set(kept) == MEMORY_KEYS
    assert (kept["tier"], kept["source"]) == ("TIER_PERMANENT", "SOURCE_CHAT")
    # 64-bit integers are strings in protobuf's JSON, empty strings are there.
    assert (kept["sizeBytes"], kept["version"], kept["speaker"]) == ("9", "1", "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", kept["createTime"])


async def test_snake_case_is_understood_as_well(user: User) -> None:
    kept = await keep(user, "Ann sails", session_id="s", session_position=3)
    assert (kept["sessionId"], kept["sessionPosition"]) == ("s", 3)


async def test_a_refusal_is_json_with_code_message_and_details(user: User) -> None:
    response = await user.rest.raw("GET", "/v1/memories/nonsense")
    assert response.status_code == httpx.codes.BAD_REQUEST
    error, fault = (
        "type.googleapis.com/google.rpc.ErrorInfo",
        "must be mem_ and 32 hexadecimal digits",
    )
    violation = {"field": "id", "description": fault, "reason": ""}
    assert response.json() == {
        "code": 3,
        "message": f"id: {fault}",
        "details": [
            {"@type": error, "reason": "FIELD_INVALID", "domain": "kimberly", "metadata": {}},
            {
                "@type": "type.googleapis.com/google.rpc.BadRequest",
                "fieldViolations": [violation],
            },
        ],
    }


async def test_answers_are_not_to_be_cached_or_sniffed_and_name_their_request(user: User) -> None:
    headers = (await user.rest.raw("GET", "/v1/user")).headers
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert headers["x-request-id"]
    assert "set-cookie" not in headers


# --- codes -------------------------------------------------------------------------------------


async def test_an_unknown_memory_is_404(user: User) -> None:
    response = await user.rest.raw("GET", f"/v1/memories/mem_{UNKNOWN}")
    expect(response, 404, 5, "RESOURCE_NOT_FOUND")


async def test_a_stale_etag_is_409(user: User) -> None:
    kept = await keep(user, "Ann sails")
    path, query = f"/v1/memories/{kept['id']}", {"updateMask": "content"}
    ok(await user.rest.raw("PATCH", path, {"content": "Ann rows"}, query))
    stale = {"content": "Ann swims", "etag": kept["etag"]}
    expect(await user.rest.raw("PATCH", path, stale, query), 409, 10, "ETAG_MISMATCH")


async def test_an_email_that_is_taken_is_409(user: User) -> None:
    again = {"email": user.email, "password": PASSWORD}
    expect(await user.rest.raw("POST", "/v1/signup", again), 409, 6, "RESOURCE_EXISTS")


async def test_a_wrong_password_is_401(http: httpx.AsyncClient, user: User) -> None:
    attempt = {"email": user.email, "password": "wrong" * 3}
    response = await http.post("/v1/login", json=attempt)
    expect(response, 401, 16, "CREDENTIALS_INVALID")


async def test_a_call_without_a_token_is_401(http: httpx.AsyncClient) -> None:
    expect(await http.get("/v1/user"), 401, 16, "TOKEN_INVALID")


async def test_what_cannot_be_done_yet_is_400(user: User) -> None:
    kept = await keep(user, "Ann sails")
    file = {"fileName": "a", "contentType": "text/plain", "sizeBytes": "1", "sha256": "00" * 32}
    announced = ok(await user.rest.raw("POST", f"/v1/memories/{kept['id']}/attachments", file))
    path = f"/v1/attachments/{announced['attachment']['id']}:complete"
    expect(await user.rest.raw("POST", path, {}), 400, 9, "UPLOAD_MISMATCH")


@pytest.mark.parametrize("path", ["/v1/memories", "/v1/memories:import", "/v1/memories:query"])
async def test_a_body_over_a_mebibyte_is_413(user: User, path: str) -> None:
    body = b'{"query": "' + b"x" * MEBIBYTE + b'"}'
    response = await user.rest.raw("POST", path, content=body)
    expect(response, 413, 8, "MESSAGE_TOO_LARGE")


async def test_a_body_just_under_a_mebibyte_is_read(user: User) -> None:
    body = {"memory": {"content": "x" * (MEBIBYTE - 1024)}}
    response = await user.rest.raw("POST", "/v1/memories", body)
    expect(response, 400, 3, "FIELD_INVALID")


@pytest.mark.parametrize(
    ("verb", "path"),
    [("GET", "/v1/nowhere"), ("PUT", "/v1/memories"), ("GET", "/"), ("POST", "/v1/user")],
)
async def test_what_the_contract_does_not_have_is_404(user: User, verb: str, path: str) -> None:
    expect(await user.rest.raw(verb, path), 404, 5, "METHOD_NOT_FOUND")


# --- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/v1/user?verbose=1", "verbose"),
        ("/v1/memories?page_sice=1", "page_sice"),
        ("/v1/memories?tier=TIER_OF_MINE", "TIER_OF_MINE"),
        ("/v1/memories?pageSize=many", "many"),
    ],
)
async def test_a_parameter_that_is_not_understood_is_400(user: User, path: str, named: str) -> None:
    response = await user.rest.raw("GET", path)
    expect(response, 400, 3, "MESSAGE_MALFORMED")
    assert named in response.json()["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"memory": {"content": "a", "tier": "TIER_OF_MINE"}}',
        b'{"memory": {"content": 7}}',
        b'{"memory": {"content": "a", "sessionPosition": "first"}}',
        b'{"memory": ',
        b"memory=a",
        b'{"memory": {"content": "\xff"}}',
    ],
)
async def test_a_body_that_is_not_understood_is_400(user: User, body: bytes) -> None:
    response = await user.rest.raw("POST", "/v1/memories", content=body)
    expect(response, 400, 3, "MESSAGE_MALFORMED")
    assert ok(await user.rest.raw("GET", "/v1/memories"))["memories"] == []


async def test_a_patch_names_its_fields_in_the_query(user: User) -> None:
    kept = await keep(user, "Ann sails", tags=["ann"], speaker="Bo")
    response = await user.rest.raw(
        "PATCH",
        f"/v1/memories/{kept['id']}?updateMask=content,tags",
        {"content": "Ann rows", "tags": ["boat"], "speaker": "Cy", "etag": kept["etag"]},
    )
    after = ok(response)["memory"]
    assert (after["content"], after["tags"], after["speaker"]) == ("Ann rows", ["boat"], "Bo")


async def test_a_mask_is_written_in_camel_case(user: User) -> None:
    kept = await keep(user, "Ann sails")
    change = {"occurTime": "2020-02-02T20:20:20Z"}
    path = f"/v1/memories/{kept['id']}?updateMask=occurTime"
    assert ok(await user.rest.raw("PATCH", path, change))["memory"]["occurTime"] == (
        "2020-02-02T20:20:20Z"
    )


async def test_a_list_is_filtered_by_repeated_parameters(user: User) -> None:
    both = await keep(user, "Ann sails", tags=["ann", "sea"])
    await keep(user, "Ann cooks", tags=["ann"])
    await keep(user, "Ann naps", tags=["ann", "sea"], tier="TIER_SHORT_TERM")
    listed = ok(await user.rest.raw("GET", "/v1/memories?tags=ann&tags=sea&tier=TIER_LONG_TERM"))
    assert [memory["id"] for memory in listed["memories"]] == [both["id"]]
    assert listed["nextPageToken"] == ""


async def test_an_import_is_a_json_array_of_chunks(user: User) -> None:
    chunks = [
        {"firstIndex": "0", "memories": [{"content": "one"}, {"content": ""}]},
        {"firstIndex": "2", "memories": [{"content": "two"}]},
    ]
    outcome = ok(await user.rest.raw("POST", "/v1/memories:import", chunks))
    assert (outcome["created"], outcome["existing"], outcome["refused"]) == ("2", "0", "1")
    assert outcome["refusals"][0]["index"] == "1"


# --- what others rely on -----------------------------------------------------------------------


async def test_tokens_are_exchanged_as_json(http: httpx.AsyncClient, user: User) -> None:
    body = {"refreshToken": user.tokens.refresh_token}
    tokens = ok(await http.post("/v1/token:refresh", json=body))["tokens"]
    assert tokens["accessTokenLifetime"] == "600s"
    shown = ok(await Rest(http, tokens["accessToken"]).raw("GET", "/v1/user"))
    assert shown["user"]["id"] == user.id


async def test_the_key_set_is_one_that_jwt_libraries_read(http: httpx.AsyncClient) -> None:
    (key,) = ok(await http.get("/.well-known/jwks.json"))["keys"]
    assert set(key) == {"kty", "crv", "kid", "use", "alg", "x", "y"}


async def test_the_edge_tells_load_balancers_that_it_is_well(http: httpx.AsyncClient) -> None:
    response = await http.get("/healthz")
    assert (response.status_code, response.content) == (200, b"")


async def test_json_may_come_as_plain_text(user: User) -> None:
    headers = {"content-type": "text/plain"}
    body = json.dumps({"memory": {"content": "plain"}}).encode()
    response = await user.rest.raw("POST", "/v1/memories", content=body, headers=headers)
    assert ok(response)["created"]
