"""A session ends with the consent that it rests on, and with no other."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import asyncpg
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from server import consent
from server.auth.endings import ConsentEndings
from server.caller import Caller, Credentials
from server.database import Connection, SystemDatabase
from server.errors import Unauthenticated
from server.grants import EndedGrants
from server.tokens import TokenVerifier
from server.users.consent_store import ConsentStore
from tests.auth.conftest import PASSWORD, Auth, reason_of, refresh, sign_up
from tests.conftest import FakeClock

REFUSED = "REFRESH_TOKEN_INVALID"


@pytest.fixture
def consents(system_database: SystemDatabase, clock: FakeClock) -> ConsentStore:
    return ConsentStore(system_database, ConsentEndings(), clock=clock)


async def decide(
    consents: ConsentStore, mine: Credentials, *, granted: bool, purpose: str = consent.MEMORY_STORE
) -> int:
    """Decide, and return how many sessions that ended."""
    recorded = await consents.record(
        mine.caller, purpose, granted=granted, session_id=mine.grant_id
    )
    return recorded.ended_sessions


async def log_in(auth: Auth) -> pb.Tokens:
    request = pb.LogInRequest(email="ada@example.com", password=PASSWORD)
    return (await auth.LogIn(request)).tokens


async def is_refused(auth: Auth, token: str) -> bool:
    request = pb.RefreshTokenRequest(refresh_token=token)
    return await reason_of(auth.RefreshToken(request)) == REFUSED


async def test_withdrawing_what_all_rests_on_ends_every_session(
    auth: Auth,
    consents: ConsentStore,
    verifier: TokenVerifier,
    ended: EndedGrants,
    owner: asyncpg.Connection,
) -> None:
    here = await sign_up(auth)
    there = await log_in(auth)
    mine = await verifier.verify(here.access_token)
    assert await decide(consents, mine, granted=True) == 0
    assert await decide(consents, mine, granted=False) == 2
    assert await is_refused(auth, here.refresh_token)
    assert await is_refused(auth, there.refresh_token)
    reasons = await owner.fetch("SELECT end_reason FROM sessions")
    assert [row["end_reason"] for row in reasons] == ["consent"] * 2
    told = await owner.fetch("SELECT action FROM audit_events ORDER BY xid, id")
    assert [row["action"] for row in told][-3:] == ["consent.withdraw", *["session.end"] * 2]
    await ended.refresh()
    with pytest.raises(Unauthenticated):
        await verifier.verify(there.access_token)
    # Who called may still export or erase what is there, until the token expires.
    assert (await verifier.verify(here.access_token)).grant_id == mine.grant_id
    # And anybody may come back.
    await refresh(auth, (await log_in(auth)).refresh_token)


async def test_the_sessions_of_others_go_on(
    auth: Auth, consents: ConsentStore, verifier: TokenVerifier
) -> None:
    mine = await verifier.verify((await sign_up(auth)).access_token)
    theirs = await sign_up(auth, "bob@example.com")
    await decide(consents, mine, granted=True)
    assert await decide(consents, mine, granted=False) == 1
    await refresh(auth, theirs.refresh_token)


@pytest.mark.parametrize(
    "purpose", [consent.MEMORY_EMBED, consent.MEMORY_SENSITIVE, consent.MEMORY_AGENT_ACCESS]
)
async def test_no_session_rests_on_what_is_optional(
    auth: Auth, consents: ConsentStore, verifier: TokenVerifier, purpose: str
) -> None:
    tokens = await sign_up(auth)
    mine = await verifier.verify(tokens.access_token)
    await decide(consents, mine, granted=True, purpose=purpose)
    assert await decide(consents, mine, granted=False, purpose=purpose) == 0
    await refresh(auth, tokens.refresh_token)


async def test_declining_ends_nothing_that_a_consent_did_not_hold_up(
    auth: Auth, consents: ConsentStore, verifier: TokenVerifier
) -> None:
    tokens = await sign_up(auth)
    mine = await verifier.verify(tokens.access_token)
    assert await decide(consents, mine, granted=False) == 0
    token = (await refresh(auth, tokens.refresh_token)).refresh_token
    await decide(consents, mine, granted=True)
    assert await decide(consents, mine, granted=False) == 1
    again = await verifier.verify((await log_in(auth)).access_token)
    assert await decide(consents, again, granted=False) == 0
    assert await is_refused(auth, token)


async def test_what_cannot_be_ended_is_not_withdrawn(
    auth: Auth,
    system_database: SystemDatabase,
    verifier: TokenVerifier,
    owner: asyncpg.Connection,
) -> None:
    class Powerless(ConsentEndings):
        async def end_sessions(
            self, connection: Connection, caller: Caller, now: datetime, *, calling: UUID
        ) -> int:
            raise ZeroDivisionError

    tokens = await sign_up(auth)
    mine = await verifier.verify(tokens.access_token)
    consents = ConsentStore(system_database, Powerless())
    await decide(consents, mine, granted=True)
    with pytest.raises(ZeroDivisionError):
        await decide(consents, mine, granted=False)
    assert await owner.fetchval("SELECT bool_and(granted) FROM consents")
    await refresh(auth, tokens.refresh_token)
