"""Signing up tells nobody but the reader of a mail whether an email has an account."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.auth.v1 import auth_pb2 as pb
from kimberly.auth.v1 import auth_pb2_grpc as rpc

from local.servers import Stores
from server.auth.postman import Postman
from server.auth.service import AuthService
from server.auth.sign_up_store import MOST_WITHIN, SignUpStore
from server.database import SystemDatabase
from server.processes.auth import compose
from server.settings import Settings
from server.tokens import TokenVerifier
from tests.auth.conftest import PASSWORD, Auth, CountingHasher, reason_of, sign_up
from tests.auth.mails import deliver, mailed, read
from tests.conftest import FakeClock, Serve, Urls
from tests.refusals import refusal_of

ADA = "ada@example.com"
CONFIRM = "Confirm your email address"
TAKEN = "You have an account already"
INVALID = "MAILED_TOKEN_INVALID"
SIGN_UP = pb.SignUpRequest(email=ADA, password=PASSWORD, display_name="Ada L.")


@pytest_asyncio.fixture
async def confirming(serve: Serve, service: AuthService) -> Auth:
    """A stub of the auth service as it is anywhere but on a developer's machine."""
    service._confirms_email = True
    channel = await serve(lambda server: rpc.add_AuthServiceServicer_to_server(service, server))
    return rpc.AuthServiceStub(channel)


async def with_account(service: AuthService, auth: Auth, email: str = ADA) -> None:
    """Make an account at once."""
    service._confirms_email = False
    await sign_up(auth, email)
    service._confirms_email = True


async def verify(auth: Auth, token: str) -> pb.VerifyEmailResponse:
    return await auth.VerifyEmail(pb.VerifyEmailRequest(token=token))


async def log_in(auth: Auth, password: str = PASSWORD) -> pb.Tokens:
    return (await auth.LogIn(pb.LogInRequest(email=ADA, password=password))).tokens


async def test_a_mailed_token_makes_the_account_and_its_password_opens_it(
    confirming: Auth,
    verifier: TokenVerifier,
    outbox: Path,
    postman: Postman,
    owner: asyncpg.Connection,
) -> None:
    assert await confirming.SignUp(SIGN_UP) == pb.SignUpResponse()
    assert await owner.fetchval("SELECT count(*) FROM users") == 0
    assert await reason_of(log_in(confirming)) == "CREDENTIALS_INVALID"
    token = await mailed(outbox, postman, CONFIRM)
    assert await verify(confirming, token) == pb.VerifyEmailResponse()
    caller = (await verifier.verify((await log_in(confirming)).access_token)).caller
    row = await owner.fetchrow("SELECT * FROM users")
    assert (row["id"], row["tenant_id"]) == (caller.user_id, caller.tenant_id)
    assert (row["email"], row["display_name"], row["role"]) == (ADA, "Ada L.", "owner")
    assert row["email_verified_at"]
    told = await owner.fetch("SELECT action FROM audit_events ORDER BY xid, id")
    assert [each["action"] for each in told] == ["user.create", "email.verify", "session.start"]
    assert await owner.fetchval("SELECT count(*) FROM sign_ups") == 0
    assert await reason_of(verify(confirming, token)) == INVALID


async def test_who_signs_up_is_not_told_of_an_account_but_who_has_it_is_told_of_them(
    confirming: Auth,
    service: AuthService,
    outbox: Path,
    postman: Postman,
    owner: asyncpg.Connection,
) -> None:
    free = await confirming.SignUp(pb.SignUpRequest(email="new@example.com", password=PASSWORD))
    await with_account(service, confirming)
    await deliver(postman)
    before = len(read(outbox))
    taken = await confirming.SignUp(pb.SignUpRequest(email=ADA, password="another password"))
    assert taken == free == pb.SignUpResponse()
    await deliver(postman)
    (mail,) = read(outbox)[before:]
    assert (mail["To"], mail["Subject"]) == (ADA, TAKEN)
    assert "POST /v1/password:requestReset" in mail.get_content()
    # There is no token in it, nor one that anything would come of.
    assert not [line for line in mail.get_content().splitlines() if len(line) == 43]
    assert await owner.fetchval("SELECT token_hash FROM sign_ups WHERE email = $1", ADA) is None
    assert await owner.fetchval(
        "SELECT count(*) FROM audit_events WHERE action = 'sign_up_taken.mail'"
    )
    await log_in(confirming)
    assert await reason_of(log_in(confirming, "another password")) == "CREDENTIALS_INVALID"


async def test_one_hash_is_computed_and_the_same_is_kept_whether_or_not_there_is_an_account(
    confirming: Auth, service: AuthService, hasher: CountingHasher, owner: asyncpg.Connection
) -> None:
    await with_account(service, confirming)
    await owner.execute("DELETE FROM mails")
    for email in (ADA, "new@example.com"):
        await confirming.SignUp(pb.SignUpRequest(email=email, password=PASSWORD))
    rows = await owner.fetch("SELECT kind, attempts, about <> '' AS is_about FROM mails")
    assert [tuple(row) for row in rows] == [("sign_up", 0, True)] * 2
    hashes = await owner.fetch("SELECT password_hash, token_hash FROM sign_ups")
    assert len({row["password_hash"] for row in hashes}) == 2
    assert {row["token_hash"] for row in hashes} == {None}


async def test_nobody_takes_the_place_of_another_who_signs_up_with_the_same_email(
    confirming: Auth, outbox: Path, postman: Postman, clock: FakeClock
) -> None:
    await confirming.SignUp(SIGN_UP)
    hers = await mailed(outbox, postman, CONFIRM)
    for _ in range(3):
        await confirming.SignUp(pb.SignUpRequest(email=ADA, password="the stranger's choice"))
    strangers = await mailed(outbox, postman, CONFIRM)
    assert strangers != hers
    await verify(confirming, hers)
    await log_in(confirming)
    # What the stranger began is over: not even she can end it by mistake.
    assert await reason_of(verify(confirming, strangers)) == INVALID
    assert await reason_of(log_in(confirming, "the stranger's choice")) == "CREDENTIALS_INVALID"


async def test_an_account_that_came_meanwhile_stays_whose_it_is(
    confirming: Auth, service: AuthService, outbox: Path, postman: Postman
) -> None:
    await confirming.SignUp(pb.SignUpRequest(email=ADA, password="chosen a while ago"))
    token = await mailed(outbox, postman, CONFIRM)
    await with_account(service, confirming)
    assert await reason_of(verify(confirming, token)) == "RESOURCE_EXISTS"
    await log_in(confirming)


async def test_ten_uses_of_a_token_at_once_make_one_account(
    confirming: Auth, outbox: Path, postman: Postman, owner: asyncpg.Connection
) -> None:
    await confirming.SignUp(SIGN_UP)
    token = await mailed(outbox, postman, CONFIRM)
    outcomes = await asyncio.gather(
        *(verify(confirming, token) for _ in range(10)), return_exceptions=True
    )
    assert sum(isinstance(each, pb.VerifyEmailResponse) for each in outcomes) == 1
    for table in ("tenants", "users", "accounts"):
        assert await owner.fetchval(f"SELECT count(*) FROM {table}") == 1, table


async def test_whoever_signs_up_on_and_on_has_nobody_flooded_with_mails_and_is_not_told(
    confirming: Auth, clock: FakeClock, outbox: Path, postman: Postman
) -> None:
    answers = [await confirming.SignUp(SIGN_UP) for _ in range(MOST_WITHIN + 5)]
    assert set(map(str, answers)) == {str(pb.SignUpResponse())}
    await deliver(postman)
    assert len(read(outbox)) == MOST_WITHIN
    clock.advance(hours=1, seconds=1)
    await confirming.SignUp(SIGN_UP)
    await verify(confirming, await mailed(outbox, postman, CONFIRM))


async def test_after_a_day_a_sign_up_is_forgotten(
    confirming: Auth,
    system_database: SystemDatabase,
    clock: FakeClock,
    outbox: Path,
    postman: Postman,
    owner: asyncpg.Connection,
) -> None:
    await confirming.SignUp(SIGN_UP)
    token = await mailed(outbox, postman, CONFIRM)
    clock.advance(hours=24)
    assert await reason_of(verify(confirming, token)) == INVALID
    await SignUpStore(system_database).forget(clock.now)
    assert await owner.fetchval("SELECT count(*) FROM sign_ups") == 0


async def test_a_mail_that_comes_late_is_of_how_things_are_then(
    confirming: Auth, service: AuthService, outbox: Path, postman: Postman, clock: FakeClock
) -> None:
    await confirming.SignUp(SIGN_UP)
    await with_account(service, confirming)
    await deliver(postman)
    assert TAKEN in [mail["Subject"] for mail in read(outbox)]
    await confirming.SignUp(pb.SignUpRequest(email="late@example.com", password=PASSWORD))
    clock.now += timedelta(days=2)
    before = len(read(outbox))
    await deliver(postman)
    assert len(read(outbox)) == before


@pytest.mark.parametrize("field", ["email", "password", "display_name"])
async def test_what_can_never_be_is_refused_whether_or_not_there_is_an_account(
    confirming: Auth, service: AuthService, field: str
) -> None:
    await with_account(service, confirming)
    wrong = {"email": "nobody", "password": "short", "display_name": "a\nb"}[field]
    for email in (ADA, "new@example.com"):
        request = pb.SignUpRequest(**{"email": email, "password": PASSWORD, field: wrong})
        assert await reason_of(confirming.SignUp(request)) == f"FIELD_INVALID {field}"


@pytest.mark.parametrize("carried", [False, True])
async def test_a_process_that_nobody_carries_mails_for_tells_who_would_wait_for_one(
    serve: Serve, urls: Urls, stores: Stores, master_key: Path, tmp_path: Path, carried: bool
) -> None:
    given: dict[str, Any] = {
        "database_url": urls.application,
        "system_database_url": urls.system,
        "redis_url": stores.valkey.url,
        "s3_endpoint": stores.s3.endpoint,
        "s3_access_key": stores.s3.access_key,
        "s3_secret_key": stores.s3.secret_key,
        "s3_secure": False,
        "listen_socket": tmp_path / "listen",
        "outbound_socket": tmp_path / "outbound",
        "token_issuer": "https://localhost:8443",
        "trust_domain": "kimberly.test",
        "namespace": "kimberly",
        "master_key_file": master_key,
        "mail_directory": tmp_path if carried else None,
    }
    async with AsyncExitStack() as stack:
        auth = await compose(Settings(**given), stack)
        stub = rpc.AuthServiceStub(await serve(auth.register))
        if carried:
            assert await stub.SignUp(SIGN_UP) == pb.SignUpResponse()
        else:
            refusal = await refusal_of(stub.SignUp(SIGN_UP))
            assert (refusal.code, refusal.reason) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "MAILS_NOT_SENT",
            )
            # Who was invited has had a mail before.
            invited = pb.SignUpRequest(email=ADA, password=PASSWORD, invitation="unknown")
            assert await reason_of(stub.SignUp(invited)) == "MAILED_TOKEN_INVALID"
