"""Sessions that their user lists and ends, and access tokens that end with them."""

import asyncio

import asyncpg
import grpc
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids
from server.caller import Credentials
from server.errors import Unauthenticated
from server.grants import EndedGrants
from server.tokens import TokenVerifier
from tests.auth.conftest import PASSWORD, Auth, reason_of, refresh, sign_up
from tests.conftest import FakeClock, bearer

REFUSED = "REFRESH_TOKEN_INVALID"


async def log_in(auth: Auth, email: str = "ada@example.com") -> pb.Tokens:
    return (await auth.LogIn(pb.LogInRequest(email=email, password=PASSWORD))).tokens


def as_(credentials: Credentials) -> tuple[tuple[str, str], ...]:
    return bearer(credentials.caller, grant_id=credentials.grant_id)


async def test_users_see_their_living_sessions_and_which_one_asks(
    auth: Auth, verifier: TokenVerifier, clock: FakeClock
) -> None:
    mine = await verifier.verify((await sign_up(auth)).access_token)
    other = await log_in(auth)
    clock.advance(minutes=1)
    await refresh(auth, other.refresh_token)
    await sign_up(auth, "bob@example.com")
    listed = (await auth.ListSessions(pb.ListSessionsRequest(), metadata=as_(mine))).sessions
    assert [each.current for each in listed] == [False, True]
    assert listed[1].id == ids.show(ids.SESSION, mine.grant_id)
    assert listed[0].refresh_time.ToDatetime(clock.now.tzinfo) == clock.now
    assert "grpc-python" in listed[0].client_name


async def test_a_revoked_session_refreshes_no_more_and_its_tokens_are_refused(
    auth: Auth, verifier: TokenVerifier, ended: EndedGrants
) -> None:
    mine = await verifier.verify((await sign_up(auth)).access_token)
    lost = await log_in(auth)
    session = ids.show(ids.SESSION, (await verifier.verify(lost.access_token)).grant_id)
    await auth.RevokeSession(pb.RevokeSessionRequest(id=session), metadata=as_(mine))
    await ended.refresh()
    with pytest.raises(Unauthenticated):
        await verifier.verify(lost.access_token)
    assert await reason_of(refresh(auth, lost.refresh_token)) == REFUSED
    listed = await auth.ListSessions(pb.ListSessionsRequest(), metadata=as_(mine))
    assert [each.current for each in listed.sessions] == [True]


async def test_anothers_session_is_as_good_as_none(auth: Auth, verifier: TokenVerifier) -> None:
    hers = await verifier.verify((await sign_up(auth)).access_token)
    his = await verifier.verify((await sign_up(auth, "bob@example.com")).access_token)
    for wanted in (hers.grant_id, ids.new_id()):
        request = pb.RevokeSessionRequest(id=ids.show(ids.SESSION, wanted))
        refused = await reason_of(auth.RevokeSession(request, metadata=as_(his)))
        assert refused == "RESOURCE_NOT_FOUND"


async def test_every_way_to_end_a_session_ends_its_access_tokens(
    auth: Auth, verifier: TokenVerifier, ended: EndedGrants, clock: FakeClock
) -> None:
    tokens = await sign_up(auth)
    await auth.LogOut(pb.LogOutRequest(refresh_token=tokens.refresh_token))
    stolen = await log_in(auth)
    await refresh(auth, stolen.refresh_token)
    clock.advance(minutes=1)
    assert await reason_of(refresh(auth, stolen.refresh_token)) == REFUSED
    third = await log_in(auth)
    caller = await verifier.verify(third.access_token)
    answer = await auth.LogOutEverywhere(pb.LogOutEverywhereRequest(), metadata=as_(caller))
    assert answer.ended == 1
    await ended.refresh()
    for each in (tokens, stolen, third):
        with pytest.raises(Unauthenticated):
            await verifier.verify(each.access_token)


async def test_of_a_hundred_sessions_and_one_the_oldest_ends(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    first = await sign_up(auth)
    for _ in range(100):
        newest = await log_in(auth)
    assert await reason_of(refresh(auth, first.refresh_token)) == REFUSED
    await refresh(auth, newest.refresh_token)
    reasons = await owner.fetch("SELECT end_reason FROM sessions WHERE ended_at IS NOT NULL")
    assert [row["end_reason"] for row in reasons] == ["crowded"]


async def test_a_process_that_starts_knows_what_ended_before(
    auth: Auth, verifier: TokenVerifier, ended: EndedGrants
) -> None:
    tokens = await sign_up(auth)
    grant = (await verifier.verify(tokens.access_token)).grant_id
    assert grant not in ended
    await auth.LogOut(pb.LogOutRequest(refresh_token=tokens.refresh_token))
    await ended.refresh()
    assert grant in ended


async def test_what_ended_is_forgotten_once_its_tokens_have_expired(
    auth: Auth, ended: EndedGrants, owner: asyncpg.Connection, clock: FakeClock
) -> None:
    tokens = await sign_up(auth)
    await auth.LogOut(pb.LogOutRequest(refresh_token=tokens.refresh_token))
    await ended.refresh()
    grant = await owner.fetchval("SELECT id FROM ended_grants")
    clock.advance(minutes=17, seconds=29)
    await owner.execute("UPDATE ended_grants SET ended_at = now() - interval '18 minutes'")
    await ended.refresh()
    assert grant in ended
    clock.advance(seconds=1)
    await ended.refresh()
    assert grant not in ended
    await ended.forget(await owner.fetchval("SELECT now() + interval '1 hour'"))
    assert not await owner.fetchval("SELECT count(*) FROM ended_grants")


async def test_a_token_of_narrow_scope_opens_what_its_scope_names_and_no_more(
    auth: Auth, verifier: TokenVerifier
) -> None:
    caller = (await verifier.verify((await sign_up(auth)).access_token)).caller
    for scope in ("", "memory.read", "users", "USER", "user.read"):
        narrow = bearer(caller, scope=scope)
        refused = auth.ListSessions(pb.ListSessionsRequest(), metadata=narrow)
        assert await reason_of(refused) == "SCOPE_MISSING"


async def test_ending_sessions_at_once_ends_each_once(
    auth: Auth, verifier: TokenVerifier, owner: asyncpg.Connection
) -> None:
    mine = await verifier.verify((await sign_up(auth)).access_token)
    for _ in range(4):
        await log_in(auth)
    everywhere = (
        auth.LogOutEverywhere(pb.LogOutEverywhereRequest(), metadata=as_(mine)) for _ in range(10)
    )
    answers = await asyncio.gather(*everywhere)
    assert sum(answer.ended for answer in answers) == 5
    events = "SELECT count(*) FROM audit_events WHERE action = 'session.end'"
    assert await owner.fetchval(events) == 5


async def test_nobody_lists_sessions_without_a_token(auth: Auth) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await auth.ListSessions(pb.ListSessionsRequest())
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
