"""Auditors read what the log has of their tenant, and nothing else of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.users.v1 import users_pb2 as pb

from server import audit, ids
from server.access import METHODS, ROLES, Access, Role
from server.caller import ActingAgent, Caller
from server.database import Database
from tests.conftest import bearer
from tests.refusals import refusal_of
from tests.users.conftest import Users

MAY_LOOK: Final = (Role.OWNER, Role.ADMIN, Role.AUDITOR)
EVERYBODY: Final = "-"


@pytest_asyncio.fixture
async def people(owner: asyncpg.Connection, database: Database) -> Mapping[Role, Caller]:
    """Somebody of each role in one tenant, with an event each."""
    tenant_id = ids.new_id()
    await owner.execute("INSERT INTO tenants (id, created_at) VALUES ($1, now())", tenant_id)
    people = {role: Caller(tenant_id, ids.new_id()) for role in Role}
    for role, person in people.items():
        await move_in(owner, person, role)
        async with database.transaction(person) as connection:
            await audit.record(connection, person, "tea.make", f"by the {role}")
    return people


async def move_in(owner: asyncpg.Connection, person: Caller, role: Role) -> None:
    await owner.execute(
        """
        INSERT INTO users (tenant_id, id, email, display_name, created_at, role)
        VALUES ($1, $2, $3, 'somebody', now(), $4)
        """,
        person.tenant_id,
        person.user_id,
        f"{person.user_id}@example.com",
        role.value,
    )


async def events(
    users: Users, person: Caller, whose: str, role: Role = Role.OWNER, page_size: int = 0
) -> list[pb.AuditEvent]:
    """Return all events that somebody is shown, page by page."""
    found: list[pb.AuditEvent] = []
    request = pb.ListAuditEventsRequest(user_id=whose, page_size=page_size)
    while True:
        page = await users.ListAuditEvents(request, metadata=bearer(person, role=role))
        found += page.events
        request.page_token = page.next_page_token
        if not page.next_page_token:
            return found


def shown(person: Caller) -> str:
    return ids.show(ids.USER, person.user_id)


@pytest.mark.parametrize("role", MAY_LOOK)
async def test_who_may_look_sees_the_tenants_events_or_a_members(
    users: Users, people: Mapping[Role, Caller], role: Role
) -> None:
    everything = await events(users, people[role], EVERYBODY, page_size=2)
    made = {event.user_id: event.resource for event in everything if event.action == "tea.make"}
    assert made == {shown(person): f"by the {each}" for each, person in people.items()}
    places = [event.id for event in everything]
    assert places == sorted(places, reverse=True)
    (event,) = await events(users, people[role], shown(people[Role.MEMBER]))
    assert event.resource == "by the member"


async def test_a_member_sees_their_own_and_no_more(
    users: Users, people: Mapping[Role, Caller]
) -> None:
    member = people[Role.MEMBER]
    assert [event.resource for event in await events(users, member, "")] == ["by the member"]
    # Whatever the token says of the role.
    for whose in (EVERYBODY, shown(people[Role.OWNER]), shown(member)):
        refusal = await refusal_of(events(users, member, whose, role=Role.OWNER))
        assert refusal.code is grpc.StatusCode.PERMISSION_DENIED


async def test_an_auditor_who_is_disabled_sees_nothing_of_others(
    users: Users, people: Mapping[Role, Caller], owner: asyncpg.Connection
) -> None:
    auditor = people[Role.AUDITOR]
    await owner.execute("UPDATE users SET disabled_at = now() WHERE id = $1", auditor.user_id)
    refusal = await refusal_of(events(users, auditor, EVERYBODY))
    assert refusal.code is grpc.StatusCode.PERMISSION_DENIED


async def test_no_agent_looks_at_others_for_an_auditor(
    users: Users, people: Mapping[Role, Caller]
) -> None:
    auditor = people[Role.AUDITOR]
    acting = Caller(auditor.tenant_id, auditor.user_id, ActingAgent(ids.new_id()))
    refusal = await refusal_of(events(users, acting, EVERYBODY))
    assert refusal.code is grpc.StatusCode.PERMISSION_DENIED


async def test_another_tenants_people_are_not_there(
    users: Users, people: Mapping[Role, Caller], owner: asyncpg.Connection, database: Database
) -> None:
    stranger = Caller(ids.new_id(), ids.new_id())
    await owner.execute(
        "INSERT INTO tenants (id, created_at) VALUES ($1, now())", stranger.tenant_id
    )
    await move_in(owner, stranger, Role.OWNER)
    async with database.transaction(stranger) as connection:
        await audit.record(connection, stranger, "tea.make", "elsewhere")
    refusal = await refusal_of(events(users, people[Role.AUDITOR], shown(stranger)))
    assert refusal.reason == "RESOURCE_NOT_FOUND"
    for event in await events(users, people[Role.AUDITOR], EVERYBODY):
        assert event.resource != "elsewhere"
    refusal = await refusal_of(events(users, people[Role.AUDITOR], "somebody"))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("user_id",))


async def test_who_was_looked_at_is_told_by_whom(
    users: Users, people: Mapping[Role, Caller]
) -> None:
    auditor, member = people[Role.AUDITOR], people[Role.MEMBER]
    await events(users, auditor, shown(member))
    newest = (await events(users, member, ""))[0]
    assert (newest.actor, newest.action) == (shown(auditor), "audit.read")
    await events(users, auditor, EVERYBODY)
    newest = (await events(users, auditor, ""))[0]
    assert newest.action == "audit.read"
    assert newest.resource == ids.show(ids.TENANT, auditor.tenant_id)


async def test_the_events_of_who_was_erased_stay_to_be_seen(
    users: Users, people: Mapping[Role, Caller], owner: asyncpg.Connection
) -> None:
    gone = people[Role.MEMBER]
    await owner.execute("DELETE FROM users WHERE id = $1", gone.user_id)
    assert (await refusal_of(events(users, people[Role.AUDITOR], shown(gone)))).reason == (
        "RESOURCE_NOT_FOUND"
    )
    await owner.execute(
        """
        INSERT INTO erasures (id, tenant_id, user_id, receipt_id)
        VALUES (uuidv7(), $1, $2, uuidv7())
        """,
        gone.tenant_id,
        gone.user_id,
    )
    (event,) = await events(users, people[Role.AUDITOR], shown(gone))
    assert event.resource == "by the member"


def test_auditors_change_nothing() -> None:
    """The methods that take a role: what auditors may is to list members and invitations."""
    opened = {
        method.rpartition("/")[2]
        for method, access in METHODS.items()
        if access in {Access.AUDITOR, Access.ADMIN} and Role.AUDITOR in ROLES[access]
    }
    assert opened == {"ListMembers", "ListInvitations"}
