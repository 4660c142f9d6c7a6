"""One account in several tenants: what it is there, and what is done to it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from kimberly.auth.v1 import auth_pb2 as pb

from server.auth import people
from server.auth.issuing import Issuer
from server.auth.member_store import MemberStore
from server.auth.membership_store import MembershipStore
from server.auth.refresh_tokens import Session, hash_of, new_token
from server.auth.session_store import SessionStore
from server.database import SystemDatabase
from server.errors import PermissionDenied, Unauthenticated
from server.grants import EndedGrants
from server.tokens import TokenVerifier
from tests.auth.conftest import (
    PASSWORD,
    Auth,
    Invite,
    Meet,
    Person,
    Tenants,
    log_in,
    reason_of,
    refresh,
)
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
from tests.auth.mails import mailed
from tests.conftest import FakeClock, bearer

__all__ = ["guest", "join", "switch"]


# --- belonging ---------------------------------------------------------------------------------


async def test_the_tenants_of_an_account_are_the_same_from_each_of_them(
    auth: Auth, ada: Person, guest: Guest
) -> None:
    expected = [
        (guest.home.tenant_id, guest.home.id, pb.ROLE_OWNER, True),
        (ada.tenant_id, guest.away.id, pb.ROLE_MEMBER, False),
    ]
    for person in (guest.home, guest.away):
        listed = await tenants_of(auth, person)
        shown = [(each.tenant_id, each.user_id, each.role, each.home) for each in listed]
        assert shown == expected
        assert [each.tenant_id for each in listed if each.current] == [person.tenant_id]
    assert [each.tenant_id for each in await tenants_of(auth, ada)] == [ada.tenant_id]


@pytest.mark.parametrize("role", ["admin", "member", "auditor"])
async def test_a_role_counts_in_its_tenant_alone(
    tenants: Tenants,
    ada: Person,
    bob: Person,
    join: Callable[..., Awaitable[Person]],
    role: str,
) -> None:
    away = await join(bob, ada, role)
    assert (bob.credentials.role, away.credentials.role) == ("owner", role)
    # An owner at home, and what was asked of them elsewhere; whatever a token said.
    for as_ in (away.as_, bearer(away.credentials.caller, role="owner")):
        request = pb.AssignRoleRequest(user_id=away.id, role=pb.ROLE_OWNER)
        refused = tenants.AssignRole(request, metadata=as_)
        assert await reason_of(refused) == "METHOD_NOT_ALLOWED"
    # Whoever runs the tenant that Bob is at home in is nobody to others, and the reverse.
    for person, by in ((ada, bob), (away, bob), (bob, ada)):
        disable = pb.DisableMemberRequest(user_id=person.id)
        disabling = tenants.DisableMember(disable, metadata=by.as_)
        assert await reason_of(disabling) == "RESOURCE_NOT_FOUND"


async def test_keys_belong_to_who_made_them_in_one_tenant(
    auth: Auth, guest: Guest, verifier: TokenVerifier
) -> None:
    request = pb.CreateApiKeyRequest(name="a script", scopes=["memory.read"])
    key = await auth.CreateApiKey(request, metadata=guest.away.as_)
    exchanged = await auth.ExchangeToken(pb.ExchangeTokenRequest(api_key=key.secret))
    credentials = await verifier.verify(exchanged.access_token)
    assert credentials.caller == guest.away.credentials.caller
    at_home = await auth.ListApiKeys(pb.ListApiKeysRequest(), metadata=guest.home.as_)
    assert not at_home.api_keys
    revoke = pb.RevokeApiKeyRequest(id=key.api_key.id)
    refused = auth.RevokeApiKey(revoke, metadata=guest.home.as_)
    assert await reason_of(refused) == "RESOURCE_NOT_FOUND"


# --- the account as a whole --------------------------------------------------------------------


async def test_another_password_ends_every_session_but_the_one_that_asks(
    auth: Auth, guest: Guest, switch: Switch
) -> None:
    other = await switch(guest.home, guest.away.tenant_id)
    request = pb.ChangePasswordRequest(current_password=PASSWORD, new_password=f"new {PASSWORD}")
    answer = await auth.ChangePassword(request, metadata=guest.away.as_)
    assert answer.ended_sessions == 2
    for person in (guest.home, other):
        refused = await reason_of(refresh(auth, person.tokens.refresh_token))
        assert refused == "REFRESH_TOKEN_INVALID"
    await refresh(auth, guest.away.tokens.refresh_token)
    assert await reason_of(log_in(auth, guest.home)) == "CREDENTIALS_INVALID"
    await auth.LogIn(pb.LogInRequest(email=guest.home.email, password=f"new {PASSWORD}"))


async def test_a_password_that_was_reset_ends_every_session(
    auth: Auth, guest: Guest, postman: Any, outbox: Any
) -> None:
    await auth.RequestPasswordReset(pb.RequestPasswordResetRequest(email=guest.home.email))
    token = await mailed(outbox, postman, "Reset")
    request = pb.ResetPasswordRequest(token=token, new_password=f"new {PASSWORD}")
    await auth.ResetPassword(request)
    for person in (guest.home, guest.away):
        refused = await reason_of(refresh(auth, person.tokens.refresh_token))
        assert refused == "REFRESH_TOKEN_INVALID"


@pytest.mark.parametrize("where", ["home", "away"])
async def test_logging_out_everywhere_is_everywhere(
    auth: Auth, ada: Person, guest: Guest, where: str
) -> None:
    asking: Person = getattr(guest, where)
    answer = await auth.LogOutEverywhere(pb.LogOutEverywhereRequest(), metadata=asking.as_)
    assert answer.ended == 2
    for person in (guest.home, guest.away):
        refused = await reason_of(refresh(auth, person.tokens.refresh_token))
        assert refused == "REFRESH_TOKEN_INVALID"
    await refresh(auth, ada.tokens.refresh_token)


async def test_guesses_of_a_password_count_for_the_account_in_whichever_tenant(
    auth: Auth, guest: Guest
) -> None:
    for person in [guest.home, guest.away] * 5:
        refused = leaving(auth, person, guest.away.tenant_id, "wrong")
        assert await reason_of(refused) == "PROOF_INVALID"
    for person in (guest.home, guest.away):
        refused = leaving(auth, person, guest.away.tenant_id)
        assert await reason_of(refused) == "PROOF_INVALID"
    assert await reason_of(log_in(auth, guest.home)) == "CREDENTIALS_INVALID"
    assert len(await tenants_of(auth, guest.home)) == 2


async def test_an_account_that_is_disabled_at_home_is_out_of_all_tenants(
    auth: Auth,
    tenants: Tenants,
    ada: Person,
    guest: Guest,
    meet: Meet,
    invite: Invite,
    verifier: TokenVerifier,
    ended: EndedGrants,
) -> None:
    # Cy runs the tenant that Bob is at home in.
    boss = await meet("cy@example.com", await invite(guest.home, "cy@example.com", "admin"))
    make = pb.AssignRoleRequest(user_id=boss.id, role=pb.ROLE_OWNER)
    await tenants.AssignRole(make, metadata=guest.home.as_)
    # And Bob runs Ada's beside her.
    make = pb.AssignRoleRequest(user_id=guest.away.id, role=pb.ROLE_ADMIN)
    await tenants.AssignRole(make, metadata=ada.as_)
    request = pb.CreateApiKeyRequest(name="a script", scopes=["memory.read"])
    key = await auth.CreateApiKey(request, metadata=guest.away.as_)
    exchange = pb.ExchangeTokenRequest(api_key=key.secret)
    exchanged = (await auth.ExchangeToken(exchange)).access_token
    as_admin = bearer(guest.away.credentials.caller, role="admin")
    await tenants.ListMembers(pb.ListMembersRequest(), metadata=as_admin)

    disable = pb.DisableMemberRequest(user_id=guest.home.id)
    await tenants.DisableMember(disable, metadata=boss.as_)
    await ended.refresh()
    for token in (
        guest.home.tokens.access_token,
        guest.away.tokens.access_token,
        exchanged,
    ):
        with pytest.raises(Unauthenticated):
            await verifier.verify(token)
    for person in (guest.home, guest.away):
        refused = await reason_of(refresh(auth, person.tokens.refresh_token))
        assert refused == "REFRESH_TOKEN_INVALID"
    assert await reason_of(log_in(auth, guest.home)) == "CREDENTIALS_INVALID"
    assert await reason_of(auth.ExchangeToken(exchange)) == "API_KEY_INVALID"
    # Not even in the seconds in which a token is still believed.
    listing = tenants.ListMembers(pb.ListMembersRequest(), metadata=as_admin)
    assert await reason_of(listing) == "METHOD_NOT_ALLOWED"

    enable = pb.EnableMemberRequest(user_id=guest.home.id)
    await tenants.EnableMember(enable, metadata=boss.as_)
    await log_in(auth, guest.home)
    await verifier.verify((await auth.ExchangeToken(exchange)).access_token)


async def test_of_a_disabling_at_home_and_switches_at_once_no_session_is_left(
    tenants: Tenants,
    guest: Guest,
    meet: Meet,
    invite: Invite,
    memberships: MembershipStore,
    system_database: SystemDatabase,
    issuer: Issuer,
    clock: FakeClock,
    owner: asyncpg.Connection,
) -> None:
    boss = await meet("cy@example.com", await invite(guest.home, "cy@example.com", "admin"))
    make = pb.AssignRoleRequest(user_id=boss.id, role=pb.ROLE_OWNER)
    await tenants.AssignRole(make, metadata=guest.home.as_)
    sessions, there = SessionStore(system_database), guest.away.credentials.caller.tenant_id
    for _ in range(ROUNDS):
        new = issuer.begin(guest.home.credentials.caller, "owner", "")
        await sessions.start(new.session, new.token_hash, clock.now, password_changes=0)
        asking = replace(guest.home.credentials, grant_id=new.session.id)
        switches = [
            memberships.switch(asking, there, hash_of(new_token()), "", clock.now) for _ in range(4)
        ]
        disable = pb.DisableMemberRequest(user_id=guest.home.id)
        disabling = tenants.DisableMember(disable, metadata=boss.as_)
        outcomes = await asyncio.gather(
            *switches[:2], disabling, *switches[2:], return_exceptions=True
        )
        kinds = {type(each) for each in outcomes}
        assert kinds <= {pb.DisableMemberResponse, Session, PermissionDenied, Unauthenticated}
        assert isinstance(outcomes[2], pb.DisableMemberResponse)
        left = "SELECT count(*) FROM sessions WHERE user_id = ANY ($1) AND ended_at IS NULL"
        persons = [each.credentials.caller.user_id for each in (guest.home, guest.away)]
        assert not await owner.fetchval(left, persons)
        enable = pb.EnableMemberRequest(user_id=guest.home.id)
        await tenants.EnableMember(enable, metadata=boss.as_)


async def test_who_a_person_is_elsewhere_is_found_by_indexes_alone(
    system_database: SystemDatabase, guest: Guest, owner: asyncpg.Connection
) -> None:
    await owner.execute(
        """
        INSERT INTO users (tenant_id, id, email, display_name, created_at)
        SELECT tenant.id, uuidv7(), n || '@example.org', 'somebody', now()
          FROM (SELECT id FROM tenants LIMIT 1) AS tenant, generate_series(1, 10_000) AS n
        """
    )
    await owner.execute("ANALYZE users")
    caller, noted = guest.away.credentials.caller, list[str]()
    async with system_database.transaction() as connection:
        with connection.query_logger(lambda query: noted.append(query.query)):
            assert len(await people.everywhere(connection, caller)) == 2
            assert len(await people.standing_with(connection, caller)) == 1
    assert len(noted) == 2
    await owner.execute("SET plan_cache_mode = force_generic_plan")
    for number, query in enumerate(noted):
        await owner.execute(f"PREPARE hot{number} AS {query}")
        plan = await owner.fetch(f"EXPLAIN EXECUTE hot{number} (NULL, NULL)")
        assert "Seq Scan" not in str(plan)


# --- what a tenant does to a member of it ------------------------------------------------------


async def test_who_is_disabled_in_a_tenant_keeps_the_account_and_the_other_tenants(
    auth: Auth,
    tenants: Tenants,
    ada: Person,
    guest: Guest,
    verifier: TokenVerifier,
    ended: EndedGrants,
    switch: Switch,
) -> None:
    back = await switch(guest.away, guest.home.tenant_id)
    disable = pb.DisableMemberRequest(user_id=guest.away.id)
    await tenants.DisableMember(disable, metadata=ada.as_)
    await ended.refresh()
    with pytest.raises(Unauthenticated):
        await verifier.verify(guest.away.tokens.access_token)
    for person in (guest.home, back):
        await verifier.verify(person.tokens.access_token)
        await refresh(auth, person.tokens.refresh_token)
    await log_in(auth, guest.home)
    listed = await tenants_of(auth, guest.home)
    assert [each.HasField("disable_time") for each in listed] == [False, True]
    request = pb.SwitchTenantRequest(tenant_id=ada.tenant_id)
    # Nor do they leave: what is kept there waits until the tenant lets them in again.
    for refused in (
        auth.SwitchTenant(request, metadata=guest.home.as_),
        leaving(auth, guest.home, ada.tenant_id),
    ):
        assert await reason_of(refused) == "METHOD_NOT_ALLOWED"
    enable = pb.EnableMemberRequest(user_id=guest.away.id)
    await tenants.EnableMember(enable, metadata=ada.as_)
    await switch(guest.home, ada.tenant_id)


async def test_who_is_logged_out_of_a_tenant_stays_logged_in_elsewhere(
    auth: Auth, tenants: Tenants, ada: Person, guest: Guest, switch: Switch
) -> None:
    back = await switch(guest.away, guest.home.tenant_id)
    request = pb.LogOutMemberRequest(user_id=guest.away.id)
    assert (await tenants.LogOutMember(request, metadata=ada.as_)).ended == 1
    refused = await reason_of(refresh(auth, guest.away.tokens.refresh_token))
    assert refused == "REFRESH_TOKEN_INVALID"
    for person in (guest.home, back):
        await refresh(auth, person.tokens.refresh_token)


async def test_who_is_removed_is_out_of_this_tenant_and_of_no_other(
    auth: Auth,
    tenants: Tenants,
    ada: Person,
    guest: Guest,
    invite: Invite,
    owner: asyncpg.Connection,
) -> None:
    request = pb.RemoveMemberRequest(user_id=guest.away.id)
    removed = await tenants.RemoveMember(request, metadata=ada.as_)
    assert removed.receipt_id.startswith("rcp_")
    listed = await tenants.ListMembers(pb.ListMembersRequest(), metadata=ada.as_)
    assert [each.user_id for each in listed.members] == [ada.id]
    refused = await reason_of(refresh(auth, guest.away.tokens.refresh_token))
    assert refused == "REFRESH_TOKEN_INVALID"
    await refresh(auth, guest.home.tokens.refresh_token)
    assert [each.tenant_id for each in await tenants_of(auth, guest.home)] == [guest.home.tenant_id]
    # What they kept there is being erased; that they were there stays told, and by whom it ended.
    erased = [row["user_id"] for row in await owner.fetch("SELECT user_id FROM erasures")]
    assert erased == [guest.away.credentials.caller.user_id]
    told = await owner.fetch(
        "SELECT action, actor FROM audit_events WHERE user_id = $1 ORDER BY id DESC LIMIT 2",
        erased[0],
    )
    assert [tuple(row) for row in told] == [("user.erase", ada.id), ("member.remove", ada.id)]
    gone = tenants.RemoveMember(request, metadata=ada.as_)
    assert await reason_of(gone) == "RESOURCE_NOT_FOUND"
    # They may come back, as somebody new.
    again = await accept(auth, guest.home, await invite(ada, guest.home.email))
    assert again.user_id != guest.away.id


async def test_not_everybody_is_removed_by_everybody(
    tenants: Tenants,
    ada: Person,
    guest: Guest,
    meet: Meet,
    invite: Invite,
    join: Callable[..., Awaitable[Person]],
) -> None:
    cy = await meet("cy@example.com")
    admin = await join(cy, ada, "admin")
    local = await meet("dan@example.com", await invite(ada, "dan@example.com"))
    make = pb.AssignRoleRequest(user_id=guest.away.id, role=pb.ROLE_OWNER)
    await tenants.AssignRole(make, metadata=ada.as_)
    for person, by, reason in (
        (guest.away, local, "METHOD_NOT_ALLOWED"),
        (guest.away, admin, "METHOD_NOT_ALLOWED"),
        (admin, cy, "RESOURCE_NOT_FOUND"),
        (admin, admin, "STATE_CONFLICT"),
        (local, ada, "STATE_CONFLICT"),
    ):
        request = pb.RemoveMemberRequest(user_id=person.id)
        refused = tenants.RemoveMember(request, metadata=by.as_)
        assert await reason_of(refused) == reason
    listed = await tenants.ListMembers(pb.ListMembersRequest(), metadata=ada.as_)
    assert len(listed.members) == 4


# --- all or nothing ----------------------------------------------------------------------------


@pytest.fixture
def fail_at(owner: asyncpg.Connection) -> Callable[[str], Awaitable[None]]:
    """Have the database fail as an event is told: the transaction dies after all but that."""

    async def fail_at(action: str) -> None:
        await owner.execute(
            f"""
            CREATE OR REPLACE FUNCTION fail_here() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF new.action = '{action}' THEN RAISE EXCEPTION 'struck by lightning'; END IF;
                RETURN new;
            END $$;
            CREATE OR REPLACE TRIGGER fail_here BEFORE INSERT ON audit_events
                FOR EACH ROW EXECUTE FUNCTION fail_here();
            """
        )

    return fail_at


@pytest_asyncio.fixture
async def lightning(owner: asyncpg.Connection) -> Any:
    yield
    await owner.execute("DROP TRIGGER IF EXISTS fail_here ON audit_events")
    await owner.execute("DROP FUNCTION IF EXISTS fail_here")


async def all_rows(owner: asyncpg.Connection) -> dict[str, int]:
    """Count what a membership is made of."""
    tables = ("users", "sessions", "refresh_tokens", "erasures", "jobs", "consents")
    counts = {table: await owner.fetchval(f"SELECT count(*) FROM {table}") for table in tables}
    living = "SELECT count(*) FROM sessions WHERE ended_at IS NULL"
    accepted = "SELECT count(*) FROM invitations WHERE accepted_at IS NOT NULL"
    return {
        **counts,
        "living": await owner.fetchval(living),
        "accepted": await owner.fetchval(accepted),
    }


@pytest.mark.usefixtures("lightning")
async def test_whatever_fails_half_way_leaves_nothing_half(
    ada: Person,
    bob: Person,
    invite: Invite,
    memberships: MembershipStore,
    members: MemberStore,
    clock: FakeClock,
    fail_at: Callable[[str], Awaitable[None]],
    owner: asyncpg.Connection,
) -> None:
    token, caller = await invite(ada, bob.email), bob.credentials.caller
    there = ada.credentials.caller.tenant_id

    async def switch() -> None:
        await memberships.switch(bob.credentials, there, hash_of(new_token()), "", clock.now)

    async def remove() -> None:
        away = (await memberships.list_all(caller))[1]
        await members.remove(ada.credentials.caller, away.caller.user_id)

    steps: list[tuple[str, Callable[[], Awaitable[object]]]] = [
        ("invitation.accept", lambda: memberships.accept(caller, token, clock.now)),
        ("session.switch", switch),
        ("user.erase", lambda: memberships.leave(caller, there, "once")),
        ("user.erase", remove),
    ]
    for action, step in steps:
        before = await all_rows(owner)
        await fail_at(action)
        with pytest.raises(asyncpg.RaiseError, match="struck by lightning"):
            await step()
        assert await all_rows(owner) == before
        await fail_at("nothing")
        if action != "user.erase":
            await step()
    await remove()


async def test_what_an_account_does_is_told_in_the_tenant_that_it_does_it_in(
    auth: Auth, ada: Person, guest: Guest, owner: asyncpg.Connection
) -> None:
    await leaving(auth, guest.home, ada.tenant_id)

    async def told(person: Person) -> list[str]:
        rows = await owner.fetch(
            """
            SELECT action FROM audit_events
             WHERE tenant_id = $1 AND user_id = $2 AND actor = $3
             ORDER BY id
            """,
            person.credentials.caller.tenant_id,
            person.credentials.caller.user_id,
            person.id,
        )
        return [row["action"] for row in rows]

    assert await told(guest.away) == [
        "invitation.accept",
        "session.switch",
        "member.leave",
        "user.erase",
    ]
    # At home nobody learns of other tenants.
    assert set(await told(guest.home)) == {
        "user.create",
        "session.start",
        "email_verification.mail",
        "email.verify",
    }
    shown = await owner.fetchval(
        "SELECT count(*) FROM audit_events WHERE tenant_id = $1 AND (resource = $2 OR actor = $2)",
        ada.credentials.caller.tenant_id,
        guest.home.id,
    )
    assert not shown
