"""Sessions: refresh tokens that are used once, and what ends a session."""

import asyncio
import base64
import hashlib
from datetime import timedelta

import asyncpg
from kimberly.auth.v1 import auth_pb2 as pb

from server.auth.refresh_tokens import GRACE, MOST_REPEATS
from server.tokens import TokenVerifier
from tests.auth.conftest import PASSWORD, SESSION_LIFETIME, Auth, reason_of, refresh, sign_up
from tests.conftest import FakeClock

REFUSED = "REFRESH_TOKEN_INVALID"


async def generations(auth: Auth, count: int, email: str = "ada@example.com") -> list[str]:
    """Return the refresh tokens of a session, the newest last."""
    tokens = [(await sign_up(auth, email)).refresh_token]
    while len(tokens) < count:
        tokens.append((await refresh(auth, tokens[-1])).refresh_token)
    return tokens


async def actions(owner: asyncpg.Connection) -> list[str]:
    rows = await owner.fetch("SELECT action FROM audit_events ORDER BY id")
    return [row["action"] for row in rows]


async def test_a_refresh_token_is_exchanged_for_new_tokens_of_the_same_user(
    auth: Auth, verifier: TokenVerifier
) -> None:
    first = await sign_up(auth)
    second = await refresh(auth, first.refresh_token)
    assert second.refresh_token != first.refresh_token
    assert await verifier.verify(second.access_token) == await verifier.verify(first.access_token)


async def test_refresh_tokens_are_256_random_bits_and_stored_as_their_hash(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    token = (await sign_up(auth)).refresh_token
    assert len(base64.urlsafe_b64decode(token + "=")) == 32
    stored = await owner.fetchval("SELECT hash FROM refresh_tokens")
    assert stored == hashlib.sha256(token.encode()).digest()


async def test_an_unknown_refresh_token_is_refused(auth: Auth) -> None:
    for token in ("", "unknown", "\0", "a" * 100_000):
        assert await reason_of(refresh(auth, token)) == REFUSED


async def test_replaying_any_earlier_generation_ends_the_session(
    auth: Auth, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    for replayed in range(4):
        tokens = await generations(auth, 5, f"{replayed}@example.com")
        clock.advance(seconds=GRACE.total_seconds() + 1)
        assert await reason_of(refresh(auth, tokens[replayed])) == REFUSED
        assert await reason_of(refresh(auth, tokens[-1])) == REFUSED
        assert (await actions(owner))[-1] == "session.revoke"


async def test_within_the_grace_only_the_newest_used_generation_may_be_repeated(
    auth: Auth,
) -> None:
    tokens = await generations(auth, 3)
    assert await reason_of(refresh(auth, tokens[0])) == REFUSED
    assert await reason_of(refresh(auth, tokens[-1])) == REFUSED


async def test_a_double_click_logs_nobody_out(auth: Auth) -> None:
    token = (await sign_up(auth)).refresh_token
    answers = await asyncio.gather(*(refresh(auth, token) for _ in range(1 + MOST_REPEATS)))
    assert len({answer.refresh_token for answer in answers}) == 1 + MOST_REPEATS
    kept = answers[0].refresh_token
    for _ in range(3):
        kept = (await refresh(auth, kept)).refresh_token


async def test_fifty_concurrent_replays_end_the_session(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    token = (await sign_up(auth)).refresh_token
    answers = await asyncio.gather(
        *(refresh(auth, token) for _ in range(50)), return_exceptions=True
    )
    granted = [answer for answer in answers if isinstance(answer, pb.Tokens)]
    assert len(granted) == 1 + MOST_REPEATS
    for answer in granted:
        assert await reason_of(refresh(auth, answer.refresh_token)) == REFUSED
    assert (await actions(owner)).count("session.revoke") == 1


async def test_of_the_twins_that_a_double_click_makes_one_goes_on(
    auth: Auth, clock: FakeClock
) -> None:
    token = (await sign_up(auth)).refresh_token
    twins = [(await refresh(auth, token)).refresh_token for _ in range(2)]
    clock.advance(minutes=5)
    survivor = (await refresh(auth, twins[0])).refresh_token
    clock.advance(minutes=5)
    assert await reason_of(refresh(auth, twins[1])) == REFUSED
    assert await reason_of(refresh(auth, survivor)) == REFUSED


async def test_the_end_of_one_session_is_not_that_of_another(auth: Auth) -> None:
    await sign_up(auth)
    credentials = pb.LogInRequest(email="ada@example.com", password=PASSWORD)
    one, other = [(await auth.LogIn(credentials)).tokens for _ in range(2)]
    await auth.LogOut(pb.LogOutRequest(refresh_token=one.refresh_token))
    await refresh(auth, other.refresh_token)


async def test_a_session_ends_a_fixed_time_after_it_started(
    auth: Auth, clock: FakeClock, verifier: TokenVerifier
) -> None:
    tokens = await sign_up(auth)
    clock.advance(days=29, hours=23, minutes=55)
    tokens = await refresh(auth, tokens.refresh_token)
    assert tokens.refresh_token_lifetime.seconds == 300
    assert tokens.access_token_lifetime.seconds == 300
    clock.now += timedelta(minutes=5)
    assert await reason_of(refresh(auth, tokens.refresh_token)) == REFUSED
    assert timedelta(days=30) == SESSION_LIFETIME


async def test_logging_in_forgets_the_sessions_that_expired(
    auth: Auth, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    clock.advance(days=32)
    await auth.LogIn(pb.LogInRequest(email="ada@example.com", password=PASSWORD))
    assert await owner.fetchval("SELECT count(*) FROM sessions") == 1
    assert await owner.fetchval("SELECT count(*) FROM refresh_tokens") == 1


async def test_any_refresh_token_of_a_session_logs_out(auth: Auth) -> None:
    for shown in (0, -1):
        tokens = await generations(auth, 3, f"{shown}@example.com")
        await auth.LogOut(pb.LogOutRequest(refresh_token=tokens[shown]))
        assert await reason_of(refresh(auth, tokens[-1])) == REFUSED


async def test_logging_out_answers_alike_whatever_the_token(auth: Auth) -> None:
    token = (await sign_up(auth)).refresh_token
    for shown in (token, token, "unknown", ""):
        response = await auth.LogOut(pb.LogOutRequest(refresh_token=shown))
        assert response == pb.LogOutResponse()


async def test_sign_up_log_in_and_log_out_are_audited_once_each(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    tokens = await sign_up(auth)
    await auth.LogIn(pb.LogInRequest(email="ada@example.com", password=PASSWORD))
    await auth.LogOut(pb.LogOutRequest(refresh_token=tokens.refresh_token))
    await auth.LogOut(pb.LogOutRequest(refresh_token=tokens.refresh_token))
    assert await actions(owner) == ["user.create", "session.start", "session.start", "session.end"]


async def test_a_refused_log_in_writes_nothing(auth: Auth, owner: asyncpg.Connection) -> None:
    await sign_up(auth)
    wrong = pb.LogInRequest(email="ada@example.com", password="not the password")
    assert await reason_of(auth.LogIn(wrong)) == "CREDENTIALS_INVALID"
    assert await actions(owner) == ["user.create", "session.start"]
