"""API keys: shown once, good for what they name, and gone when they are revoked."""

import asyncio
import hashlib
from datetime import UTC, timedelta
from uuid import UUID

import asyncpg
import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids
from server.auth.api_key_store import ApiKeyStore
from server.caller import Caller
from server.database import SystemDatabase
from server.errors import Unauthenticated
from server.grants import EndedGrants
from server.tokens import TokenVerifier
from tests.auth.conftest import Auth, reason_of, sign_up
from tests.conftest import FakeClock, bearer

READ = "memory.read"
As = tuple[tuple[str, str], ...]


@pytest.fixture
async def ada(auth: Auth, verifier: TokenVerifier) -> As:
    """Somebody with an account."""
    return bearer((await verifier.verify((await sign_up(auth)).access_token)).caller)


async def create(
    auth: Auth, as_: As, *scopes: str, expires: timestamp_pb2.Timestamp | None = None
) -> pb.CreateApiKeyResponse:
    request = pb.CreateApiKeyRequest(name="a script", scopes=scopes or (READ,), expire_time=expires)
    return await auth.CreateApiKey(request, metadata=as_)


async def exchange(auth: Auth, secret: str, *scopes: str) -> pb.ExchangeTokenResponse:
    return await auth.ExchangeToken(pb.ExchangeTokenRequest(api_key=secret, scopes=scopes))


async def test_a_key_is_shown_once_and_stored_as_its_hash(
    auth: Auth, ada: As, owner: asyncpg.Connection
) -> None:
    made = await create(auth, ada)
    prefix, secret = made.secret.rsplit("_", 1)[0], made.secret
    assert secret.startswith(made.api_key.prefix)
    assert len(secret) - len(made.api_key.prefix) == 44, prefix
    stored = await owner.fetchval("SELECT hash FROM api_key_secrets")
    assert stored == hashlib.sha256(secret.encode()).digest()
    (listed,) = (await auth.ListApiKeys(pb.ListApiKeysRequest(), metadata=ada)).api_keys
    assert listed == made.api_key
    assert (listed.name, list(listed.scopes)) == ("a script", [READ])


async def test_a_key_is_exchanged_for_a_token_of_its_user_and_scopes(
    auth: Auth, ada: As, verifier: TokenVerifier, clock: FakeClock
) -> None:
    made = await create(auth, ada, READ, "jobs.read")
    answer = await exchange(auth, made.secret)
    credentials = await verifier.verify(answer.access_token)
    assert bearer(credentials.caller) == ada
    assert credentials.scopes == {READ, "jobs.read"}
    assert credentials.grant_kind == ids.API_KEY
    assert answer.access_token_lifetime.seconds == 600
    narrower = await exchange(auth, made.secret, READ)
    assert (await verifier.verify(narrower.access_token)).scopes == {READ}
    wider = exchange(auth, made.secret, READ, "memory.write")
    assert await reason_of(wider) == "FIELD_INVALID scopes"
    (listed,) = (await auth.ListApiKeys(pb.ListApiKeysRequest(), metadata=ada)).api_keys
    assert listed.last_use_time.ToDatetime(UTC) == clock.now


async def test_a_token_of_a_key_makes_no_key(auth: Auth, ada: As, verifier: TokenVerifier) -> None:
    made = await create(auth, ada, READ, "memory.write", "jobs.read", "profile.read", "audit.read")
    credentials = await verifier.verify((await exchange(auth, made.secret)).access_token)
    narrow = bearer(credentials.caller, scope=" ".join(credentials.scopes))
    assert await reason_of(create(auth, narrow)) == "SCOPE_MISSING"
    listing = auth.ListApiKeys(pb.ListApiKeysRequest(), metadata=narrow)
    assert await reason_of(listing) == "SCOPE_MISSING"


async def test_a_revoked_key_opens_nothing_and_its_tokens_are_refused(
    auth: Auth, ada: As, verifier: TokenVerifier, ended: EndedGrants
) -> None:
    made = await create(auth, ada)
    token = (await exchange(auth, made.secret)).access_token
    await auth.RevokeApiKey(pb.RevokeApiKeyRequest(id=made.api_key.id), metadata=ada)
    assert await reason_of(exchange(auth, made.secret)) == "API_KEY_INVALID"
    await ended.refresh()
    with pytest.raises(Unauthenticated):
        await verifier.verify(token)
    assert not (await auth.ListApiKeys(pb.ListApiKeysRequest(), metadata=ada)).api_keys
    again = auth.RevokeApiKey(pb.RevokeApiKeyRequest(id=made.api_key.id), metadata=ada)
    assert await reason_of(again) == "RESOURCE_NOT_FOUND"


async def test_a_rotated_key_has_another_secret_and_the_old_one_ends_with_its_tokens(
    auth: Auth, ada: As, verifier: TokenVerifier, ended: EndedGrants
) -> None:
    made = await create(auth, ada)
    old = (await exchange(auth, made.secret)).access_token
    rotated = await auth.RotateApiKey(pb.RotateApiKeyRequest(id=made.api_key.id), metadata=ada)
    assert rotated.api_key.id == made.api_key.id
    assert rotated.secret.startswith(rotated.api_key.prefix)
    assert await reason_of(exchange(auth, made.secret)) == "API_KEY_INVALID"
    new = (await exchange(auth, rotated.secret)).access_token
    await ended.refresh()
    await verifier.verify(new)
    with pytest.raises(Unauthenticated):
        await verifier.verify(old)


async def test_while_a_key_is_rotated_both_secrets_may_be_good(
    auth: Auth, ada: As, clock: FakeClock
) -> None:
    made = await create(auth, ada)
    request = pb.RotateApiKeyRequest(
        id=made.api_key.id, overlap=duration_pb2.Duration(seconds=3600)
    )
    rotated = await auth.RotateApiKey(request, metadata=ada)
    for secret in (made.secret, rotated.secret):
        await exchange(auth, secret)
    clock.advance(minutes=55)
    assert (await exchange(auth, made.secret)).access_token_lifetime.seconds == 300
    clock.advance(minutes=5)
    assert await reason_of(exchange(auth, made.secret)) == "API_KEY_INVALID"
    await exchange(auth, rotated.secret)


async def test_no_token_outlives_its_key(auth: Auth, ada: As, clock: FakeClock) -> None:
    expires = timestamp_pb2.Timestamp()
    expires.FromDatetime(clock.now + timedelta(minutes=2))
    made = await create(auth, ada, expires=expires)
    assert (await exchange(auth, made.secret)).access_token_lifetime.seconds == 120
    clock.advance(minutes=2)
    assert await reason_of(exchange(auth, made.secret)) == "API_KEY_INVALID"
    rotation = auth.RotateApiKey(pb.RotateApiKeyRequest(id=made.api_key.id), metadata=ada)
    assert await reason_of(rotation) == "RESOURCE_NOT_FOUND"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 101),
        ("name", "a\nb"),
        ("scopes", []),
        ("scopes", ["user"]),
        ("scopes", [READ, "root"]),
        ("expire_time", timestamp_pb2.Timestamp(seconds=1)),
        ("expire_time", timestamp_pb2.Timestamp(seconds=1 << 40)),
        ("expire_time", timestamp_pb2.Timestamp(seconds=4_000_000_000)),
    ],
)
async def test_a_key_that_cannot_be_names_the_field(
    auth: Auth, ada: As, field: str, value: object
) -> None:
    good: dict[str, object] = {"name": "a script", "scopes": [READ]}
    request = pb.CreateApiKeyRequest(**good | {field: value})  # type: ignore[arg-type]
    assert await reason_of(auth.CreateApiKey(request, metadata=ada)) == f"FIELD_INVALID {field}"


@pytest.mark.parametrize("seconds", [-1, 7 * 86_400 + 1])
async def test_a_rotation_takes_a_week_at_most(auth: Auth, ada: As, seconds: int) -> None:
    made = await create(auth, ada)
    overlap = duration_pb2.Duration(seconds=seconds)
    request = pb.RotateApiKeyRequest(id=made.api_key.id, overlap=overlap)
    assert await reason_of(auth.RotateApiKey(request, metadata=ada)) == "FIELD_INVALID overlap"


async def test_nobody_has_more_than_fifty_keys_however_many_are_made_at_once(
    auth: Auth, ada: As, owner: asyncpg.Connection
) -> None:
    made = await asyncio.gather(*(create(auth, ada) for _ in range(60)), return_exceptions=True)
    assert sum(isinstance(each, pb.CreateApiKeyResponse) for each in made) == 50
    assert await reason_of(create(auth, ada)) == "QUOTA_EXCEEDED"


async def test_what_is_no_key_opens_nothing(auth: Auth, ada: As) -> None:
    made = await create(auth, ada)
    tokens = await sign_up(auth, "bob@example.com")
    for secret in (
        "",
        made.secret[:-1],
        made.secret + "A",
        made.api_key.prefix,
        made.api_key.id,
        tokens.refresh_token,
        tokens.access_token,
        "\0",
    ):
        assert await reason_of(exchange(auth, secret)) == "API_KEY_INVALID"


async def test_what_is_done_with_keys_is_audited(
    auth: Auth, ada: As, owner: asyncpg.Connection
) -> None:
    made = await create(auth, ada)
    await exchange(auth, made.secret)
    rotated = await auth.RotateApiKey(pb.RotateApiKeyRequest(id=made.api_key.id), metadata=ada)
    await auth.RevokeApiKey(pb.RevokeApiKeyRequest(id=made.api_key.id), metadata=ada)
    rows = await owner.fetch(
        "SELECT action FROM audit_events WHERE resource = $1 ORDER BY id", rotated.api_key.id
    )
    assert [row["action"].removeprefix("api_key.") for row in rows] == [
        "create",
        "exchange",
        "rotate",
        "revoke",
    ]


async def test_the_keys_of_another_are_as_good_as_none(
    auth: Auth, ada: As, verifier: TokenVerifier
) -> None:
    made = await create(auth, ada)
    bob = await verifier.verify((await sign_up(auth, "bob@example.com")).access_token)
    colleague = bearer(Caller(UUID(ada[0][1].split()[1].split("/")[0]), bob.caller.user_id))
    for other in (bearer(bob.caller), colleague):
        revoked = auth.RevokeApiKey(pb.RevokeApiKeyRequest(id=made.api_key.id), metadata=other)
        assert await reason_of(revoked) == "RESOURCE_NOT_FOUND"
        rotated = auth.RotateApiKey(pb.RotateApiKeyRequest(id=made.api_key.id), metadata=other)
        assert await reason_of(rotated) == "RESOURCE_NOT_FOUND"
    await exchange(auth, made.secret)


async def test_keys_that_ended_are_forgotten_after_a_month(
    auth: Auth,
    ada: As,
    system_database: SystemDatabase,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    made = await create(auth, ada)
    kept = await create(auth, ada)
    await auth.RevokeApiKey(pb.RevokeApiKeyRequest(id=made.api_key.id), metadata=ada)
    clock.advance(days=31)
    await ApiKeyStore(system_database).forget(clock.now)
    (left,) = await owner.fetch("SELECT id FROM api_keys")
    assert ids.show(ids.API_KEY, left["id"]) == kept.api_key.id


async def test_a_retry_makes_no_second_key_and_shows_no_secret(auth: Auth, ada: As) -> None:
    request = pb.CreateApiKeyRequest(name="a script", scopes=[READ], request_id="once")
    answers = await asyncio.gather(
        *(auth.CreateApiKey(request, metadata=ada) for _ in range(5)),
    )
    assert len({answer.api_key.id for answer in answers}) == 1
    (secret,) = (answer.secret for answer in answers if answer.secret)
    assert (await exchange(auth, secret)).access_token
    (listed,) = (await auth.ListApiKeys(pb.ListApiKeysRequest(), metadata=ada)).api_keys
    request.name = "another"
    assert await reason_of(auth.CreateApiKey(request, metadata=ada)) == "REQUEST_ID_REUSED"
    await auth.RevokeApiKey(pb.RevokeApiKeyRequest(id=listed.id), metadata=ada)
    request.name = "a script"
    assert await reason_of(auth.CreateApiKey(request, metadata=ada)) == "RESOURCE_NOT_FOUND"
