"""From one tenant of an account into another: sessions, and what they end with."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import asyncpg
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids
from server.auth import session_store
from server.auth.issuing import Issuer
from server.auth.membership_store import MembershipStore
from server.auth.refresh_tokens import GRACE, Session, hash_of, new_token
from server.auth.session_store import SessionStore
from server.database import SystemDatabase
from server.errors import Unauthenticated
from server.grants import EndedGrants
from server.tokens import TokenVerifier
from tests.auth.conftest import SESSION_LIFETIME, Auth, Person, log_in, reason_of, refresh
from tests.auth.guests import ROUNDS, Guest, Switch, guest, join, leaving, sessions_of, switch
from tests.conftest import FakeClock

__all__ = ["guest", "join", "switch"]


async def test_a_session_elsewhere_is_that_of_the_user_there_and_stays_it(
    auth: Auth, ada: Person, guest: Guest, verifier: TokenVerifier
) -> None:
    there = guest.away.credentials
    assert ids.show(ids.TENANT, there.caller.tenant_id) == ada.tenant_id
    assert ids.show(ids.USER, there.caller.user_id) == guest.away.id
    tokens = await refresh(auth, guest.away.tokens.refresh_token)
    assert await verifier.verify(tokens.access_token) == there
    # The one that it was begun from goes on, as who it was.
    tokens = await refresh(auth, guest.home.tokens.refresh_token)
    assert await verifier.verify(tokens.access_token) == guest.home.credentials


async def test_sessions_are_listed_with_their_tenants_wherever_one_is(
    auth: Auth, guest: Guest
) -> None:
    for person in (guest.home, guest.away):
        listed = await sessions_of(auth, person)
        assert [each.tenant_id for each in listed] == [
            guest.away.tenant_id,
            guest.home.tenant_id,
        ]
        assert [each.tenant_id for each in listed if each.current] == [person.tenant_id]


async def test_there_is_a_way_back_home(guest: Guest, switch: Switch) -> None:
    back = await switch(guest.away, guest.home.tenant_id)
    assert back.credentials.caller == guest.home.credentials.caller
    assert back.credentials.role == "owner"


async def test_nobody_switches_to_where_they_do_not_belong(
    auth: Auth, ada: Person, bob: Person
) -> None:
    for tenant_id in (ada.tenant_id, ids.show(ids.TENANT, ids.new_id())):
        request = pb.SwitchTenantRequest(tenant_id=tenant_id)
        refused = auth.SwitchTenant(request, metadata=bob.as_)
        assert await reason_of(refused) == "RESOURCE_NOT_FOUND"
        assert await reason_of(leaving(auth, bob, tenant_id)) == "RESOURCE_NOT_FOUND"
    request = pb.SwitchTenantRequest(tenant_id=ada.id)
    refused = auth.SwitchTenant(request, metadata=bob.as_)
    assert await reason_of(refused) == "FIELD_INVALID tenant_id"
    assert await reason_of(leaving(auth, bob, ada.id)) == "FIELD_INVALID tenant_id"


async def test_switching_to_and_fro_makes_no_session_live_longer(
    auth: Auth, guest: Guest, switch: Switch, clock: FakeClock
) -> None:
    clock.advance(days=20)
    away = await switch(guest.home, guest.away.tenant_id)
    back = await switch(away, guest.home.tenant_id)
    expiries = {each.expire_time.seconds for each in await sessions_of(auth, back)}
    assert len(expiries) == 1
    clock.advance(seconds=SESSION_LIFETIME.total_seconds() - 20 * 86400)
    assert await reason_of(refresh(auth, back.tokens.refresh_token)) == "REFRESH_TOKEN_INVALID"


async def replay(auth: Auth, person: Person, clock: FakeClock) -> None:
    """Use the refresh token of a session that is in use again."""
    await refresh(auth, person.tokens.refresh_token)
    clock.advance(seconds=GRACE.total_seconds() + 1)
    refused = await reason_of(refresh(auth, person.tokens.refresh_token))
    assert refused == "REFRESH_TOKEN_INVALID"


async def log_out(auth: Auth, person: Person, _clock: FakeClock) -> None:
    await auth.LogOut(pb.LogOutRequest(refresh_token=person.tokens.refresh_token))


async def revoke(auth: Auth, person: Person, _clock: FakeClock) -> None:
    session_id = ids.show(ids.SESSION, person.credentials.grant_id)
    await auth.RevokeSession(pb.RevokeSessionRequest(id=session_id), metadata=person.as_)


@pytest.mark.parametrize("end", [log_out, revoke, replay])
async def test_what_was_switched_to_ends_with_what_it_was_begun_from(
    auth: Auth,
    guest: Guest,
    switch: Switch,
    verifier: TokenVerifier,
    ended: EndedGrants,
    clock: FakeClock,
    end: Callable[[Auth, Person, FakeClock], Awaitable[None]],
) -> None:
    back = await switch(guest.away, guest.home.tenant_id)
    again = await log_in(auth, guest.home)
    await end(auth, guest.away, clock)
    await ended.refresh()
    for person in (guest.away, back):
        with pytest.raises(Unauthenticated):
            await verifier.verify(person.tokens.access_token)
        refused = await reason_of(refresh(auth, person.tokens.refresh_token))
        assert refused == "REFRESH_TOKEN_INVALID"
    # Neither what it was itself begun from, nor another log-in.
    await refresh(auth, guest.home.tokens.refresh_token)
    await refresh(auth, again.tokens.refresh_token)


async def test_a_session_that_has_ended_is_no_way_into_another(auth: Auth, guest: Guest) -> None:
    await auth.LogOut(pb.LogOutRequest(refresh_token=guest.home.tokens.refresh_token))
    request = pb.SwitchTenantRequest(tenant_id=guest.away.tenant_id)
    refused = auth.SwitchTenant(request, metadata=guest.home.as_)
    assert await reason_of(refused) == "TOKEN_INVALID"


async def test_of_switches_and_the_end_of_a_session_at_once_nothing_is_left(
    auth: Auth,
    system_database: SystemDatabase,
    memberships: MembershipStore,
    guest: Guest,
    issuer: Issuer,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    sessions = SessionStore(system_database)
    there = guest.away.credentials.caller.tenant_id
    for _ in range(ROUNDS):
        new = issuer.begin(guest.home.credentials.caller, "owner", "")
        await sessions.start(new.session, new.token_hash, clock.now, password_changes=0)
        asking = replace(guest.home.credentials, grant_id=new.session.id)
        switches = [
            memberships.switch(asking, there, hash_of(new_token()), "", clock.now) for _ in range(6)
        ]
        end = sessions.end_by_token(new.token_hash, clock.now)
        outcomes = await asyncio.gather(*switches[:3], end, *switches[3:], return_exceptions=True)
        assert {type(each) for each in outcomes} <= {type(None), Session, Unauthenticated}
        left = "SELECT count(*) FROM sessions WHERE switched_from = $1 AND ended_at IS NULL"
        assert not await owner.fetchval(left, new.session.id)


async def test_of_switches_and_a_log_out_everywhere_at_once_nothing_is_left(
    system_database: SystemDatabase,
    memberships: MembershipStore,
    guest: Guest,
    issuer: Issuer,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    sessions, caller = SessionStore(system_database), guest.home.credentials.caller
    there = guest.away.credentials.caller.tenant_id
    for _ in range(ROUNDS):
        new = issuer.begin(caller, "owner", "")
        await sessions.start(new.session, new.token_hash, clock.now, password_changes=0)
        asking = replace(guest.home.credentials, grant_id=new.session.id)
        switches = [
            memberships.switch(asking, there, hash_of(new_token()), "", clock.now) for _ in range(6)
        ]
        end = sessions.end_everywhere(caller, clock.now, with_keys=False)
        outcomes = await asyncio.gather(*switches[:3], end, *switches[3:], return_exceptions=True)
        assert {type(each) for each in outcomes} <= {tuple, Session, Unauthenticated}
        left = "SELECT count(*) FROM sessions WHERE user_id = ANY ($1) AND ended_at IS NULL"
        both = [caller.user_id, guest.away.credentials.caller.user_id]
        assert not await owner.fetchval(left, both)


async def test_a_person_has_a_number_of_sessions_in_all_tenants_together(
    auth: Auth, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_store, "_MOST_LIVING", 3)
    before = await sessions_of(auth, guest.home)
    await log_in(auth, guest.home)
    assert len(await sessions_of(auth, guest.home)) == len(before) + 1 == 3
    again = await log_in(auth, guest.home)
    # The oldest went, and with it what it was switched to.
    left = {each.tenant_id for each in await sessions_of(auth, guest.home)}
    assert left == {guest.home.tenant_id}
    await refresh(auth, again.tokens.refresh_token)


async def test_a_session_is_not_ended_to_make_room_for_what_is_begun_from_it(
    auth: Auth, guest: Guest, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_store, "_MOST_LIVING", 2)
    again = await switch(guest.home, guest.away.tenant_id)
    assert len(await sessions_of(auth, guest.home)) == 2
    for person in (guest.home, again):
        await refresh(auth, person.tokens.refresh_token)
