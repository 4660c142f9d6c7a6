"""Tenants of several people: who joins, who may do what, and that it is written down."""

import asyncio
from itertools import product
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids
from server.access import Role
from server.auth.issuing import Issuer
from server.auth.member_store import MemberStore
from server.auth.members import may_change
from server.auth.postman import Postman
from server.auth.session_store import SessionStore
from server.database import SystemDatabase
from server.errors import Unauthenticated
from server.grants import EndedGrants
from server.tokens import TokenVerifier
from tests.auth.conftest import (
    PASSWORD,
    Auth,
    Join,
    Meet,
    Person,
    Tenants,
    log_in,
    owners,
    reason_of,
    refresh,
    sign_up,
)
from tests.auth.mails import deliver, mailed, read
from tests.conftest import FakeClock, bearer

ROUNDS = 20


# --- joining -----------------------------------------------------------------------------------


async def test_whoever_accepts_an_invitation_joins_in_its_role_with_a_verified_email(
    tenants: Tenants, ada: Person, join: Join, owner: asyncpg.Connection
) -> None:
    guest = await join("auditor")
    assert guest.credentials.caller.tenant_id == ada.credentials.caller.tenant_id
    assert (ada.credentials.role, guest.credentials.role) == ("owner", "auditor")
    listed = await tenants.ListMembers(pb.ListMembersRequest(), metadata=guest.as_)
    assert [(each.user_id, each.role) for each in listed.members] == [
        (ada.id, pb.ROLE_OWNER),
        (guest.id, pb.ROLE_AUDITOR),
    ]
    assert [each.email_verified for each in listed.members] == [False, True]
    assert await owner.fetchval("SELECT count(*) FROM tenants") == 1


async def test_an_invitation_is_for_one_email_and_one_person(
    auth: Auth,
    tenants: Tenants,
    ada: Person,
    postman: Postman,
    outbox: Path,
    owner: asyncpg.Connection,
) -> None:
    request = pb.CreateInvitationRequest(email="Bob@example.com", role=pb.ROLE_MEMBER)
    await tenants.CreateInvitation(request, metadata=ada.as_)
    token = await mailed(outbox, postman, "invited")
    signing_up = {"password": PASSWORD, "invitation": token}
    stranger = auth.SignUp(pb.SignUpRequest(email="eve@example.com", **signing_up))
    assert await reason_of(stranger) == "MAILED_TOKEN_INVALID"
    uses = (auth.SignUp(pb.SignUpRequest(email="bob@example.com", **signing_up)) for _ in range(5))
    answers = await asyncio.gather(*uses, return_exceptions=True)
    assert sum(isinstance(answer, pb.SignUpResponse) for answer in answers) == 1
    assert await owner.fetchval("SELECT count(*) FROM users") == 2
    listed = await tenants.ListInvitations(pb.ListInvitationsRequest(), metadata=ada.as_)
    assert not listed.invitations


async def test_an_invitation_that_was_revoked_or_expired_is_none(
    auth: Auth,
    tenants: Tenants,
    ada: Person,
    postman: Postman,
    outbox: Path,
    clock: FakeClock,
) -> None:
    async def invite(email: str) -> tuple[pb.Invitation, str]:
        request = pb.CreateInvitationRequest(email=email, role=pb.ROLE_MEMBER)
        answer = await tenants.CreateInvitation(request, metadata=ada.as_)
        return answer.invitation, await mailed(outbox, postman, "invited")

    revoked, token = await invite("bob@example.com")
    revoke = pb.RevokeInvitationRequest(id=revoked.id)
    await tenants.RevokeInvitation(revoke, metadata=ada.as_)
    again = tenants.RevokeInvitation(revoke, metadata=ada.as_)
    assert await reason_of(again) == "RESOURCE_NOT_FOUND"
    _, late = await invite("cy@example.com")
    clock.advance(days=7)
    for email, shown in (("bob@example.com", token), ("cy@example.com", late)):
        request = pb.SignUpRequest(email=email, password=PASSWORD, invitation=shown)
        assert await reason_of(auth.SignUp(request)) == "MAILED_TOKEN_INVALID"
    # What has expired is not in the way.
    await invite("cy@example.com")


async def test_nobody_is_asked_twice_nor_who_belongs_already(
    tenants: Tenants, ada: Person, postman: Postman, outbox: Path
) -> None:
    request = pb.CreateInvitationRequest(email="bob@example.com", role=pb.ROLE_MEMBER)
    await tenants.CreateInvitation(request, metadata=ada.as_)
    again = tenants.CreateInvitation(request, metadata=ada.as_)
    assert await reason_of(again) == "RESOURCE_EXISTS"
    herself = pb.CreateInvitationRequest(email="ada@example.com", role=pb.ROLE_MEMBER)
    refused = tenants.CreateInvitation(herself, metadata=ada.as_)
    assert await reason_of(refused) == "RESOURCE_EXISTS"
    await deliver(postman)
    assert len([mail for mail in read(outbox) if "invited" in mail["Subject"]]) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("email", "bob"), ("role", pb.ROLE_OWNER), ("role", 0), ("role", 99)]
)
async def test_an_invitation_that_cannot_be_names_the_field(
    tenants: Tenants, ada: Person, field: str, value: Any
) -> None:
    good: dict[str, Any] = {"email": "bob@example.com", "role": pb.ROLE_MEMBER}
    request = pb.CreateInvitationRequest(**good | {field: value})
    refused = tenants.CreateInvitation(request, metadata=ada.as_)
    assert await reason_of(refused) == f"FIELD_INVALID {field}"


async def test_who_has_an_account_keeps_it(auth: Auth, ada: Person, join: Join) -> None:
    guest = await join("member")
    again = pb.SignUpRequest(email=guest.email, password=PASSWORD)
    assert await reason_of(auth.SignUp(again)) == "RESOURCE_EXISTS"


# --- roles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("actor", "member"), [*product(Role, Role)])
def test_owners_are_for_owners_to_make_and_unmake(actor: Role, member: Role) -> None:
    assert may_change(actor, member) == (
        actor is Role.OWNER or (actor is Role.ADMIN and member is not Role.OWNER)
    )
    assert may_change(actor, member, Role.OWNER) == (actor is Role.OWNER)


async def test_a_role_that_was_taken_opens_nothing_although_the_token_still_names_it(
    tenants: Tenants, ada: Person, join: Join
) -> None:
    admin = await join("admin")
    await tenants.ListMembers(pb.ListMembersRequest(), metadata=admin.as_)
    assign = pb.AssignRoleRequest(user_id=admin.id, role=pb.ROLE_MEMBER)
    await tenants.AssignRole(assign, metadata=ada.as_)
    for refused in (
        tenants.ListMembers(pb.ListMembersRequest(), metadata=admin.as_),
        tenants.LogOutMember(pb.LogOutMemberRequest(user_id=ada.id), metadata=admin.as_),
    ):
        assert await reason_of(refused) == "METHOD_NOT_ALLOWED"


async def test_a_refreshed_token_names_the_new_role(
    auth: Auth, tenants: Tenants, ada: Person, join: Join, verifier: TokenVerifier
) -> None:
    guest = await join("member")
    assign = pb.AssignRoleRequest(user_id=guest.id, role=pb.ROLE_ADMIN)
    await tenants.AssignRole(assign, metadata=ada.as_)
    tokens = await refresh(auth, guest.tokens.refresh_token)
    assert (await verifier.verify(tokens.access_token)).role == "admin"


async def test_the_last_owner_stays_one_however_many_try_at_once(
    tenants: Tenants, ada: Person, join: Join
) -> None:
    second = await join("owner")
    as_second = bearer(second.credentials.caller)
    steps = [
        tenants.AssignRole(
            pb.AssignRoleRequest(user_id=each.id, role=pb.ROLE_MEMBER), metadata=metadata
        )
        for each, metadata in ((ada, as_second), (second, ada.as_), (ada, ada.as_))
    ]
    await asyncio.gather(*steps, return_exceptions=True)
    for metadata in (ada.as_, as_second):
        try:
            listed = await tenants.ListMembers(pb.ListMembersRequest(), metadata=metadata)
        except Exception:  # noqa: BLE001 - of the two, one is an owner no more
            continue
        assert [each.role for each in listed.members].count(pb.ROLE_OWNER) == 1
        return
    pytest.fail("nobody owns the tenant")


async def test_an_admin_does_nothing_to_an_owner(tenants: Tenants, ada: Person, join: Join) -> None:
    admin, member = await join("admin"), await join("member")
    for refused in (
        tenants.AssignRole(
            pb.AssignRoleRequest(user_id=ada.id, role=pb.ROLE_MEMBER), metadata=admin.as_
        ),
        tenants.AssignRole(
            pb.AssignRoleRequest(user_id=member.id, role=pb.ROLE_OWNER), metadata=admin.as_
        ),
        tenants.DisableMember(pb.DisableMemberRequest(user_id=ada.id), metadata=admin.as_),
        tenants.LogOutMember(pb.LogOutMemberRequest(user_id=ada.id), metadata=admin.as_),
    ):
        assert await reason_of(refused) == "METHOD_NOT_ALLOWED"


@pytest.mark.parametrize("role", ["member", "auditor"])
async def test_only_who_runs_the_tenant_changes_it(
    tenants: Tenants, ada: Person, join: Join, role: str
) -> None:
    person = await join(role)
    # Even if the token said otherwise.
    for as_ in (person.as_, bearer(person.credentials.caller, role="owner")):
        for refused in (
            tenants.AssignRole(
                pb.AssignRoleRequest(user_id=person.id, role=pb.ROLE_OWNER), metadata=as_
            ),
            tenants.DisableMember(pb.DisableMemberRequest(user_id=ada.id), metadata=as_),
            tenants.EnableMember(pb.EnableMemberRequest(user_id=ada.id), metadata=as_),
            tenants.LogOutMember(pb.LogOutMemberRequest(user_id=ada.id), metadata=as_),
            tenants.CreateInvitation(
                pb.CreateInvitationRequest(email="x@example.com", role=pb.ROLE_ADMIN),
                metadata=as_,
            ),
        ):
            assert await reason_of(refused) == "METHOD_NOT_ALLOWED"


async def test_somebody_of_another_tenant_is_nobody(
    tenants: Tenants, ada: Person, meet: Meet
) -> None:
    bob = await meet("bob@example.com")
    for user_id in (ada.id, ids.show(ids.USER, ids.new_id())):
        for refused in (
            tenants.AssignRole(
                pb.AssignRoleRequest(user_id=user_id, role=pb.ROLE_MEMBER), metadata=bob.as_
            ),
            tenants.DisableMember(pb.DisableMemberRequest(user_id=user_id), metadata=bob.as_),
            tenants.EnableMember(pb.EnableMemberRequest(user_id=user_id), metadata=bob.as_),
            tenants.LogOutMember(pb.LogOutMemberRequest(user_id=user_id), metadata=bob.as_),
        ):
            assert await reason_of(refused) == "RESOURCE_NOT_FOUND"
    listed = await tenants.ListMembers(pb.ListMembersRequest(), metadata=bob.as_)
    assert [each.user_id for each in listed.members] == [bob.id]


# --- disabling ---------------------------------------------------------------------------------


async def test_who_is_disabled_is_out_with_all_they_had_open(
    auth: Auth,
    tenants: Tenants,
    ada: Person,
    join: Join,
    verifier: TokenVerifier,
    ended: EndedGrants,
) -> None:
    bob = await join("member")
    request = pb.CreateApiKeyRequest(name="a script", scopes=["memory.read"])
    key = await auth.CreateApiKey(request, metadata=bob.as_)
    exchange = pb.ExchangeTokenRequest(api_key=key.secret)
    token = (await auth.ExchangeToken(exchange)).access_token
    disable = pb.DisableMemberRequest(user_id=bob.id)
    answer = await tenants.DisableMember(disable, metadata=ada.as_)
    assert answer.member.HasField("disable_time")
    await ended.refresh()
    for each in (bob.tokens.access_token, token):
        with pytest.raises(Unauthenticated):
            await verifier.verify(each)
    assert await reason_of(log_in(auth, bob)) == "CREDENTIALS_INVALID"
    assert await reason_of(auth.ExchangeToken(exchange)) == "API_KEY_INVALID"
    assert await reason_of(refresh(auth, bob.tokens.refresh_token)) == "REFRESH_TOKEN_INVALID"

    await tenants.EnableMember(pb.EnableMemberRequest(user_id=bob.id), metadata=ada.as_)
    await log_in(auth, bob)
    await verifier.verify((await auth.ExchangeToken(exchange)).access_token)


async def test_of_log_ins_and_a_disabling_at_once_no_session_is_left(
    system_database: SystemDatabase,
    members: MemberStore,
    issuer: Issuer,
    owner: asyncpg.Connection,
    clock: FakeClock,
) -> None:
    sessions = SessionStore(system_database)
    for _ in range(ROUNDS):
        boss, bob = await owners(owner, 2)
        news = [issuer.begin(bob, "member", "") for _ in range(8)]
        starts = [
            sessions.start(new.session, new.token_hash, clock.now, password_changes=0)
            for new in news
        ]
        disabling = members.disable(boss, bob.user_id, clock.now)
        await asyncio.gather(*starts[:4], disabling, *starts[4:], return_exceptions=True)
    assert await owner.fetchval("SELECT count(*) FROM sessions") > 0
    assert not await owner.fetchval("SELECT count(*) FROM sessions WHERE ended_at IS NULL")


async def test_owners_who_unmake_each_other_at_once_leave_one(
    members: MemberStore, owner: asyncpg.Connection
) -> None:
    for _ in range(ROUNDS):
        one, other = await owners(owner, 2)
        await asyncio.gather(
            members.assign(one, other.user_id, Role.MEMBER),
            members.assign(other, one.user_id, Role.MEMBER),
            return_exceptions=True,
        )
    left = "SELECT count(*) FROM users WHERE role = 'owner'"
    assert await owner.fetchval(left) == ROUNDS


async def test_nobody_disables_themselves(tenants: Tenants, ada: Person) -> None:
    refused = tenants.DisableMember(pb.DisableMemberRequest(user_id=ada.id), metadata=ada.as_)
    assert await reason_of(refused) == "STATE_CONFLICT"


async def test_what_is_done_to_somebody_stands_in_their_log_with_who_did_it(
    tenants: Tenants, ada: Person, join: Join, owner: asyncpg.Connection
) -> None:
    bob = await join("member")
    assign = pb.AssignRoleRequest(user_id=bob.id, role=pb.ROLE_AUDITOR)
    await tenants.AssignRole(assign, metadata=ada.as_)
    log_out = pb.LogOutMemberRequest(user_id=bob.id)
    assert (await tenants.LogOutMember(log_out, metadata=ada.as_)).ended == 1
    await tenants.DisableMember(pb.DisableMemberRequest(user_id=bob.id), metadata=ada.as_)
    await tenants.EnableMember(pb.EnableMemberRequest(user_id=bob.id), metadata=ada.as_)
    rows = await owner.fetch(
        """
        SELECT action, actor, user_id FROM audit_events
         WHERE action LIKE 'member.%' ORDER BY id
        """
    )
    assert [row["action"] for row in rows] == [
        "member.assign_auditor",
        "member.log_out",
        "member.disable",
        "member.enable",
    ]
    assert {row["actor"] for row in rows} == {ada.id}
    assert {row["user_id"].hex for row in rows} == {bob.id.removeprefix("usr_")}


async def test_an_admin_ends_the_keys_of_somebody_and_their_log_says_who_did(
    auth: Auth, tenants: Tenants, ada: Person, join: Join, owner: asyncpg.Connection
) -> None:
    bob = await join("member")
    request = pb.CreateApiKeyRequest(name="a script", scopes=["memory.read"])
    exchanges = [
        pb.ExchangeTokenRequest(
            api_key=(await auth.CreateApiKey(request, metadata=whose.as_)).secret
        )
        for whose in (bob, ada)
    ]
    for with_keys, ended in ((False, 0), (True, 1)):
        log_out = pb.LogOutMemberRequest(user_id=bob.id, revoke_api_keys=with_keys)
        answer = await tenants.LogOutMember(log_out, metadata=ada.as_)
        assert answer.revoked_api_keys == ended
        if not with_keys:
            await auth.ExchangeToken(exchanges[0])
    assert await reason_of(auth.ExchangeToken(exchanges[0])) == "API_KEY_INVALID"
    await auth.ExchangeToken(exchanges[1])
    event = await owner.fetchrow(
        "SELECT actor, user_id FROM audit_events WHERE action = 'api_key.revoke'"
    )
    assert (event["actor"], ids.show(ids.USER, event["user_id"])) == (ada.id, bob.id)


async def test_looking_at_the_tenant_stands_in_the_log_of_whoever_looked(
    tenants: Tenants, ada: Person, join: Join, owner: asyncpg.Connection
) -> None:
    eve = await join("auditor")
    await tenants.ListMembers(pb.ListMembersRequest(), metadata=eve.as_)
    await tenants.ListInvitations(pb.ListInvitationsRequest(), metadata=ada.as_)
    bob = await join("member")
    for refused in (
        tenants.ListMembers(pb.ListMembersRequest(), metadata=bob.as_),
        tenants.ListInvitations(pb.ListInvitationsRequest(), metadata=bob.as_),
    ):
        assert await reason_of(refused) == "METHOD_NOT_ALLOWED"
    rows = await owner.fetch(
        """
        SELECT action, actor, user_id, resource FROM audit_events
         WHERE action LIKE '%s.read' ORDER BY id
        """
    )
    assert [(row["action"], row["actor"]) for row in rows] == [
        ("members.read", eve.id),
        ("invitations.read", ada.id),
    ]
    tenant = ids.show(ids.TENANT, ada.credentials.caller.tenant_id)
    for row in rows:
        assert (row["actor"], row["resource"]) == (ids.show(ids.USER, row["user_id"]), tenant)


async def test_a_long_list_of_members_comes_in_pages(
    tenants: Tenants, ada: Person, join: Join
) -> None:
    everybody = [ada.id, *[(await join("member")).id for _ in range(4)]]
    for size in (1, 2, 5, 100):
        seen, token = [], ""
        while True:
            request = pb.ListMembersRequest(page_size=size, page_token=token)
            page = await tenants.ListMembers(request, metadata=ada.as_)
            seen += [each.user_id for each in page.members]
            token = page.next_page_token
            if not token:
                break
        assert seen == everybody


async def test_the_first_of_a_tenant_owns_it(auth: Auth, verifier: TokenVerifier) -> None:
    tokens = await sign_up(auth, "grace@example.com")
    assert (await verifier.verify(tokens.access_token)).role == "owner"
