"""Who signs up and logs in, and that passwords are kept as nothing but slow hashes."""

import asyncio
from typing import Literal

import argon2
import asyncpg
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from server.auth.hash_costs import HashCosts
from server.auth.passwords import Passwords
from server.auth.service import AuthService
from server.auth.store import AccountStore
from server.database import SystemDatabase
from server.tokens import TokenVerifier
from tests.auth.conftest import (
    PASSWORD,
    SESSION_LIFETIME,
    Auth,
    CountingHasher,
    Gauge,
    reason_of,
    sign_up,
)
from tests.conftest import Urls


async def test_signing_up_makes_a_user_in_a_tenant_of_their_own(
    auth: Auth, owner: asyncpg.Connection, verifier: TokenVerifier
) -> None:
    response = await auth.SignUp(
        pb.SignUpRequest(email="  Ada@Example.COM ", password=PASSWORD, display_name="Ada L.")
    )
    row = await owner.fetchrow("SELECT id, tenant_id, email, display_name FROM users")
    assert (row["email"], row["display_name"]) == ("ada@example.com", "Ada L.")
    assert response.user_id == f"usr_{row['id'].hex}"
    assert response.tenant_id == f"ten_{row['tenant_id'].hex}"
    caller = (await verifier.verify(response.tokens.access_token)).caller
    assert (caller.user_id, caller.tenant_id) == (row["id"], row["tenant_id"])
    assert response.tokens.access_token_lifetime.seconds == 600
    assert response.tokens.refresh_token_lifetime.seconds == SESSION_LIFETIME.total_seconds()


async def test_a_user_without_a_name_is_called_by_their_email(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    await sign_up(auth, "grace@example.com")
    assert await owner.fetchval("SELECT display_name FROM users") == "grace"


async def test_an_email_names_one_account_however_it_is_spelled(auth: Auth) -> None:
    await sign_up(auth, "ada@example.com")
    again = pb.SignUpRequest(email="ADA@example.com", password=PASSWORD)
    assert await reason_of(auth.SignUp(again)) == "RESOURCE_EXISTS"


async def test_ten_concurrent_sign_ups_make_one_account_and_leave_nothing_else(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    outcomes = await asyncio.gather(*(sign_up(auth) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(outcome, pb.Tokens) for outcome in outcomes) == 1
    for table in ("tenants", "users", "accounts", "sessions", "refresh_tokens"):
        assert await owner.fetchval(f"SELECT count(*) FROM {table}") == 1, table
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 2


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("email", ["", "ada", "a@b@example.com", "a\0@example.com", "a" * 1000]),
        ("password", ["", "x" * 11, "x" * 257]),
        ("display_name", ["x" * 101, "a\0b", "a\nb"]),
    ],
)
async def test_a_sign_up_that_cannot_be_names_the_field(
    auth: Auth, field: str, values: list[str]
) -> None:
    good = {"email": "ada@example.com", "password": PASSWORD}
    for value in values:
        request = pb.SignUpRequest(**good | {field: value})
        assert await reason_of(auth.SignUp(request)) == f"FIELD_INVALID {field}"


async def test_logging_in_starts_another_session(auth: Auth, owner: asyncpg.Connection) -> None:
    await sign_up(auth)
    await auth.LogIn(pb.LogInRequest(email=" ADA@example.com", password=PASSWORD))
    assert await owner.fetchval("SELECT count(*) FROM sessions") == 2


async def test_a_password_is_the_same_in_every_unicode_spelling(auth: Auth) -> None:
    composed, decomposed = "caf\u00e9 caf\u00e9 caf\u00e9", "cafe\u0301 cafe\u0301 cafe\u0301"
    await auth.SignUp(pb.SignUpRequest(email="ada@example.com", password=composed))
    await auth.LogIn(pb.LogInRequest(email="ada@example.com", password=decomposed))


async def test_unknown_email_and_wrong_password_answer_alike_and_cost_one_hash_each(
    auth: Auth, hasher: CountingHasher
) -> None:
    await sign_up(auth)
    for email in ("ada@example.com", "nobody@example.com"):
        before = hasher.verified
        wrong = pb.LogInRequest(email=email, password="not the password")
        assert await reason_of(auth.LogIn(wrong)) == "CREDENTIALS_INVALID"
        assert hasher.verified == before + 1


class Costs(CountingHasher):
    """Remembers the memory of every hash that is verified."""

    def __init__(self, memory_cost: int) -> None:
        super().__init__(memory_cost)
        self.paid = list[int]()

    def verify(self, hash: str | bytes, password: str | bytes) -> Literal[True]:  # noqa: A002 - as it is there
        self.paid.append(argon2.extract_parameters(str(hash)).memory_cost)
        return super().verify(hash, password)


async def test_a_changed_cost_does_not_tell_old_accounts_from_new_ones_or_none(
    auth: Auth, service: AuthService, system_database: SystemDatabase
) -> None:
    accounts = AccountStore(system_database)
    await sign_up(auth, "old@example.com")
    hasher = Costs(memory_cost=16)
    with Passwords(concurrency=1, hasher=hasher) as service._hashing:
        await HashCosts(accounts, service._hashing).refresh()
        await sign_up(auth, "new@example.com")
        for name in ("old", "new", "no"):
            hasher.paid.clear()
            wrong = pb.LogInRequest(email=f"{name}@example.com", password="not the password")
            assert await reason_of(auth.LogIn(wrong)) == "CREDENTIALS_INVALID"
            assert sorted(hasher.paid) == [8, 16]
        # The old one is renewed as its user logs in; then nobody pays for it any more.
        await auth.LogIn(pb.LogInRequest(email="old@example.com", password=PASSWORD))
        await HashCosts(accounts, service._hashing).refresh()
        hasher.paid.clear()
        assert not await service._hashing.match(None, PASSWORD)
        assert hasher.paid == [16]


async def test_a_cost_that_another_process_has_brought_in_is_paid_once_it_was_seen(
    hasher: CountingHasher,
) -> None:
    theirs = CountingHasher(memory_cost=16).hash(PASSWORD)
    with Passwords(concurrency=1, hasher=hasher) as hashing:
        assert await hashing.match(theirs, PASSWORD)
        before = hasher.verified
        assert not await hashing.match(None, PASSWORD)
        assert hasher.verified == before + 2


async def test_the_password_of_nobody_opens_nothing(auth: Auth) -> None:
    request = pb.LogInRequest(email="nobody@example.com", password="nobody's password")
    assert await reason_of(auth.LogIn(request)) == "CREDENTIALS_INVALID"


async def test_passwords_are_stored_as_argon2id_only(auth: Auth, urls: Urls) -> None:
    await sign_up(auth)
    connection = await asyncpg.connect(urls.superuser)
    stored = await connection.fetchval("SELECT password_hash FROM accounts")
    await connection.close()
    assert stored.startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert PASSWORD not in stored


async def test_logging_in_renews_a_hash_with_outdated_parameters(
    auth: Auth, service: AuthService, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    dearer = CountingHasher(memory_cost=16)
    with Passwords(concurrency=1, hasher=dearer) as service._hashing:
        request = pb.LogInRequest(email="ada@example.com", password=PASSWORD)
        await auth.LogIn(request)
        stored = await owner.fetchval("SELECT password_hash FROM accounts")
        assert argon2.extract_parameters(stored).memory_cost == 16
        await auth.LogIn(request)
        assert await owner.fetchval("SELECT password_hash FROM accounts") == stored


async def test_a_renewed_hash_does_not_undo_a_changed_password(
    auth: Auth, system_database: SystemDatabase, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    user_id = await owner.fetchval("SELECT id FROM users")
    changed = await owner.fetchval("SELECT password_hash FROM accounts")
    await AccountStore(system_database).replace_hash(user_id, "$argon2id$before", "$argon2id$late")
    assert await owner.fetchval("SELECT password_hash FROM accounts") == changed


async def test_hashing_never_runs_more_often_at_once_than_allowed(auth: Auth) -> None:
    gauge = Gauge(memory_cost=1024)
    with Passwords(concurrency=2, hasher=gauge) as hashing:
        await asyncio.gather(*(hashing.match(None, PASSWORD) for _ in range(20)))
    assert gauge.verified == 20
    assert gauge.most <= 2
