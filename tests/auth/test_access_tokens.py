"""Tokens that must be believed, and all those that must not: A1–A4 of tests/abuse/README.md."""

import base64
import json
from collections.abc import Callable, Container, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives import hashes, hmac, serialization
from joserfc import jws
from joserfc.jwk import ECKey

from server import ids
from server.access import Scope
from server.auth.access_tokens import Mint
from server.caller import Caller, Credentials
from server.errors import StoreUnavailable, Unauthenticated
from server.tokens import PublicKeys, TokenVerifier
from tests.auth.conftest import AUDIENCE, ISSUER
from tests.conftest import FakeClock

CALLER = Caller(tenant_id=ids.new_id(), user_id=ids.new_id())
CREDENTIALS = Credentials(CALLER, ids.SESSION, ids.new_id(), frozenset({Scope.USER}))
KEY = ECKey.generate_key("P-256", {"use": "sig", "alg": "ES256"}, auto_kid=True)
STRANGERS_KEY = ECKey.generate_key("P-256", {"kid": str(KEY.kid)})
NOW = int(datetime(2026, 5, 4, 12, tzinfo=UTC).timestamp())

HEADER = {"alg": "ES256", "typ": "at+jwt", "kid": KEY.kid}
CLAIMS = {
    "iss": ISSUER,
    "aud": AUDIENCE,
    "sub": ids.show(ids.USER, CALLER.user_id),
    "tid": ids.show(ids.TENANT, CALLER.tenant_id),
    "sid": ids.show(ids.SESSION, CREDENTIALS.grant_id),
    "scope": "user",
    "role": "member",
    "iat": NOW,
    "nbf": NOW,
    "exp": NOW + 600,
}


class Keys:
    """A source of keys that counts how often it is asked for others."""

    def __init__(self, *keys: ECKey) -> None:
        self.keys: PublicKeys = {str(key.kid): key for key in keys}
        self.coming: list[ECKey] = []
        self.refreshed = 0

    async def refresh(self) -> None:
        self.refreshed += 1
        if self.coming:
            self.keys = {str(key.kid): key for key in self.coming}


class Ticks:
    """A monotonic clock that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def verifier(
    source: Keys,
    clock: Callable[[], datetime] | None = None,
    ticks: Ticks | None = None,
    ended: Container[UUID] = (),
) -> TokenVerifier:
    return TokenVerifier(
        source,
        issuer=ISSUER,
        audience=AUDIENCE,
        ended=ended,
        clock=clock or FakeClock(),
        monotonic=ticks or Ticks(),
    )


def encode(part: object) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def signed(header: object, claims: object, key: ECKey = KEY) -> str:
    """Sign whatever it is, as no library would."""
    signing_input = f"{encode(header)}.{encode(claims)}"
    algorithm = jws.JWSRegistry(algorithms=["ES256"]).get_alg("ES256")
    return f"{signing_input}.{encode(algorithm.sign(signing_input.encode(), key))}"


def with_hmac_of_public_key() -> str:
    header = {**HEADER, "alg": "HS256"}
    secret = KEY.public_key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    mac = hmac.HMAC(secret, hashes.SHA256())
    mac.update(f"{encode(header)}.{encode(CLAIMS)}".encode())
    return f"{encode(header)}.{encode(CLAIMS)}.{encode(mac.finalize())}"


def without(name: str) -> dict[str, Any]:
    return {claim: value for claim, value in CLAIMS.items() if claim != name}


def forgeries() -> Iterator[tuple[str, str]]:
    good = signed(HEADER, CLAIMS)
    yield "alg none", f"{encode({**HEADER, 'alg': 'none'})}.{encode(CLAIMS)}."
    yield "no signature", good.rpartition(".")[0] + "."
    yield "HS256 with the public key", with_hmac_of_public_key()
    yield "own key under our kid", signed(HEADER, CLAIMS, STRANGERS_KEY)
    yield "unknown kid", signed({**HEADER, "kid": "other"}, CLAIMS)
    yield "kid that is a path", signed({**HEADER, "kid": "../../dev/null"}, CLAIMS)
    yield "kid that is no text", signed({**HEADER, "kid": [KEY.kid]}, CLAIMS)
    yield "no kid", signed({"alg": "ES256", "typ": "at+jwt"}, CLAIMS)
    embedded = {**HEADER, "jwk": STRANGERS_KEY.as_dict(private=False)}
    yield "embedded jwk", signed(embedded, CLAIMS, STRANGERS_KEY)
    yield "embedded jwk, signed by us", signed(embedded, CLAIMS)
    yield "jku", signed({**HEADER, "jku": "https://evil.test/jwks"}, CLAIMS)
    yield "unknown crit", signed({**HEADER, "crit": ["exp2"], "exp2": 1}, CLAIMS)
    yield "empty crit", signed({**HEADER, "crit": []}, CLAIMS)
    yield "unencoded payload", signed({**HEADER, "b64": False, "crit": ["b64"]}, CLAIMS)
    yield "another kind of token", signed({**HEADER, "typ": "JWT"}, CLAIMS)
    yield "no kind of token", signed({"alg": "ES256", "kid": KEY.kid}, CLAIMS)
    yield "header is a list", signed(["alg", "kid", "typ"], CLAIMS)
    yield "header is no JSON", signed(b"\xff\xfe", CLAIMS)
    yield "deeply nested header", signed(b"[" * 100_000, CLAIMS)
    yield "claims are a list", signed(HEADER, [1])
    yield "claims are no JSON", signed(HEADER, b"{")
    yield "deeply nested claims", signed(HEADER, b"[" * 90_000)
    for name in ("iss", "aud", "sub", "tid", "sid", "scope", "role", "iat", "nbf", "exp"):
        yield f"no {name}", signed(HEADER, without(name))
        yield f"{name} is null", signed(HEADER, {**CLAIMS, name: None})
        yield f"{name} is a list", signed(HEADER, {**CLAIMS, name: [[]]})
    yield "wrong issuer", signed(HEADER, {**CLAIMS, "iss": "https://evil.test"})
    yield "wrong audience", signed(HEADER, {**CLAIMS, "aud": "other"})
    yield "empty subject", signed(HEADER, {**CLAIMS, "sub": ""})
    yield "subject is a tenant", signed(HEADER, {**CLAIMS, "sub": CLAIMS["tid"]})
    yield "subject with line break", signed(HEADER, {**CLAIMS, "sub": f"{CLAIMS['sub']}\r\n"})
    yield "tenant is a user", signed(HEADER, {**CLAIMS, "tid": CLAIMS["sub"]})
    yield "session is a user", signed(HEADER, {**CLAIMS, "sid": CLAIMS["sub"]})
    yield "expired", signed(HEADER, {**CLAIMS, "iat": NOW - 700, "exp": NOW - 31})
    yield "lifetime of a day", signed(HEADER, {**CLAIMS, "exp": NOW + 86_400})
    yield "never expires", signed(HEADER, {**CLAIMS, "exp": 1e400})
    yield "not yet valid", signed(HEADER, {**CLAIMS, "nbf": NOW + 31})
    yield "issued in the future", signed(HEADER, {**CLAIMS, "iat": NOW + 3600, "exp": NOW + 3700})
    yield "truncated", good[:-10]
    yield (
        "changed claims",
        good.replace(encode(CLAIMS), encode({**CLAIMS, "sub": "usr_" + "0" * 32})),
    )
    for garbage in ("", ".", "..", "...", "a.b.c", "Bearer", "x" * 200_000, "é.é.é", "\0"):
        yield f"garbage {garbage[:6]!r}", garbage


async def test_a_minted_token_names_its_user() -> None:
    clock = FakeClock()
    mint = Mint(ISSUER, AUDIENCE, timedelta(minutes=10))
    token = mint.make(CREDENTIALS, KEY, clock.now, clock.now + mint.lifetime)
    assert await verifier(Keys(KEY), clock).verify(token) == CREDENTIALS


@pytest.mark.parametrize("token", [pytest.param(token, id=name) for name, token in forgeries()])
async def test_a_forged_or_stale_token_is_refused_without_saying_why(token: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await verifier(Keys(KEY)).verify(token)
    expected = "the access token is not valid; refresh it or log in again"
    assert caught.value.message == expected


@pytest.mark.parametrize(
    "claims",
    [
        CLAIMS,
        {**CLAIMS, "aud": [AUDIENCE]},
        {**CLAIMS, "nbf": NOW + 30},
        {**CLAIMS, "iat": NOW - 629, "nbf": NOW - 629, "exp": NOW - 29},
    ],
)
async def test_clocks_may_differ_by_thirty_seconds(claims: dict[str, Any]) -> None:
    assert await verifier(Keys(KEY)).verify(signed(HEADER, claims)) == CREDENTIALS


async def test_a_token_that_was_seen_before_expires_to_the_second() -> None:
    clock = FakeClock()
    checks = verifier(Keys(KEY), clock)
    token = signed(HEADER, CLAIMS)
    await checks.verify(token)
    clock.advance(seconds=629, microseconds=999_999)
    await checks.verify(token)
    clock.advance(microseconds=1)
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            await checks.verify(token)


async def test_a_token_that_was_seen_before_dies_with_its_key() -> None:
    source = Keys(KEY)
    checks = verifier(source)
    token = signed(HEADER, CLAIMS)
    await checks.verify(token)
    source.keys = {"other": STRANGERS_KEY}
    with pytest.raises(Unauthenticated):
        await checks.verify(token)


async def test_an_unknown_key_is_looked_up_at_once() -> None:
    source = Keys(STRANGERS_KEY.generate_key("P-256", auto_kid=True))
    source.coming = [KEY]
    assert await verifier(source).verify(signed(HEADER, CLAIMS)) == CREDENTIALS
    assert source.refreshed == 1


async def test_made_up_key_ids_cause_one_lookup_a_second() -> None:
    source, ticks = Keys(KEY), Ticks()
    checks = verifier(source, ticks=ticks)
    for second in range(3):
        ticks.now = 1000.0 + second
        for number in range(100):
            with pytest.raises(Unauthenticated):
                await checks.verify(signed({**HEADER, "kid": f"made up {number}"}, CLAIMS))
    assert source.refreshed == 3


async def test_without_any_key_auth_is_said_to_be_away() -> None:
    with pytest.raises(StoreUnavailable, match="auth does not answer"):
        await verifier(Keys()).verify(signed(HEADER, CLAIMS))


async def test_no_more_than_ten_thousand_tokens_are_remembered() -> None:
    checks = verifier(Keys(KEY))
    first = signed(HEADER, CLAIMS)
    await checks.verify(first)
    remembered = checks._verified[first]
    checks._verified.update({str(number): remembered for number in range(9_999)})
    await checks.verify(signed(HEADER, CLAIMS))
    assert len(checks._verified) == 10_000
    assert first not in checks._verified


async def test_a_token_dies_with_its_session_although_it_was_seen_before() -> None:
    ended: set[UUID] = set()
    checks = verifier(Keys(KEY), ended=ended)
    token = signed(HEADER, CLAIMS)
    await checks.verify(token)
    ended.add(CREDENTIALS.grant_id)
    with pytest.raises(Unauthenticated):
        await checks.verify(token)


async def test_scopes_are_read_one_by_one() -> None:
    claims = {**CLAIMS, "scope": "memory.read  jobs.read", "sid": ids.show("key", ids.new_id())}
    credentials = await verifier(Keys(KEY)).verify(signed(HEADER, claims))
    assert credentials.scopes == {"memory.read", "jobs.read"}
    assert credentials.grant_kind == ids.API_KEY
