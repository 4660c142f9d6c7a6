"""Who joins a tenant with the account that they have, by an invitation."""

import asyncio

import asyncpg
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from server.auth import membership_store
from server.auth.members import Membership
from server.auth.membership_store import MembershipStore
from server.errors import AccountErased
from server.privacy.erasure_store import ErasureStore
from tests.auth.conftest import Auth, Invite, Meet, Person, Tenants, reason_of
from tests.auth.guests import (
    ROUNDS,
    Guest,
    Switch,
    accept,
    guest,
    join,
    leaving,
    switch,
    tenants_of,
)
from tests.conftest import FakeClock

__all__ = ["guest", "join", "switch"]


async def test_who_has_an_account_joins_with_it_and_is_another_user_there(
    auth: Auth, tenants: Tenants, ada: Person, bob: Person, invite: Invite
) -> None:
    joined = await accept(auth, bob, await invite(ada, bob.email, "auditor"))
    assert (joined.tenant_id, joined.role) == (ada.tenant_id, pb.ROLE_AUDITOR)
    assert (joined.home, joined.current) == (False, False)
    assert joined.user_id not in {ada.id, bob.id}
    listed = await tenants.ListMembers(pb.ListMembersRequest(), metadata=ada.as_)
    assert [(each.user_id, each.email, each.role, each.home) for each in listed.members] == [
        (ada.id, ada.email, pb.ROLE_OWNER, True),
        (joined.user_id, bob.email, pb.ROLE_AUDITOR, False),
    ]
    # Who has the token reads the mails of the account.
    assert [each.email_verified for each in listed.members] == [False, True]
    open_ = await tenants.ListInvitations(pb.ListInvitationsRequest(), metadata=ada.as_)
    assert not open_.invitations


async def test_what_is_asked_of_a_member_starts_as_it_does_for_whoever_signs_up(
    guest: Guest, owner: asyncpg.Connection
) -> None:
    there = guest.away.credentials.caller.user_id
    for table in ("consents", "settings", "subscriptions", "api_keys", "agents"):
        count = f"SELECT count(*) FROM {table} WHERE user_id = $1"
        assert not await owner.fetchval(count, there), table


async def test_an_invitation_to_somebody_else_is_as_good_as_none(
    auth: Auth, ada: Person, bob: Person, invite: Invite, owner: asyncpg.Connection
) -> None:
    token = await invite(ada, "cy@example.com")
    for shown in (token, "", "unknown", "\0", "a" * 10_000):
        assert await reason_of(accept(auth, bob, shown)) == "MAILED_TOKEN_INVALID"
    # Nor is it used up by that.
    assert await owner.fetchval("SELECT accepted_at IS NULL FROM invitations")
    assert len(await tenants_of(auth, bob)) == 1


async def test_an_invitation_that_was_revoked_has_expired_or_is_used_is_none(
    auth: Auth, tenants: Tenants, ada: Person, bob: Person, invite: Invite, clock: FakeClock
) -> None:
    revoked = await invite(ada, bob.email)
    listed = await tenants.ListInvitations(pb.ListInvitationsRequest(), metadata=ada.as_)
    revoke = pb.RevokeInvitationRequest(id=listed.invitations[0].id)
    await tenants.RevokeInvitation(revoke, metadata=ada.as_)
    late = await invite(ada, bob.email)
    clock.advance(days=7)
    used = await invite(ada, bob.email)
    await accept(auth, bob, used)
    await leaving(auth, bob, ada.tenant_id)
    for token in (revoked, late, used):
        assert await reason_of(accept(auth, bob, token)) == "MAILED_TOKEN_INVALID"
    assert len(await tenants_of(auth, bob)) == 1


async def test_asked_again_it_answers_what_it_answered_first(
    auth: Auth, ada: Person, bob: Person, invite: Invite, switch: Switch, clock: FakeClock
) -> None:
    token = await invite(ada, bob.email)
    first = await accept(auth, bob, token)
    clock.advance(days=8)
    assert await accept(auth, bob, token) == first
    away = await switch(bob, ada.tenant_id)
    assert (await accept(auth, away, token)).user_id == first.user_id


async def test_of_many_acceptances_at_once_one_makes_a_member(
    ada: Person,
    meet: Meet,
    invite: Invite,
    memberships: MembershipStore,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    for number in range(5):
        person = await meet(f"{number}@example.com")
        token = await invite(ada, person.email)
        caller = person.credentials.caller
        joined = await asyncio.gather(
            *(memberships.accept(caller, token, clock.now) for _ in range(8))
        )
        assert len({each.caller.user_id for each in joined}) == 1
        made = "SELECT count(*) FROM users WHERE home_id = $1"
        assert await owner.fetchval(made, caller.user_id) == 1
    told = "SELECT count(*) FROM audit_events WHERE action = 'invitation.accept'"
    assert await owner.fetchval(told) == 5


async def test_whoever_signed_up_by_an_invitation_belongs_already(
    auth: Auth, ada: Person, meet: Meet, invite: Invite
) -> None:
    token = await invite(ada, "cy@example.com")
    cy = await meet("cy@example.com", token)
    again = await accept(auth, cy, token)
    assert (again.user_id, again.home, again.current) == (cy.id, True, True)


async def test_who_belongs_to_a_tenant_is_not_asked_into_it(
    tenants: Tenants, ada: Person, guest: Guest
) -> None:
    request = pb.CreateInvitationRequest(email=guest.home.email, role=pb.ROLE_ADMIN)
    refused = tenants.CreateInvitation(request, metadata=ada.as_)
    assert await reason_of(refused) == "RESOURCE_EXISTS"


async def test_an_account_joins_a_number_of_tenants_and_no_more(
    auth: Auth,
    meet: Meet,
    bob: Person,
    guest: Guest,
    invite: Invite,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership_store, "MOST_MEMBERSHIPS", 1)
    cy = await meet("cy@example.com")
    token = await invite(cy, bob.email)
    assert await reason_of(accept(auth, bob, token)) == "QUOTA_EXCEEDED"
    await leaving(auth, bob, guest.away.tenant_id)
    await accept(auth, bob, token)


async def test_who_is_being_erased_joins_nothing(
    auth: Auth, ada: Person, bob: Person, invite: Invite, erasures: ErasureStore
) -> None:
    token = await invite(ada, bob.email)
    await erasures.begin(bob.credentials.caller)
    assert await reason_of(accept(auth, bob, token)) == "ACCOUNT_ERASED"


async def test_of_an_acceptance_and_an_erasure_at_once_nobody_is_left(
    ada: Person,
    meet: Meet,
    invite: Invite,
    memberships: MembershipStore,
    erasures: ErasureStore,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    for number in range(ROUNDS):
        person = await meet(f"{number}@example.com")
        token, caller = await invite(ada, person.email), person.credentials.caller
        joining, erasing = await asyncio.gather(
            memberships.accept(caller, token, clock.now),
            erasures.begin(caller),
            return_exceptions=True,
        )
        assert not isinstance(erasing, BaseException)
        assert isinstance(joining, Membership | AccountErased), joining
        joined = isinstance(joining, Membership)
        assert len(erasing.membership_receipt_ids) == joined
    assert not await owner.fetchval("SELECT count(*) FROM users WHERE home_id IS NOT NULL")
