"""What users see and change of themselves, and what they consent to."""

import asyncio
from dataclasses import replace

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.users.v1 import users_pb2 as pb

from server import audit, ids
from server.caller import ActingAgent, Caller
from server.database import Database
from tests.conftest import bearer, new_caller
from tests.refusals import refusal_of
from tests.users.conftest import Users


async def named(owner: asyncpg.Connection, caller: Caller, email: str) -> Caller:
    """Give a caller an account, past the auth service."""
    await owner.execute(
        "INSERT INTO tenants (id, created_at) VALUES ($1, '2026-01-02T03:04:05Z')",
        caller.tenant_id,
    )
    await owner.execute(
        """
        INSERT INTO users (tenant_id, id, email, display_name, created_at)
        VALUES ($1, $2, $3, 'Ada', '2026-01-02T03:04:05Z')
        """,
        caller.tenant_id,
        caller.user_id,
        email,
    )
    return caller


def decide(*, granted: bool) -> pb.RecordConsentRequest:
    return pb.RecordConsentRequest(purpose=pb.CONSENT_PURPOSE_MEMORY_STORE, granted=granted)


async def test_users_see_themselves(
    users: Users, owner: asyncpg.Connection, database: Database
) -> None:
    ada = await named(owner, await new_caller(database), "ada@example.com")
    await named(owner, await new_caller(database), "bob@example.com")
    user = (await users.GetUser(pb.GetUserRequest(), metadata=bearer(ada))).user
    assert user.id == ids.show(ids.USER, ada.user_id)
    assert user.tenant_id == ids.show(ids.TENANT, ada.tenant_id)
    assert (user.email, user.display_name) == ("ada@example.com", "Ada")
    assert user.create_time.ToJsonString() == "2026-01-02T03:04:05Z"


async def test_users_are_called_the_same_in_all_tenants_of_their_account(
    users: Users, owner: asyncpg.Connection, database: Database
) -> None:
    ada = await named(owner, await new_caller(database), "ada@example.com")
    bob = await named(owner, await new_caller(database), "bob@example.com")
    away = Caller(bob.tenant_id, ids.new_id())
    await owner.execute(
        """
        INSERT INTO users (tenant_id, id, display_name, created_at, role, home_id)
        VALUES ($1, $2, 'Ada', now(), 'member', $3)
        """,
        away.tenant_id,
        away.user_id,
        ada.user_id,
    )
    user = (await users.GetUser(pb.GetUserRequest(), metadata=bearer(away))).user
    assert (user.id, user.email) == (ids.show(ids.USER, away.user_id), "ada@example.com")
    assert user.tenant_id == ids.show(ids.TENANT, bob.tenant_id)
    # Of what they decided at home nothing counts elsewhere.
    listed = await users.ListConsents(pb.ListConsentsRequest(), metadata=bearer(away))
    assert not listed.consents


async def test_a_token_that_outlives_its_account_finds_no_user(
    users: Users, caller: Caller
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await users.GetUser(pb.GetUserRequest(), metadata=bearer(caller))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def renamed(name: str, *paths: str, etag: str = "") -> pb.UpdateUserRequest:
    user = pb.User(display_name=name, email="eve@example.com", etag=etag)
    return pb.UpdateUserRequest(user=user, update_mask=FieldMask(paths=paths or ("display_name",)))


async def test_users_choose_what_they_are_called_and_nothing_else_of_themselves(
    users: Users, owner: asyncpg.Connection, database: Database
) -> None:
    ada = await named(owner, await new_caller(database), "ada@example.com")
    await named(owner, await new_caller(database), "bob@example.com")
    before = (await users.GetUser(pb.GetUserRequest(), metadata=bearer(ada))).user
    changed = (await users.UpdateUser(renamed(" Countess "), metadata=bearer(ada))).user
    assert (changed.display_name, changed.email) == ("Countess", "ada@example.com")
    assert changed.etag != before.etag
    assert (await users.GetUser(pb.GetUserRequest(), metadata=bearer(ada))).user == changed
    rows = await owner.fetch("SELECT action, actor, resource FROM audit_events")
    shown = ids.show(ids.USER, ada.user_id)
    assert [tuple(row) for row in rows] == [("user.update", shown, shown)]
    assert await owner.fetchval("SELECT count(*) FROM users WHERE display_name = 'Ada'") == 1


async def test_of_two_who_read_the_same_profile_one_changes_it(
    users: Users, owner: asyncpg.Connection, database: Database
) -> None:
    ada = await named(owner, await new_caller(database), "ada@example.com")
    etag = (await users.GetUser(pb.GetUserRequest(), metadata=bearer(ada))).user.etag
    calls = (
        users.UpdateUser(renamed(f"Ada {number}", etag=etag), metadata=bearer(ada))
        for number in range(5)
    )
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, pb.UpdateUserResponse) for answer in answers) == 1
    refusal = await refusal_of(
        users.UpdateUser(renamed("Ada", etag="rubbish"), metadata=bearer(ada))
    )
    assert refusal.reason == "ETAG_MISMATCH"
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (renamed("Ada", "email"), "update_mask"),
        (renamed("Ada", "display_name", "email"), "update_mask"),
        (pb.UpdateUserRequest(user=pb.User(display_name="Ada")), "update_mask"),
        (renamed("  "), "user.display_name"),
        (renamed("A" * 101), "user.display_name"),
        (renamed("A\nda"), "user.display_name"),
    ],
)
async def test_a_profile_that_cannot_be_names_the_field(
    users: Users,
    owner: asyncpg.Connection,
    database: Database,
    request_: pb.UpdateUserRequest,
    field: str,
) -> None:
    ada = await named(owner, await new_caller(database), "ada@example.com")
    assert (await refusal_of(users.UpdateUser(request_, metadata=bearer(ada)))).fields == (field,)
    assert await owner.fetchval("SELECT display_name FROM users") == "Ada"


async def test_who_has_no_account_any_more_has_no_profile(users: Users, caller: Caller) -> None:
    refusal = await refusal_of(users.UpdateUser(renamed("Ada"), metadata=bearer(caller)))
    assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_an_agent_is_told_of_by_its_name_and_nobody_elses(
    users: Users, owner: asyncpg.Connection, database: Database, caller: Caller
) -> None:
    agent, other = ids.new_id(), await new_caller(database)
    for number, whose in enumerate((caller, other)):
        await owner.execute(
            """
            INSERT INTO agents (tenant_id, user_id, id, name, kind, scopes, created_at)
            VALUES ($1, $2, $3, $4, 'external', '{memory.read}', now())
            """,
            whose.tenant_id,
            whose.user_id,
            agent if whose is caller else ids.new_id(),
            f"helper {number}",
        )
    async with database.transaction(caller) as connection:
        acting = replace(caller, agent=ActingAgent(agent))
        await audit.record(connection, acting, "memory.read", "mem_1")
        await audit.record(connection, caller, "memory.create", "mem_1")
    listed = await users.ListAuditEvents(pb.ListAuditEventsRequest(), metadata=bearer(caller))
    assert [(event.action, event.agent_name) for event in listed.events] == [
        ("memory.create", ""),
        ("memory.read", "helper 0"),
    ]


async def test_nobody_is_served_without_a_token(users: Users) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await users.GetUser(pb.GetUserRequest())
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_the_last_decision_on_a_purpose_stands(users: Users, database: Database) -> None:
    mine = bearer(await new_caller(database, consenting=False))
    assert not (await users.ListConsents(pb.ListConsentsRequest(), metadata=mine)).consents
    for version, granted in enumerate((True, True, False), start=1):
        response = await users.RecordConsent(decide(granted=granted), metadata=mine)
        assert (response.consent.version, response.consent.granted) == (version, granted)
        listed = await users.ListConsents(pb.ListConsentsRequest(), metadata=mine)
        assert list(listed.consents) == [response.consent]


async def test_every_decision_stays_to_be_read(users: Users, database: Database) -> None:
    mine = bearer(await new_caller(database, consenting=False))
    made = [
        (await users.RecordConsent(decide(granted=granted), metadata=mine)).consent
        for granted in (True, False, True)
    ]
    request = pb.ListConsentsRequest(include_history=True)
    listed = await users.ListConsents(request, metadata=mine)
    assert list(listed.consents) == made[::-1]
    stranger = bearer(await new_caller(database, consenting=False))
    assert not (await users.ListConsents(request, metadata=stranger)).consents


async def test_consents_are_everyone_s_own(users: Users, database: Database) -> None:
    await users.RecordConsent(decide(granted=True), metadata=bearer(await new_caller(database)))
    other = await new_caller(database, consenting=False)
    response = await users.ListConsents(pb.ListConsentsRequest(), metadata=bearer(other))
    assert not response.consents


async def test_concurrent_decisions_get_one_version_each_and_are_all_audited(
    users: Users, database: Database, owner: asyncpg.Connection
) -> None:
    caller = await new_caller(database, consenting=False)
    answers = await asyncio.gather(
        *(
            users.RecordConsent(decide(granted=bool(number % 2)), metadata=bearer(caller))
            for number in range(20)
        )
    )
    assert sorted(answer.consent.version for answer in answers) == list(range(1, 21))
    actions = await owner.fetch("SELECT action, count(*) FROM audit_events GROUP BY action")
    assert dict(actions) == {"consent.grant": 10, "consent.withdraw": 10}


@pytest.mark.parametrize("purpose", pb.ConsentPurpose.values()[1:])
async def test_every_named_purpose_can_be_decided_on(
    users: Users, database: Database, purpose: "pb.ConsentPurpose.ValueType"
) -> None:
    mine = bearer(await new_caller(database, consenting=False))
    request = pb.RecordConsentRequest(purpose=purpose, granted=True)
    await users.RecordConsent(request, metadata=mine)
    listed = await users.ListConsents(pb.ListConsentsRequest(), metadata=mine)
    assert [(one.purpose, one.granted) for one in listed.consents] == [(purpose, True)]


@pytest.mark.parametrize("purpose", [0, 99])
async def test_an_unknown_purpose_is_refused(users: Users, caller: Caller, purpose: int) -> None:
    request = pb.RecordConsentRequest(granted=True)
    request.purpose = purpose  # type: ignore[assignment]
    with pytest.raises(grpc.aio.AioRpcError, match="purpose: must be one of"):
        await users.RecordConsent(request, metadata=bearer(caller))
