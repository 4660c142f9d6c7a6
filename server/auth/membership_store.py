"""The tenants of one account in Postgres, as the system role: to each other they are strangers."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID, uuid4

import asyncpg

from server import audit, ids, owners, requests
from server.access import Role
from server.auth import people, session_store
from server.auth.member_store import Erase
from server.auth.members import Membership
from server.auth.refresh_tokens import Session, hash_of
from server.auth.store import mark_verified
from server.caller import Caller, Credentials
from server.database import Connection, SystemDatabase
from server.errors import (
    AccountErased,
    MailedTokenInvalid,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    StateConflict,
    Unauthenticated,
)

MOST_MEMBERSHIPS: Final = 100
"""How many tenants an account may join beside the one that it is at home in."""


class _Home(NamedTuple):
    caller: Caller
    email: str
    display_name: str


class _Invitation(NamedTuple):
    id: UUID
    tenant_id: UUID
    role: str
    is_used: bool


class MembershipStore:
    """Which tenants an account belongs to. Every method may be called from each of them."""

    def __init__(self, database: SystemDatabase, erase: Erase) -> None:
        self._database = database
        self._erase = erase

    async def list_all(self, caller: Caller) -> Sequence[Membership]:
        """Return what the caller's account is in each of its tenants, the home first."""
        async with self._database.transaction() as connection:
            return await _memberships(connection, caller)

    async def accept(self, caller: Caller, token: str, now: datetime) -> Membership:
        """Have the caller's account join the tenant of an invitation to its email.

        Whoever has the token reads the mails of the account: its email is verified, too.

        Returns:
            What the account is in the tenant; if it belonged to that already, what it was before.

        Raises:
            AccountErased: The account is to be erased.
            MailedTokenInvalid: There is no such invitation to this account, or it is open no more.
            NotFound: The caller is gone.
            PermissionDenied: The account is disabled.
            QuotaExceeded: It belongs to as many tenants as one may.
        """
        async with self._database.transaction() as connection:
            home = await _home(connection, caller)
            # Those who accept the same invitation take turns here.
            invitation = await _close(connection, token, home, now)
            for membership in await _memberships(connection, caller):
                if membership.caller.tenant_id == invitation.tenant_id:
                    return membership
            if invitation.is_used:
                raise MailedTokenInvalid
            await _lock(connection, home)
            await _check_room(connection, home)
            return await _join(connection, home, invitation, now)

    async def switch(
        self,
        credentials: Credentials,
        tenant_id: UUID,
        token_hash: bytes,
        client_name: str,
        now: datetime,
    ) -> Session:
        """Start a session in one of the account's tenants, which ends with the one that asks.

        Raises:
            AccountErased: What the account is there is to be erased.
            NotFound: The account does not belong to the tenant.
            PermissionDenied: It is disabled there.
            Unauthenticated: The session that asks has ended.
        """
        caller, origin_id = credentials.caller, credentials.grant_id
        async with self._database.transaction() as connection:
            membership = await _get(connection, caller, tenant_id)
            # In the order of an erasure and of a disabling, which come to sessions last: none of
            # them must wait for another that waits for it.
            await _refuse_erased(connection, membership.caller)
            if not await session_store.lock_enabled(connection, membership.caller):
                raise PermissionDenied
            expires_at = await session_store.lock_living(connection, caller, origin_id, now)
            if expires_at is None:
                raise Unauthenticated("the session has ended; log in again")
            session = Session(
                ids.new_id(), membership.caller, expires_at, client_name, membership.role
            )
            await session_store.begin(connection, session, token_hash, now, switched_from=origin_id)
        return session

    async def left(self, caller: Caller, tenant_id: UUID) -> UUID | None:
        """Return the receipt of what the caller kept in a tenant, if it is to be erased already.

        Raises:
            AccountErased: It is, but in another tenant.
        """
        async with self._database.transaction() as connection:
            receipt_id: UUID | None = await connection.fetchval(
                "SELECT receipt_id FROM erasures WHERE tenant_id = $1 AND user_id = $2",
                caller.tenant_id,
                caller.user_id,
            )
        if receipt_id and caller.tenant_id != tenant_id:
            raise AccountErased
        return receipt_id

    async def leave(self, caller: Caller, tenant_id: UUID, request_id: str) -> UUID:
        """Have the caller's account leave a tenant, and return the receipt of what it kept there.

        Under a request id that it left by before, the receipt is that of then.

        Raises:
            NotFound: The account does not belong to the tenant.
            PermissionDenied: It is disabled there.
            RequestIdReused: By this request id it left another tenant.
            StateConflict: It is at home there, or its last owner.
        """
        receipt_id = uuid4()
        async with self._database.transaction() as connection:
            await owners.take_turns(connection, [tenant_id])
            if request_id:
                # At home: what an account was in a tenant is gone once it has left.
                home = (await _home(connection, caller)).caller
                claimed = await requests.claim(
                    connection, home, "LeaveTenant", request_id, tenant_id.bytes, receipt_id
                )
                if claimed != receipt_id:
                    return claimed
            membership = await _get(connection, caller, tenant_id)
            leaver = membership.caller
            if membership.is_home:
                raise StateConflict(
                    "the account is at home in this tenant; to end it, POST /v1/user/erasures"
                )
            if membership.disabled_at:
                raise PermissionDenied
            shown = ids.show(ids.USER, leaver.user_id)
            await audit.record(connection, leaver, "member.leave", shown)
            await self._erase(connection, leaver, leaver.actor, receipt_id)
            await owners.check_owner_left(connection, tenant_id)
        return receipt_id


async def _memberships(connection: Connection, caller: Caller) -> Sequence[Membership]:
    everywhere = await people.everywhere(connection, caller)
    rows = await connection.fetch(
        """
        SELECT tenant_id, id, role, created_at, disabled_at, home_id IS NULL AS is_home
          FROM users
         WHERE id = ANY ($1)
         ORDER BY home_id IS NOT NULL, id
        """,
        [each.user_id for each in everywhere],
    )
    return [_membership(row) for row in rows]


async def _get(connection: Connection, caller: Caller, tenant_id: UUID) -> Membership:
    for membership in await _memberships(connection, caller):
        if membership.caller.tenant_id == tenant_id:
            return membership
    raise NotFound("tenant")


async def _home(connection: Connection, caller: Caller) -> _Home:
    row = await connection.fetchrow(
        """
        SELECT home.tenant_id, home.id, home.email, home.display_name
          FROM users
          JOIN users AS home ON home.id = coalesce(users.home_id, users.id)
         WHERE users.tenant_id = $1 AND users.id = $2
        """,
        caller.tenant_id,
        caller.user_id,
    )
    if row is None:
        raise NotFound("user")
    return _Home(Caller(row["tenant_id"], row["id"]), row["email"], row["display_name"])


async def _close(connection: Connection, token: str, home: _Home, now: datetime) -> _Invitation:
    """Note that an invitation is accepted, unless that was noted before."""
    row = await connection.fetchrow(
        """
        UPDATE invitations
           SET accepted_at = coalesce(accepted_at, $3)
         WHERE token_hash = $1 AND email = $2 AND revoked_at IS NULL
           AND (accepted_at IS NOT NULL OR expires_at > $3)
        RETURNING id, tenant_id, role, old.accepted_at IS NOT NULL AS is_used
        """,
        hash_of(token),
        home.email,
        now,
    )
    if row is None:
        raise MailedTokenInvalid
    return _Invitation(**row)


async def _lock(connection: Connection, home: _Home) -> None:
    """Let an account join one tenant after the other, and neither be disabled nor erased meanwhile.

    Raises:
        AccountErased: It is to be erased.
        PermissionDenied: It is disabled.
    """
    await _refuse_erased(connection, home.caller)
    disabled_at = await connection.fetchval(
        "SELECT disabled_at FROM users WHERE tenant_id = $1 AND id = $2 FOR NO KEY UPDATE",
        home.caller.tenant_id,
        home.caller.user_id,
    )
    if disabled_at:
        raise PermissionDenied


async def _refuse_erased(connection: Connection, caller: Caller) -> None:
    await connection.execute("SELECT refuse_erased($1, $2)", caller.tenant_id, caller.user_id)


async def _check_room(connection: Connection, home: _Home) -> None:
    used = await connection.fetchval(
        "SELECT count(*) FROM users WHERE home_id = $1", home.caller.user_id
    )
    if used >= MOST_MEMBERSHIPS:
        raise QuotaExceeded("tenants", used, MOST_MEMBERSHIPS, "leave one of them", "tenants")


async def _join(
    connection: Connection, home: _Home, invitation: _Invitation, now: datetime
) -> Membership:
    row = await connection.fetchrow(
        """
        INSERT INTO users (tenant_id, id, display_name, created_at, role, home_id)
        VALUES ($1, $2, $3, $4, $5, $6)
        RETURNING tenant_id, id, role, created_at, disabled_at, home_id IS NULL AS is_home
        """,
        invitation.tenant_id,
        ids.new_id(),
        home.display_name,
        now,
        invitation.role,
        home.caller.user_id,
    )
    membership = _membership(row)
    shown = ids.show(ids.INVITATION, invitation.id)
    await audit.record(connection, membership.caller, "invitation.accept", shown)
    await mark_verified(connection, home.caller, now)
    return membership


def _membership(row: asyncpg.Record) -> Membership:
    return Membership(
        caller=Caller(row["tenant_id"], row["id"]),
        role=Role(row["role"]),
        joined_at=row["created_at"],
        is_home=row["is_home"],
        disabled_at=row["disabled_at"],
    )
