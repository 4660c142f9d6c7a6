"""Passwords that are changed, reset by mail, and refused because they are easily guessed."""

import asyncio
import hashlib
import stat
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from server.auth.breached import Commonplace, HashFile
from server.auth.mail import Kind, Mail, Outbox, Smtp
from server.auth.mail_store import MailStore, lifetime_of
from server.auth.passwords import Passwords
from server.auth.postman import Postman
from server.auth.service import AuthService
from server.caller import Credentials
from server.errors import Unauthenticated
from server.grants import EndedGrants
from server.tokens import TokenVerifier
from tests.auth.conftest import PASSWORD, Auth, Gauge, reason_of, refresh, sign_up
from tests.auth.mails import SENDER, deliver, mailed, read
from tests.conftest import FakeClock, bearer

NEW = "another long password"
ADA = "ada@example.com"


def as_(credentials: Credentials) -> tuple[tuple[str, str], ...]:
    return bearer(credentials.caller, grant_id=credentials.grant_id)


def log_in(auth: Auth, password: str) -> Awaitable[pb.LogInResponse]:
    return auth.LogIn(pb.LogInRequest(email=ADA, password=password))


async def ask_for_reset(auth: Auth, email: str = ADA) -> None:
    await auth.RequestPasswordReset(pb.RequestPasswordResetRequest(email=email))


async def actions(owner: asyncpg.Connection) -> list[str]:
    rows = await owner.fetch("SELECT action FROM audit_events ORDER BY id")
    return [row["action"] for row in rows]


# --- changing ----------------------------------------------------------------------------------


async def test_changing_the_password_ends_every_other_session(
    auth: Auth, verifier: TokenVerifier, ended: EndedGrants, owner: asyncpg.Connection
) -> None:
    tokens = await sign_up(auth)
    mine = await verifier.verify(tokens.access_token)
    other = (await log_in(auth, PASSWORD)).tokens
    request = pb.ChangePasswordRequest(current_password=PASSWORD, new_password=NEW)
    assert (await auth.ChangePassword(request, metadata=as_(mine))).ended_sessions == 1
    assert await reason_of(log_in(auth, PASSWORD)) == "CREDENTIALS_INVALID"
    await log_in(auth, NEW)
    await ended.refresh()
    await verifier.verify((await refresh(auth, tokens.refresh_token)).access_token)
    with pytest.raises(Unauthenticated):
        await verifier.verify(other.access_token)
    assert await reason_of(refresh(auth, other.refresh_token)) == "REFRESH_TOKEN_INVALID"
    assert (await actions(owner)).count("password.change") == 1


async def test_whoever_does_not_know_the_password_does_not_change_it(
    auth: Auth, verifier: TokenVerifier
) -> None:
    mine = as_(await verifier.verify((await sign_up(auth)).access_token))
    wrong = pb.ChangePasswordRequest(current_password="not the password", new_password=NEW)
    for _ in range(20):
        refused = auth.ChangePassword(wrong, metadata=mine)
        assert await reason_of(refused) == "CREDENTIALS_INVALID"
    # After ten guesses not even the right one is looked at.
    right = pb.ChangePasswordRequest(current_password=PASSWORD, new_password=NEW)
    assert await reason_of(auth.ChangePassword(right, metadata=mine)) == "CREDENTIALS_INVALID"


async def test_passwords_of_one_account_are_looked_at_one_after_the_other(
    auth: Auth, service: AuthService, verifier: TokenVerifier
) -> None:
    # Else one user could keep all threads busy, and nobody would log in.
    mine = as_(await verifier.verify((await sign_up(auth)).access_token))
    wrong = pb.ChangePasswordRequest(current_password="not the password", new_password=NEW)
    gauge = Gauge(memory_cost=32_768)
    with Passwords(concurrency=4, hasher=gauge) as service._hashing:
        calls = (auth.ChangePassword(wrong, metadata=mine) for _ in range(6))
        reasons = await asyncio.gather(*map(reason_of, calls))
    assert set(reasons) == {"CREDENTIALS_INVALID"}
    # Each pays for the hash that there is and for one of today's cost.
    assert (gauge.verified, gauge.most) == (12, 1)


async def test_of_two_changes_at_once_one_takes_place(auth: Auth, verifier: TokenVerifier) -> None:
    mine = as_(await verifier.verify((await sign_up(auth)).access_token))
    changes = [
        auth.ChangePassword(
            pb.ChangePasswordRequest(current_password=PASSWORD, new_password=f"{NEW} {number}"),
            metadata=mine,
        )
        for number in range(5)
    ]
    answers = await asyncio.gather(*changes, return_exceptions=True)
    assert sum(isinstance(answer, pb.ChangePasswordResponse) for answer in answers) == 1


async def test_whoever_proved_the_former_password_is_not_let_in_once_it_is_changed(
    auth: Auth, verifier: TokenVerifier, owner: asyncpg.Connection
) -> None:
    """A log-in that took its time, and changes that come before it ends."""
    mine = await verifier.verify((await sign_up(auth)).access_token)
    current = PASSWORD
    for number in range(5):
        following = f"{NEW} {number}"
        change = pb.ChangePasswordRequest(current_password=current, new_password=following)
        log_ins = [log_in(auth, current) for _ in range(4)]
        await auth.ChangePassword(change, metadata=as_(mine))
        await asyncio.gather(*log_ins, return_exceptions=True)
        assert await owner.fetchval("SELECT count(*) FROM sessions WHERE ended_at IS NULL") == 1
        current = following


async def test_a_log_in_that_proved_the_former_password_waits_for_the_change(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    async with asyncio.timeout(60), owner.transaction():
        await owner.execute("UPDATE accounts SET password_changes = password_changes + 1")
        late = log_in(auth, PASSWORD)
        while not await owner.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            pass
    assert await reason_of(late) == "CREDENTIALS_INVALID"
    await log_in(auth, PASSWORD)


# --- resetting ---------------------------------------------------------------------------------


async def test_a_mailed_token_sets_a_new_password_once_and_ends_every_session(
    auth: Auth, postman: Postman, outbox: Path, owner: asyncpg.Connection
) -> None:
    tokens = await sign_up(auth)
    await ask_for_reset(auth)
    token = await mailed(outbox, postman, "Reset")
    request = pb.ResetPasswordRequest(token=token, new_password=NEW)
    await auth.ResetPassword(request)
    assert await reason_of(auth.ResetPassword(request)) == "MAILED_TOKEN_INVALID"
    assert await reason_of(refresh(auth, tokens.refresh_token)) == "REFRESH_TOKEN_INVALID"
    assert await reason_of(log_in(auth, PASSWORD)) == "CREDENTIALS_INVALID"
    await log_in(auth, NEW)
    assert await owner.fetchval("SELECT email_verified_at IS NOT NULL FROM users")
    assert {"password_reset.mail", "password.reset", "email.verify"} <= {*await actions(owner)}


async def test_of_ten_uses_at_once_of_a_mailed_token_one_succeeds(
    auth: Auth, postman: Postman, outbox: Path
) -> None:
    await sign_up(auth)
    await ask_for_reset(auth)
    token = await mailed(outbox, postman, "Reset")
    uses = (
        auth.ResetPassword(pb.ResetPasswordRequest(token=token, new_password=f"{NEW} {number}"))
        for number in range(10)
    )
    answers = await asyncio.gather(*uses, return_exceptions=True)
    assert sum(isinstance(answer, pb.ResetPasswordResponse) for answer in answers) == 1


async def test_a_password_that_is_refused_does_not_use_the_token_up(
    auth: Auth, postman: Postman, outbox: Path
) -> None:
    await sign_up(auth)
    await ask_for_reset(auth)
    token = await mailed(outbox, postman, "Reset")
    short = pb.ResetPasswordRequest(token=token, new_password="short")
    assert await reason_of(auth.ResetPassword(short)) == "FIELD_INVALID new_password"
    await auth.ResetPassword(pb.ResetPasswordRequest(token=token, new_password=NEW))


async def test_a_mailed_token_expires_after_an_hour_and_is_stored_as_its_hash(
    auth: Auth, postman: Postman, outbox: Path, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    await ask_for_reset(auth)
    token = await mailed(outbox, postman, "Reset")
    stored = await owner.fetchval("SELECT hash FROM mailed_tokens WHERE kind = 'password_reset'")
    assert stored == hashlib.sha256(token.encode()).digest()
    clock.advance(hours=1)
    request = pb.ResetPasswordRequest(token=token, new_password=NEW)
    assert await reason_of(auth.ResetPassword(request)) == "MAILED_TOKEN_INVALID"


async def test_an_email_without_an_account_is_answered_alike_and_gets_no_mail(
    auth: Auth, postman: Postman, outbox: Path, owner: asyncpg.Connection
) -> None:
    await ask_for_reset(auth, "nobody@example.com")
    assert await owner.fetchval("SELECT count(*) FROM mails") == 1
    await deliver(postman)
    assert not read(outbox)


async def test_nobody_is_mailed_more_than_once_a_minute(
    auth: Auth, postman: Postman, outbox: Path, clock: FakeClock, mails: MailStore
) -> None:
    await sign_up(auth)
    for _ in range(5):
        await ask_for_reset(auth)
        await deliver(postman)
    assert len([mail for mail in read(outbox) if "Reset" in mail["Subject"]]) == 1
    clock.advance(minutes=1)
    await ask_for_reset(auth)
    await deliver(postman)
    assert len([mail for mail in read(outbox) if "Reset" in mail["Subject"]]) == 2


async def test_a_token_is_good_for_what_it_was_mailed_for_only(
    auth: Auth, postman: Postman, outbox: Path
) -> None:
    tokens = await sign_up(auth)
    verifying = await mailed(outbox, postman, "email address")
    for token in (verifying, tokens.refresh_token, tokens.access_token, "", "\0"):
        request = pb.ResetPasswordRequest(token=token, new_password=NEW)
        assert await reason_of(auth.ResetPassword(request)) == "MAILED_TOKEN_INVALID"


async def test_whoever_resets_the_password_need_not_wait_for_guesses(
    auth: Auth, postman: Postman, outbox: Path
) -> None:
    await sign_up(auth)
    for _ in range(12):
        await reason_of(log_in(auth, "not the password"))
    await ask_for_reset(auth)
    token = await mailed(outbox, postman, "Reset")
    await auth.ResetPassword(pb.ResetPasswordRequest(token=token, new_password=NEW))
    await log_in(auth, NEW)


# --- emails ------------------------------------------------------------------------------------


async def test_signing_up_mails_a_token_that_verifies_the_email_once(
    auth: Auth, postman: Postman, outbox: Path, owner: asyncpg.Connection, verifier: TokenVerifier
) -> None:
    mine = as_(await verifier.verify((await sign_up(auth)).access_token))
    token = await mailed(outbox, postman, "email address")
    assert not await owner.fetchval("SELECT email_verified_at IS NOT NULL FROM users")
    await auth.VerifyEmail(pb.VerifyEmailRequest(token=token))
    assert await owner.fetchval("SELECT email_verified_at IS NOT NULL FROM users")
    again = auth.VerifyEmail(pb.VerifyEmailRequest(token=token))
    assert await reason_of(again) == "MAILED_TOKEN_INVALID"
    before = len(read(outbox))
    await auth.RequestEmailVerification(pb.RequestEmailVerificationRequest(), metadata=mine)
    await deliver(postman)
    assert len(read(outbox)) == before


def modes(directory: Path) -> tuple[int, list[int]]:
    files = [stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()]
    return stat.S_IMODE(directory.stat().st_mode), files


async def test_a_mail_is_a_file_for_its_owner_alone(
    auth: Auth, postman: Postman, outbox: Path
) -> None:
    await sign_up(auth)
    await deliver(postman)
    assert modes(outbox) == (0o700, [0o600])
    (mail,) = read(outbox)
    assert (mail["To"], mail["From"]) == (ADA, SENDER)


@pytest.fixture
def blocked(outbox: Path) -> Path:
    outbox.write_text("a file where the directory should be")
    return outbox


async def test_a_mail_that_is_not_sent_is_tried_again_and_later_each_time(
    auth: Auth, mails: MailStore, blocked: Path, outbox: Path, clock: FakeClock
) -> None:
    await sign_up(auth)
    failing = Postman(mails, Outbox(outbox, SENDER), clock=clock)
    for seconds in (5, 10, 20):
        assert await failing.deliver()
        assert not await failing.deliver()
        clock.advance(seconds=seconds)
    await asyncio.to_thread(blocked.unlink)
    assert await failing.deliver()
    assert len(read(outbox)) == 1


@asynccontextmanager
async def smtp_server(said: list[str]) -> AsyncIterator[int]:
    """Run a server that takes mails as RFC 5321 has it, and remembers what it was told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        while command := (await reader.readline()).decode().strip():
            said.append(command)
            if command == "data":
                writer.write(b"354 go on\r\n")
                mail = await reader.readuntil(b"\r\n.\r\n")
                said.extend(mail.decode().splitlines())
            writer.write(b"221 bye\r\n" if command == "QUIT" else b"250 ok\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


async def test_a_mail_goes_by_smtp_where_that_is_configured() -> None:
    said: list[str] = []
    async with smtp_server(said) as port:
        await Smtp("127.0.0.1", port, SENDER).send(Mail(ADA, "Hello", "Good day.\n"))
    assert "rcpt TO:<ada@example.com>" in said
    assert {"Subject: Hello", "Good day."} <= {*said}


async def test_a_server_that_is_away_is_a_mail_not_sent() -> None:
    with pytest.raises(OSError, match="refused"):
        await Smtp("127.0.0.1", 1, SENDER).send(Mail(ADA, "Hello", "Good day.\n"))


async def test_old_mails_and_tokens_are_forgotten(
    auth: Auth, postman: Postman, mails: MailStore, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    await deliver(postman)
    clock.advance(days=2)
    await mails.forget(clock.now)
    for table in ("mails", "mailed_tokens"):
        assert await owner.fetchval(f"SELECT count(*) FROM {table}") == 0


# --- what may be a password --------------------------------------------------------------------


@pytest.mark.parametrize(
    "password",
    [
        "passwordpassword",
        "Password!Password1",
        "aaaaaaaaaaaaa",
        "qwertyuiopqwertyuiop",
        "121212121212",
    ],
)
def test_what_guessers_try_first_is_known(password: str) -> None:
    assert Commonplace().holds(password.replace("!", ""))


@pytest.mark.parametrize("password", [PASSWORD, NEW, "kimberly likes trains", "x7#kd92!mmz0"])
def test_what_is_merely_plain_is_not(password: str) -> None:
    assert not Commonplace().holds(password)


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_a_hash_file_is_searched_to_its_ends(tmp_path: Path, size: int) -> None:
    lost = [f"lost password {number}" for number in range(size)]
    lines = sorted(hashlib.sha1(each.encode()).hexdigest().upper() for each in lost)
    file = tmp_path / "lost.txt"
    file.write_text("".join(f"{line}:{number}\r\n" for number, line in enumerate(lines)))
    breached = HashFile(file)
    assert all(breached.holds(each) for each in lost)
    assert not any(breached.holds(f"{each}!") for each in lost)


@pytest.mark.parametrize("password", ["ada@example.com", "Ada@Example.com1", "  ada@example.com "])
async def test_ones_own_email_is_no_password(auth: Auth, password: str) -> None:
    request = pb.SignUpRequest(email=ADA, password=password)
    assert await reason_of(auth.SignUp(request)) == "FIELD_INVALID password"


async def test_a_breached_password_is_refused_with_its_field(auth: Auth) -> None:
    request = pb.SignUpRequest(email=ADA, password="passwordpassword")
    assert await reason_of(auth.SignUp(request)) == "FIELD_INVALID password"


def test_every_kind_of_mail_has_a_lifetime() -> None:
    assert all(lifetime_of(kind) for kind in Kind)
