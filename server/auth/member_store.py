"""Tenants of several people in Postgres, as the system role: nobody sees other users as their own.

Whatever the access token says of a role, what counts is the role that stands in the table when
the change is made. Changes of one tenant take turns.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID, uuid4

import asyncpg

from server import audit, ids, owners
from server.access import Access, Role
from server.auth import api_key_store, mail_store, people, session_store
from server.auth.mail import Kind
from server.auth.members import Invitation, Member, may_change
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.errors import (
    AlreadyExists,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    StateConflict,
)
from server.roles import check_role

Erase = Callable[[Connection, Caller, str, UUID], Awaitable[None]]
"""Begins to erase a user in a transaction, as somebody asks, under an id of a receipt."""

_MOST_OPEN: Final = 100
_MEMBER: Final = """
    users.id, users.display_name, users.role, users.created_at, users.disabled_at,
    users.home_id IS NULL AS is_home,
    (SELECT email FROM users AS home WHERE id = coalesce(users.home_id, users.id)) AS email,
    (SELECT email_verified_at IS NOT NULL
       FROM users AS home
      WHERE id = coalesce(users.home_id, users.id)) AS email_verified
"""
_INVITATION: Final = "id, email, role, user_id, created_at, expires_at"


class MemberStore:
    """Who belongs to a tenant, and who was asked to."""

    def __init__(self, database: SystemDatabase, erase: Erase) -> None:
        self._database = database
        self._erase = erase

    async def list_members(
        self, caller: Caller, *, after: UUID | None, limit: int
    ) -> Sequence[Member]:
        """Return members of the caller's tenant in the order of their ids.

        Raises:
            PermissionDenied: The caller is no auditor, admin or owner.
        """
        async with self._looking(caller, "members.read") as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_MEMBER}
                  FROM users
                 WHERE users.tenant_id = $1 AND ($2::uuid IS NULL OR users.id > $2)
                 ORDER BY users.id
                 LIMIT $3
                """,  # noqa: S608 - a constant of ours
                caller.tenant_id,
                after,
                limit,
            )
        return [_member(row) for row in rows]

    async def assign(self, caller: Caller, user_id: UUID, role: Role) -> Member:
        """Give a member a role.

        Raises:
            NotFound: The tenant has no such member.
            PermissionDenied: The caller may not.
            StateConflict: No owner would be left.
        """
        async with self._changing(caller) as (connection, actor):
            member = await _changeable(connection, caller, actor, user_id, role)
            changed = await _update(connection, caller, user_id, role, member.disabled_at)
            await owners.check_owner_left(connection, caller.tenant_id)
            await _record(connection, caller, user_id, f"member.assign_{role.value}")
        return changed

    async def disable(self, caller: Caller, user_id: UUID, now: datetime) -> Member:
        """Keep a member out of the tenant, and end all that they have open there.

        With whose account is at home in the tenant, the account is out of all others as well.

        Raises:
            NotFound: The tenant has no such member.
            PermissionDenied: The caller may not.
            StateConflict: It is the caller, or the last owner.
        """
        async with self._changing(caller) as (connection, actor):
            member = await _changeable(connection, caller, actor, user_id)
            if user_id == caller.user_id:
                raise StateConflict("nobody disables themselves")
            disabled_at = member.disabled_at or now
            changed = await _update(connection, caller, user_id, member.role, disabled_at)
            await owners.check_owner_left(connection, caller.tenant_id)
            out = await people.standing_with(connection, Caller(caller.tenant_id, user_id))
            await session_store.end_all(connection, out, "disabled", now)
            for each in out:
                await api_key_store.replace_grants(connection, each)
            await _record(connection, caller, user_id, "member.disable")
        return changed

    async def enable(self, caller: Caller, user_id: UUID) -> Member:
        """Let a member log in again.

        Raises:
            NotFound: The tenant has no such member.
            PermissionDenied: The caller may not.
        """
        async with self._changing(caller) as (connection, actor):
            member = await _changeable(connection, caller, actor, user_id)
            changed = await _update(connection, caller, user_id, member.role, None)
            await _record(connection, caller, user_id, "member.enable")
        return changed

    async def remove(self, caller: Caller, user_id: UUID) -> UUID:
        """Take a member out of the tenant, and return the receipt of what they kept there.

        Raises:
            NotFound: The tenant has no such member.
            PermissionDenied: The caller may not.
            StateConflict: It is the caller, the last owner, or at home in the tenant.
        """
        async with self._changing(caller) as (connection, actor):
            member = await _changeable(connection, caller, actor, user_id)
            if user_id == caller.user_id:
                raise StateConflict("nobody removes themselves; leave the tenant instead")
            if member.is_home:
                raise StateConflict("their account is at home in this tenant; disable it instead")
            await _record(connection, caller, user_id, "member.remove")
            target, receipt_id = Caller(caller.tenant_id, user_id), uuid4()
            await self._erase(connection, target, caller.actor, receipt_id)
            await owners.check_owner_left(connection, caller.tenant_id)
        return receipt_id

    async def log_out(
        self, caller: Caller, user_id: UUID, now: datetime, *, with_keys: bool
    ) -> tuple[int, int]:
        """End every session that a member has in the tenant, and the keys there if asked.

        Returns:
            How many of each those were.

        Raises:
            NotFound: The tenant has no such member.
            PermissionDenied: The caller may not.
        """
        async with self._changing(caller) as (connection, actor):
            await _changeable(connection, caller, actor, user_id)
            target = Caller(caller.tenant_id, user_id)
            await _record(connection, caller, user_id, "member.log_out")
            revoked = 0
            if with_keys:
                revoked = await api_key_store.end_all(connection, [target], now, actor=caller.actor)
            ended = await session_store.end_all(connection, [target], "admin", now)
        return ended, revoked

    async def invite(self, caller: Caller, email: str, role: Role, now: datetime) -> Invitation:
        """Ask somebody to join, and have the token mailed.

        Raises:
            AlreadyExists: They were asked already, or belong to the tenant.
            PermissionDenied: The caller may not.
            QuotaExceeded: Too many invitations are open.
        """
        lifetime = mail_store.lifetime_of(Kind.INVITATION)
        async with self._changing(caller) as (connection, actor):
            if not may_change(actor, Role.MEMBER, role):
                raise PermissionDenied
            await _forget_expired(connection, caller, now)
            await _check_may_ask(connection, caller, email)
            invitation = Invitation(ids.new_id(), email, role, caller.user_id, now, now + lifetime)
            await _insert_invitation(connection, caller, invitation)
            await mail_store.ask_for(
                connection, email, Kind.INVITATION, now, about=str(invitation.id)
            )
            shown = ids.show(ids.INVITATION, invitation.id)
            await audit.record(connection, caller, "invitation.create", shown)
        return invitation

    async def list_invitations(self, caller: Caller, now: datetime) -> Sequence[Invitation]:
        """Return the open invitations of the caller's tenant, the newest first.

        Raises:
            PermissionDenied: The caller is no auditor, admin or owner.
        """
        async with self._looking(caller, "invitations.read") as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_INVITATION}
                  FROM invitations
                 WHERE tenant_id = $1 AND expires_at > $2
                   AND accepted_at IS NULL AND revoked_at IS NULL
                 ORDER BY id DESC
                """,  # noqa: S608 - a constant of ours
                caller.tenant_id,
                now,
            )
        return [_invitation(row) for row in rows]

    async def revoke_invitation(self, caller: Caller, invitation_id: UUID, now: datetime) -> None:
        """Take an invitation back.

        Raises:
            NotFound: The tenant has no such open invitation.
            PermissionDenied: The caller may not.
        """
        async with self._changing(caller) as (connection, _):
            revoked = await connection.fetchval(
                """
                UPDATE invitations
                   SET revoked_at = $3
                 WHERE tenant_id = $1 AND id = $2 AND accepted_at IS NULL AND revoked_at IS NULL
                RETURNING id
                """,
                caller.tenant_id,
                invitation_id,
                now,
            )
            if revoked is None:
                raise NotFound("invitation")
            shown = ids.show(ids.INVITATION, invitation_id)
            await audit.record(connection, caller, "invitation.revoke", shown)

    async def forget(self, now: datetime) -> None:
        """Delete invitations that were closed or have expired."""
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                DELETE FROM invitations
                 WHERE accepted_at < $1 OR revoked_at < $1 OR expires_at < $1
                """,
                now - timedelta(days=30),
            )

    @asynccontextmanager
    async def _looking(self, caller: Caller, action: str) -> AsyncIterator[Connection]:
        """Open a transaction for who may look at the tenant, and tell their log that they did."""
        async with self._database.transaction() as connection:
            await check_role(connection, caller, Access.AUDITOR)
            yield connection
            tenant = ids.show(ids.TENANT, caller.tenant_id)
            await audit.record(connection, caller, action, tenant)

    @asynccontextmanager
    async def _changing(self, caller: Caller) -> AsyncIterator[tuple[Connection, Role]]:
        async with self._database.transaction() as connection:
            await owners.take_turns(connection, [caller.tenant_id])
            yield connection, await check_role(connection, caller, Access.ADMIN)


async def _changeable(
    connection: Connection, caller: Caller, actor: Role, user_id: UUID, *becomes: Role
) -> Member:
    """Return a member of the tenant whom somebody with the actor's role may change."""
    row = await connection.fetchrow(
        f"SELECT {_MEMBER} FROM users WHERE users.tenant_id = $1 AND users.id = $2",  # noqa: S608 - a constant of ours
        caller.tenant_id,
        user_id,
    )
    if row is None:
        raise NotFound("member")
    member = _member(row)
    if not may_change(actor, member.role, *becomes):
        raise PermissionDenied
    return member


async def _update(
    connection: Connection,
    caller: Caller,
    user_id: UUID,
    role: Role,
    disabled_at: datetime | None,
) -> Member:
    row = await connection.fetchrow(
        f"""
        UPDATE users
           SET role = $3, disabled_at = $4
         WHERE users.tenant_id = $1 AND users.id = $2
        RETURNING {_MEMBER}
        """,  # noqa: S608 - a constant of ours
        caller.tenant_id,
        user_id,
        role.value,
        disabled_at,
    )
    return _member(row)


async def _forget_expired(connection: Connection, caller: Caller, now: datetime) -> None:
    """Close invitations that have expired: they are in the way of new ones."""
    await connection.execute(
        """
        UPDATE invitations
           SET revoked_at = $2
         WHERE tenant_id = $1 AND expires_at <= $2
           AND accepted_at IS NULL AND revoked_at IS NULL
        """,
        caller.tenant_id,
        now,
    )


async def _check_may_ask(connection: Connection, caller: Caller, email: str) -> None:
    row = await connection.fetchrow(
        """
        SELECT count(*) AS open, coalesce(bool_or(email = $2), false) AS asked,
               EXISTS (SELECT FROM users
                         JOIN users AS home ON home.id = coalesce(users.home_id, users.id)
                        WHERE users.tenant_id = $1 AND home.email = $2) AS belongs
          FROM invitations
         WHERE tenant_id = $1 AND accepted_at IS NULL AND revoked_at IS NULL
        """,
        caller.tenant_id,
        email,
    )
    if row["asked"] or row["belongs"]:
        raise AlreadyExists("they were invited already, or belong to the tenant")
    if row["open"] >= _MOST_OPEN:
        raise QuotaExceeded(
            "open invitations", row["open"], _MOST_OPEN, "revoke one of them", "invitations"
        )


async def _insert_invitation(
    connection: Connection, caller: Caller, invitation: Invitation
) -> None:
    await connection.execute(
        """
        INSERT INTO invitations (tenant_id, user_id, id, email, role, created_at, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        caller.tenant_id,
        caller.user_id,
        invitation.id,
        invitation.email,
        invitation.role.value,
        invitation.created_at,
        invitation.expires_at,
    )


async def _record(connection: Connection, caller: Caller, user_id: UUID, action: str) -> None:
    """Note what was done to a member, in the member's own log, by whom."""
    await audit.record_all(
        connection,
        Caller(caller.tenant_id, user_id),
        action,
        [ids.show(ids.USER, user_id)],
        actor=ids.show(ids.USER, caller.user_id),
    )


def _member(row: asyncpg.Record) -> Member:
    return Member(
        user_id=row["id"],
        email=row["email"],
        display_name=row["display_name"],
        role=Role(row["role"]),
        joined_at=row["created_at"],
        email_verified=row["email_verified"],
        disabled_at=row["disabled_at"],
        is_home=row["is_home"],
    )


def _invitation(row: asyncpg.Record) -> Invitation:
    return Invitation(
        id=row["id"],
        email=row["email"],
        role=Role(row["role"]),
        inviter_id=row["user_id"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
    )
