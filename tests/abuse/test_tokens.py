"""A token that is not quite right opens no door: not the edge, not a sidecar, not a service."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from server import ids
from server.access import EDGE
from tests.abuse.doors import Doors
from tests.abuse.forgery import ABSENT, Forger, es256, hs256, jwk_of
from tests.mesh import User, bearer
from tests.refusals import Refusal, refusal_of
from tests.transports import Metadata, Rest

GET_USER = "/kimberly.users.v1.UserService/GetUser"
BY_PROCESS = {
    "auth": GET_USER,
    "memory": "/kimberly.memory.v1.MemoryService/ListMemories",
    "jobs": "/kimberly.jobs.v1.JobService/ListJobs",
}
HOUR = 3600
OWN_KEY = ec.generate_private_key(ec.SECP256R1())

Make = Callable[[Forger], str]


def claims(**changed: object) -> Make:
    return lambda forger: forger.token(changed)


def header(**changed: object) -> Make:
    return lambda forger: forger.token(header=changed)


def own_key(**changed: object) -> Make:
    return lambda forger: forger.token(header=changed, sign=es256(OWN_KEY))


def with_another_subject(forger: Forger) -> str:
    """Swap the claims under an honest signature."""
    first, _, last = forger.token().split(".")
    _, other, _ = forger.token({"sub": ids.show(ids.USER, ids.new_id())}).split(".")
    return f"{first}.{other}.{last}"


def now(seconds: int = 0) -> int:
    return int(time.time()) + seconds


FORGED: Mapping[str, Make] = {
    # Algorithms and keys (A1).
    "alg none": lambda forger: forger.token(header={"alg": "none"}, sign=lambda _: b""),
    "alg None": lambda forger: forger.token(header={"alg": "None"}, sign=lambda _: b""),
    "no signature": lambda forger: forger.token(sign=lambda _: b""),
    "HS256 with the public key": lambda forger: forger.token(
        header={"alg": "HS256"}, sign=hs256(forger.public_pem)
    ),
    "HS256 with no key": lambda forger: forger.token(header={"alg": "HS256"}, sign=hs256(b"")),
    "ES256 named, HS256 used": lambda forger: forger.token(sign=hs256(forger.public_pem)),
    "ES384 named": header(alg="ES384"),
    "own key, our kid": own_key(),
    "own key, own kid": own_key(kid="mine"),
    "own key, no kid": own_key(kid=ABSENT),
    "own key, a path for a kid": own_key(kid="../../dev/null"),
    "own key, embedded": own_key(jwk=jwk_of(OWN_KEY)),
    "own key, embedded, no kid": own_key(jwk=jwk_of(OWN_KEY), kid=ABSENT),
    "own key, to be fetched": own_key(jku="https://evil.example/jwks.json", kid="mine"),
    "own key, certified": own_key(x5u="https://evil.example/cert.pem"),
    "signature of zeros": lambda forger: forger.token(sign=lambda _: bytes(64)),
    "signature cut short": lambda forger: forger.token()[:-8],
    "signature of other claims": with_another_subject,
    # Claims (A2).
    "another issuer": claims(iss="https://elsewhere.example"),
    "no issuer": claims(iss=ABSENT),
    "another audience": claims(aud="other"),
    "no audience": claims(aud=ABSENT),
    "expired": lambda forger: forger.token(
        {"exp": now(-HOUR), "iat": now(-HOUR - 600), "nbf": now(-HOUR - 600)}
    ),
    "no expiry": claims(exp=ABSENT),
    "expiry is text": claims(exp="tomorrow"),
    "a day long": lambda forger: forger.token({"exp": now(24 * HOUR)}),
    "not valid yet": lambda forger: forger.token({"nbf": now(HOUR), "exp": now(HOUR + 60)}),
    "a thousand years": claims(exp=1 << 40),
    # Whom it names (A3).
    "no subject": claims(sub=ABSENT),
    "empty subject": claims(sub=""),
    "subject is a list": claims(sub=["usr_1"]),
    "subject is a number": claims(sub=1),
    "subject is no user": claims(sub="admin"),
    "subject is a service": claims(sub="spiffe://kimberly.local/ns/local/sa/worker"),
    "subject with a line break": claims(sub="usr_1\r\nx-user-id: 1"),
    "subject of another kind": lambda forger: forger.token({"sub": forger.tenant_id}),
    "no tenant": claims(tid=ABSENT),
    "tenant is no tenant": claims(tid="*"),
    # What its header asks for.
    "unknown crit": header(crit=["exp"]),
    "crit with its member": header(crit=["b64"], b64=False),
    "another kind of token": header(typ="JWT"),
    "no kind of token": header(typ=ABSENT),
    # What OpenID has for clients to read, and not for services (A4).
    "an ID token": lambda forger: forger.token(
        {"aud": "kimberly-cli", "scope": ABSENT, "tid": ABSENT, "nonce": "n", "auth_time": now()},
        {"typ": "JWT"},
    ),
    "an ID token for us": lambda forger: forger.token(
        {"scope": ABSENT, "nonce": "n", "auth_time": now()}, {"typ": "JWT"}
    ),
    # No token at all.
    "rubbish": lambda _: "rubbish",
    "dots": lambda _: "..",
    "a dot": lambda _: ".",
    "null": lambda _: base64.urlsafe_b64encode(b"null").decode().rstrip("=") + ".bnVsbA.AA",
}

REFUSED_BY_ENVOY = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}


async def shown(channel: grpc.aio.Channel, metadata: Metadata, method: str = GET_USER) -> bytes:
    call = channel.unary_unary(method, bytes, bytes)
    answer: bytes = await call(b"", metadata=metadata, timeout=30)
    return answer


async def answer_at(channel: grpc.aio.Channel, token: str, method: str = GET_USER) -> Refusal:
    return await refusal_of(shown(channel, bearer(token), method))


@pytest.mark.parametrize("kind", FORGED)
async def test_a_forged_token_is_refused_at_the_edge(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, forger: Forger, kind: str
) -> None:
    token = FORGED[kind](forger)
    response = await Rest(http).raw("GET", "/v1/user", headers=dict(bearer(token)))
    assert response.status_code in {401, 403}, response.text
    assert (await answer_at(channel, token)).code in REFUSED_BY_ENVOY


@pytest.mark.parametrize("process", BY_PROCESS)
@pytest.mark.parametrize("kind", FORGED)
async def test_a_forged_token_is_refused_at_a_sidecar(
    doors: Doors, forger: Forger, kind: str, process: str
) -> None:
    channel = await doors.sidecar(process, EDGE)
    refusal = await answer_at(channel, FORGED[kind](forger), BY_PROCESS[process])
    assert refusal.code in REFUSED_BY_ENVOY


@pytest.mark.parametrize("process", BY_PROCESS)
@pytest.mark.parametrize("kind", FORGED)
async def test_a_forged_token_is_refused_by_the_service_itself(
    doors: Doors, forger: Forger, kind: str, process: str
) -> None:
    channel = await doors.service(process)
    refusal = await answer_at(channel, FORGED[kind](forger), BY_PROCESS[process])
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")


async def test_the_forgers_hand_is_good_enough(
    channel: grpc.aio.Channel, doors: Doors, forger: Forger
) -> None:
    # Else the tests above would show nothing.
    honest = bearer(forger.token())
    for process, method in BY_PROCESS.items():
        for door in (channel, await doors.sidecar(process, EDGE), await doors.service(process)):
            answer = await shown(door, honest, method)
            assert method != GET_USER or forger.user_id.encode() in answer


async def test_a_true_token_of_a_user_who_does_not_exist_shows_nothing(
    channel: grpc.aio.Channel, forger: Forger
) -> None:
    token = forger.token({"sub": ids.show(ids.USER, ids.new_id())})
    refusal = await answer_at(channel, token)
    assert refusal.code in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED}


async def test_a_user_in_anothers_tenant_sees_nothing_of_it(
    channel: grpc.aio.Channel, forger: Forger, ann: User
) -> None:
    token = forger.token({"tid": ann.tenant_id})
    refusal = await answer_at(channel, token)
    assert refusal.code in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED}


# --- where a token may stand -------------------------------------------------------------------


@pytest.mark.parametrize("process", BY_PROCESS)
async def test_a_refresh_token_is_no_access_token(
    channel: grpc.aio.Channel, doors: Doors, bob: User, process: str
) -> None:
    for door in (channel, await doors.sidecar(process, EDGE), await doors.service(process)):
        refusal = await answer_at(door, bob.tokens.refresh_token, BY_PROCESS[process])
        assert refusal.code is grpc.StatusCode.UNAUTHENTICATED


async def test_an_access_token_is_no_refresh_token(http: httpx.AsyncClient, bob: User) -> None:
    response = await http.post("/v1/token:refresh", json={"refreshToken": bob.token})
    assert response.status_code == httpx.codes.UNAUTHORIZED


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?access_token={}", {}),
        ("", {"cookie": "access_token={}"}),
        ("", {"cookie": "authorization=Bearer {}"}),
        ("", {"x-authorization": "Bearer {}"}),
        ("", {"proxy-authorization": "Bearer {}"}),
        ("", {"authorization": "{}"}),
        ("", {"authorization": "Basic {}"}),
        ("", {"authorization": "bearer {}"}),
        ("", {"authorization": "Bearer Bearer {}"}),
        ("", {"authorization": 'Bearer "{}"'}),
    ],
)
async def test_a_token_elsewhere_is_no_token(
    http: httpx.AsyncClient, bob: User, query: str, headers: dict[str, str]
) -> None:
    filled = {name: value.format(bob.token) for name, value in headers.items()}
    response = await http.get(f"/v1/user{query.format(bob.token)}", headers=filled)
    assert response.status_code == httpx.codes.UNAUTHORIZED, response.text


@pytest.mark.parametrize("process", BY_PROCESS)
@pytest.mark.parametrize(
    "header",
    [
        ("cookie", "access_token={}"),
        ("cookie", "authorization=Bearer {}"),
        ("x-authorization", "Bearer {}"),
        ("proxy-authorization", "Bearer {}"),
        ("authorization", "{}"),
        ("authorization", "Basic {}"),
        ("authorization", "Bearer Bearer {}"),
    ],
    ids=" ".join,
)
async def test_a_token_elsewhere_is_no_token_past_the_edge(
    doors: Doors, bob: User, header: tuple[str, str], process: str
) -> None:
    metadata = ((header[0], header[1].format(bob.token)),)
    for door in (await doors.sidecar(process, EDGE), await doors.service(process)):
        refusal = await refusal_of(shown(door, metadata, BY_PROCESS[process]))
        assert refusal.code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("process", BY_PROCESS)
async def test_a_token_in_the_query_is_no_token_past_the_edge(
    doors: Doors, bob: User, process: str
) -> None:
    method = f"{BY_PROCESS[process]}?access_token={bob.token}"
    for door in (await doors.sidecar(process, EDGE), await doors.service(process)):
        refusal = await refusal_of(shown(door, (), method))
        assert refusal.code in {*REFUSED_BY_ENVOY, grpc.StatusCode.UNIMPLEMENTED}


@pytest.mark.parametrize("order", [("bob", "rubbish"), ("rubbish", "bob"), ("bob", "ann")])
async def test_two_tokens_are_no_token(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, ann: User, bob: User, order: tuple[str, str]
) -> None:
    tokens = {"ann": ann.token, "bob": bob.token, "rubbish": "rubbish"}
    twice = [pair for name in order for pair in bearer(tokens[name])]
    response = await http.get("/v1/user", headers=twice)
    assert response.status_code == httpx.codes.UNAUTHORIZED, response.text
    call = channel.unary_unary(GET_USER, bytes, bytes)(b"", metadata=tuple(twice), timeout=30)
    assert (await refusal_of(call)).code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_for_others_is_403_in_json(http: httpx.AsyncClient, forger: Forger) -> None:
    response = await http.get("/v1/user", headers=bearer(forger.token({"aud": "other"})))
    assert response.status_code == httpx.codes.FORBIDDEN
    assert response.json()["code"] == grpc.StatusCode.PERMISSION_DENIED.value[0]


async def test_a_refusal_does_not_tell_the_token(http: httpx.AsyncClient, forger: Forger) -> None:
    token = forger.token({"iss": "https://elsewhere.example"})
    response = await http.get("/v1/user", headers=bearer(token))
    assert token not in response.text + json.dumps(dict(response.headers))
