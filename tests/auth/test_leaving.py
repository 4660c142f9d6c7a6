"""Who leaves a tenant: what is erased, what is answered again, who stays its owner."""

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids
from server.auth.membership_store import MembershipStore
from server.clock import utc_now
from server.errors import StateConflict
from server.privacy.erasure_store import ErasureStore
from tests.auth.conftest import Auth, Meet, Person, Tenants, log_in, owners, reason_of, refresh
from tests.auth.guests import ROUNDS, Guest, guest, join, leaving, switch, tenants_of
from tests.conftest import bearer

__all__ = ["guest", "join", "switch"]


@pytest.mark.parametrize("where", ["home", "away"])
async def test_whoever_leaves_is_out_and_what_they_kept_there_is_erased(
    auth: Auth,
    tenants: Tenants,
    ada: Person,
    guest: Guest,
    where: str,
    owner: asyncpg.Connection,
) -> None:
    there = guest.away.credentials.caller
    left = await leaving(auth, getattr(guest, where), ada.tenant_id)
    row = await owner.fetchrow("SELECT tenant_id, user_id, receipt_id, state FROM erasures")
    assert (row["tenant_id"], row["user_id"]) == (there.tenant_id, there.user_id)
    assert ids.show(ids.RECEIPT, row["receipt_id"]) == left.receipt_id
    jobs = await owner.fetch("SELECT payload FROM jobs WHERE kind = 'user.erase'")
    assert [guest.away.id in job["payload"] for job in jobs] == [True]
    assert [each.home for each in await tenants_of(auth, guest.home)] == [True]
    refused = await reason_of(refresh(auth, guest.away.tokens.refresh_token))
    assert refused == "REFRESH_TOKEN_INVALID"
    await refresh(auth, guest.home.tokens.refresh_token)
    await log_in(auth, guest.home)
    listed = await tenants.ListMembers(pb.ListMembersRequest(), metadata=ada.as_)
    assert [each.user_id for each in listed.members] == [ada.id]
    again = leaving(auth, guest.home, ada.tenant_id)
    assert await reason_of(again) == "RESOURCE_NOT_FOUND"


async def test_who_did_not_hear_that_they_left_asks_again_and_has_the_same_receipt(
    auth: Auth, ada: Person, guest: Guest, owner: asyncpg.Connection
) -> None:
    left = await leaving(auth, guest.home, ada.tenant_id, request_id="once")
    again = [
        await leaving(auth, guest.home, ada.tenant_id, request_id="once"),
        # As whom they were there nothing else can be meant, and no account is left to prove.
        await leaving(auth, guest.away, ada.tenant_id),
        await leaving(auth, guest.away, ada.tenant_id, "wrong", request_id="another"),
    ]
    assert [each.receipt_id for each in again] == [left.receipt_id] * 3
    assert await owner.fetchval("SELECT count(*) FROM erasures") == 1
    # At home the password is still asked for, and another request is another.
    refused = leaving(auth, guest.home, ada.tenant_id, "wrong", request_id="once")
    assert await reason_of(refused) == "PROOF_INVALID"
    refused = leaving(auth, guest.home, ada.tenant_id, request_id="another")
    assert await reason_of(refused) == "RESOURCE_NOT_FOUND"
    # Nor does who is gone there leave anything else.
    refused = leaving(auth, guest.away, guest.home.tenant_id)
    assert await reason_of(refused) == "ACCOUNT_ERASED"


async def test_a_request_to_leave_is_of_one_tenant_and_a_refused_one_is_none(
    auth: Auth, ada: Person, guest: Guest, meet: Meet, join: Callable[..., Awaitable[Person]]
) -> None:
    cy = await meet("cy@example.com")
    await join(guest.home, cy)
    for _ in range(2):
        refused = leaving(auth, guest.home, guest.home.tenant_id, request_id="once")
        assert await reason_of(refused) == "STATE_CONFLICT"
    left = await leaving(auth, guest.home, ada.tenant_id, request_id="once")
    refused = leaving(auth, guest.home, cy.tenant_id, request_id="once")
    assert await reason_of(refused) == "REQUEST_ID_REUSED"
    other = await leaving(auth, guest.home, cy.tenant_id, request_id="twice")
    assert other.receipt_id != left.receipt_id
    for request_id in ("a" * 65, "a\0"):
        refused = leaving(auth, guest.home, ada.tenant_id, request_id=request_id)
        assert await reason_of(refused) == "FIELD_INVALID request_id"


async def test_of_two_leavings_under_one_request_at_once_one_is_done(
    memberships: MembershipStore, guest: Guest, owner: asyncpg.Connection
) -> None:
    caller, there = guest.home.credentials.caller, guest.away.credentials.caller.tenant_id
    receipts = await asyncio.gather(*(memberships.leave(caller, there, "once") for _ in range(4)))
    assert len(set(receipts)) == 1
    assert await owner.fetchval("SELECT receipt_id FROM erasures") == receipts[0]


async def test_nobody_leaves_without_the_password(auth: Auth, guest: Guest) -> None:
    for password in ("", "wrong", "a" * 1000):
        refused = leaving(auth, guest.away, guest.away.tenant_id, password)
        assert await reason_of(refused) == "PROOF_INVALID"
    assert len(await tenants_of(auth, guest.home)) == 2


async def test_nobody_leaves_the_tenant_that_their_account_is_at_home_in(
    auth: Auth, guest: Guest
) -> None:
    for person in (guest.home, guest.away):
        refused = leaving(auth, person, guest.home.tenant_id)
        assert await reason_of(refused) == "STATE_CONFLICT"
    await log_in(auth, guest.home)


async def test_the_last_owner_does_not_leave(
    auth: Auth, tenants: Tenants, ada: Person, guest: Guest
) -> None:
    make = pb.AssignRoleRequest(user_id=guest.away.id, role=pb.ROLE_OWNER)
    await tenants.AssignRole(make, metadata=ada.as_)
    step_down = pb.AssignRoleRequest(user_id=ada.id, role=pb.ROLE_ADMIN)
    await tenants.AssignRole(step_down, metadata=ada.as_)
    for person in (guest.home, guest.away):
        refused = leaving(auth, person, ada.tenant_id)
        assert await reason_of(refused) == "STATE_CONFLICT"
    make = pb.AssignRoleRequest(user_id=ada.id, role=pb.ROLE_OWNER)
    await tenants.AssignRole(make, metadata=bearer(guest.away.credentials.caller))
    await leaving(auth, guest.away, ada.tenant_id)


async def test_whoever_is_to_be_erased_or_disabled_at_home_is_no_owner_to_leave_a_tenant_to(
    auth: Auth,
    tenants: Tenants,
    ada: Person,
    guest: Guest,
    erasures: ErasureStore,
    meet: Meet,
    join: Callable[..., Awaitable[Person]],
    owner: asyncpg.Connection,
) -> None:
    cy = await meet("cy@example.com")
    for away in (guest.away, await join(cy, ada)):
        make = pb.AssignRoleRequest(user_id=away.id, role=pb.ROLE_OWNER)
        await tenants.AssignRole(make, metadata=ada.as_)
    disable = "UPDATE users SET disabled_at = $2 WHERE id = $1"
    await owner.execute(disable, cy.credentials.caller.user_id, utc_now())
    await erasures.begin(ada.credentials.caller)
    # Three are owners by their rows: hers is there until it is removed.
    rows = await owner.fetch(
        "SELECT role FROM users WHERE tenant_id = $1", ada.credentials.caller.tenant_id
    )
    assert [row["role"] for row in rows] == ["owner"] * 3
    refused = leaving(auth, guest.home, ada.tenant_id)
    assert await reason_of(refused) == "STATE_CONFLICT"
    await owner.execute(disable, cy.credentials.caller.user_id, None)
    await leaving(auth, guest.home, ada.tenant_id)


async def test_of_owners_who_leave_at_once_one_stays(
    memberships: MembershipStore, owner: asyncpg.Connection
) -> None:
    for _ in range(ROUNDS):
        homes = [(await owners(owner, 1))[0] for _ in range(2)]
        tenant_id = ids.new_id()
        await owner.execute("INSERT INTO tenants VALUES ($1, now())", tenant_id)
        await owner.executemany(
            """
            INSERT INTO users (tenant_id, id, display_name, created_at, home_id)
            VALUES ($1, uuidv7(), 'somebody', now(), $2)
            """,
            [(tenant_id, home.user_id) for home in homes],
        )
        outcomes = await asyncio.gather(
            *(memberships.leave(home, tenant_id, "") for home in homes), return_exceptions=True
        )
        assert [type(each) for each in outcomes].count(StateConflict) == 1
    left = "SELECT count(*) FROM users WHERE home_id IS NOT NULL"
    assert await owner.fetchval(left) == ROUNDS
