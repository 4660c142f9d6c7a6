"""Accounts in Postgres, as the system role: no caller is known yet."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, ids
from server.access import Role
from server.auth import api_key_store, mail_store, people, session_store
from server.auth.mail import Kind
from server.auth.refresh_tokens import Session, hash_of
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.errors import AlreadyExists, CredentialsInvalid, MailedTokenInvalid, NotFound


@dataclass(frozen=True, slots=True)
class Account:
    """What it takes to log in."""

    caller: Caller
    """The user that the account is at home."""
    email: str
    password_hash: str
    password_changes: int
    """How often another password was set."""
    role: str
    is_disabled: bool


@dataclass(frozen=True, slots=True)
class NewUser:
    """Who signs up."""

    caller: Caller
    email: str
    display_name: str
    password_hash: str
    role: str = Role.OWNER
    invitation: str = ""
    """The token by which they join somebody's tenant; empty: they get one of their own."""


class AccountStore:
    """Accounts: how people log in."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def sign_up(
        self, user: NewUser, session: Session, token_hash: bytes, now: datetime
    ) -> None:
        """Make tenant, user, account and first session, and ask for a mail, or do nothing.

        Raises:
            AlreadyExists: The email names an account.
            MailedTokenInvalid: The invitation is open no more.
        """
        async with self._database.transaction() as connection:
            if not user.invitation:
                await _insert_tenant(connection, user.caller, now)
            await _insert_user(connection, user, now)
            await _insert_account(connection, user)
            await session_store.start(connection, session, token_hash, now)
            if user.invitation:
                await _accept(connection, user, now)
            else:
                await mail_store.ask_for(connection, user.email, Kind.EMAIL_VERIFICATION, now)

    async def invited(self, token: str, email: str, now: datetime) -> tuple[UUID, str]:
        """Return the tenant and the role that an invitation to this email offers.

        Raises:
            MailedTokenInvalid: There is no such invitation that is open.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                SELECT tenant_id, role
                  FROM invitations
                 WHERE token_hash = $1 AND email = $2 AND expires_at > $3
                   AND accepted_at IS NULL AND revoked_at IS NULL
                """,
                hash_of(token),
                email,
                now,
            )
        if row is None:
            raise MailedTokenInvalid
        return UUID(int=row["tenant_id"].int), row["role"]

    async def find(self, email: str) -> Account | None:
        """Return the account that an email names, if any."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(f"{_ACCOUNT} WHERE users.email = $1", email)
        return _account(row) if row else None

    async def get(self, caller: Caller) -> Account:
        """Return the account of a user, in whichever of its tenants.

        Raises:
            NotFound: The user is gone.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                f"""
                {_ACCOUNT}
                 WHERE users.id = (SELECT coalesce(home_id, id)
                                     FROM users
                                    WHERE tenant_id = $1 AND id = $2)
                """,  # noqa: S608 - a constant of ours
                caller.tenant_id,
                caller.user_id,
            )
        if row is None:
            raise NotFound("user")
        return _account(row)

    async def change_password(
        self, account: Account, renewed: str, now: datetime, *, kept: UUID, with_keys: bool
    ) -> tuple[int, int]:
        """Store another password and end every session but one, and the keys if asked.

        Returns:
            How many sessions ended, and how many keys.

        Raises:
            CredentialsInvalid: The password changed meanwhile.
        """
        async with self._database.transaction() as connection:
            changed = await connection.fetchval(
                """
                UPDATE accounts
                   SET password_hash = $4, password_changes = password_changes + 1
                 WHERE tenant_id = $1 AND user_id = $2 AND password_hash = $3
                RETURNING user_id
                """,
                account.caller.tenant_id,
                account.caller.user_id,
                account.password_hash,
                renewed,
            )
            if changed is None:
                raise CredentialsInvalid
            await _record(connection, account.caller, "password.change")
            everywhere, revoked = await people.everywhere(connection, account.caller), 0
            if with_keys:
                revoked = await api_key_store.end_all(connection, everywhere, now)
            ended = await session_store.end_all(connection, everywhere, "password", now, kept=kept)
        return ended, revoked

    async def reset_password(
        self, token: str, renewed: str, now: datetime, *, with_keys: bool
    ) -> tuple[str, int]:
        """Store another password by a mailed token, end every session, and the keys if asked.

        Whoever has the token reads the user's mail: the email is verified, too.

        Returns:
            The email, and how many keys ended.

        Raises:
            MailedTokenInvalid: There is no such token any more.
        """
        async with self._database.transaction() as connection:
            used = await mail_store.use_token(connection, token, Kind.PASSWORD_RESET, now)
            if used is None:
                raise MailedTokenInvalid
            caller, email = used
            await connection.execute(
                """
                UPDATE accounts
                   SET password_hash = $3, password_changes = password_changes + 1
                 WHERE tenant_id = $1 AND user_id = $2
                """,
                caller.tenant_id,
                caller.user_id,
                renewed,
            )
            await _record(connection, caller, "password.reset")
            await mark_verified(connection, caller, now)
            everywhere = await people.everywhere(connection, caller)
            revoked = await api_key_store.end_all(connection, everywhere, now) if with_keys else 0
            await session_store.end_all(connection, everywhere, "password", now)
        return email, revoked

    async def verify_email(self, token: str, now: datetime) -> None:
        """Mark the email of a user as verified by a mailed token, or make them an account by it.

        Raises:
            AlreadyExists: The email has come to name an account since it was signed up for.
            MailedTokenInvalid: There is no such token any more.
        """
        async with self._database.transaction() as connection:
            used = await mail_store.use_token(connection, token, Kind.EMAIL_VERIFICATION, now)
            caller = used[0] if used else await _confirm(connection, token, now)
            await mark_verified(connection, caller, now)

    async def one_hash_of_each_cost(self) -> list[str]:
        """Return a hash for each choice of parameters that hashes of accounts have."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                r"""
                SELECT min(password_hash) AS hash
                  FROM accounts
                 WHERE password_hash ~ '^\$argon2id\$v=\d+\$m=\d+,t=\d+,p=\d+\$'
                 GROUP BY split_part(password_hash, '$', 3), split_part(password_hash, '$', 4)
                """
            )
        return [row["hash"] for row in rows]

    async def replace_hash(self, user_id: UUID, outdated: str, renewed: str) -> None:
        """Store the password under another hash, unless the password changed meanwhile."""
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                UPDATE accounts
                   SET password_hash = $3
                 WHERE user_id = $1 AND password_hash = $2
                """,
                user_id,
                outdated,
                renewed,
            )


_ACCOUNT: Final = """
    SELECT users.tenant_id, users.id AS user_id, users.email, users.role,
           users.disabled_at IS NOT NULL AS is_disabled, accounts.password_hash,
           accounts.password_changes
      FROM users
      JOIN accounts ON accounts.user_id = users.id
"""


def _account(row: asyncpg.Record) -> Account:
    caller = Caller(row["tenant_id"], row["user_id"])
    return Account(
        caller,
        row["email"],
        row["password_hash"],
        row["password_changes"],
        row["role"],
        is_disabled=row["is_disabled"],
    )


async def _record(connection: Connection, caller: Caller, action: str) -> None:
    await audit.record(connection, caller, action, ids.show(ids.USER, caller.user_id))


async def mark_verified(connection: Connection, caller: Caller, now: datetime) -> None:
    """Note that somebody showed that the email of their account reaches them."""
    verified = await connection.fetchval(
        """
        UPDATE users
           SET email_verified_at = $3
         WHERE tenant_id = $1 AND id = $2 AND email_verified_at IS NULL
        RETURNING id
        """,
        caller.tenant_id,
        caller.user_id,
        now,
    )
    if verified:
        await _record(connection, caller, "email.verify")


async def _confirm(connection: Connection, token: str, now: datetime) -> Caller:
    """Make the account of a sign-up whose token came back; others of the email make none."""
    row = await connection.fetchrow(
        """
        DELETE FROM sign_ups
         WHERE token_hash = $1 AND expires_at > $2
        RETURNING email, display_name, password_hash
        """,
        hash_of(token),
        now,
    )
    if row is None:
        raise MailedTokenInvalid
    user = NewUser(Caller(ids.new_id(), ids.new_id()), **row)
    await _insert_tenant(connection, user.caller, now)
    await _insert_user(connection, user, now)
    await _insert_account(connection, user)
    await connection.execute("DELETE FROM sign_ups WHERE email = $1", user.email)
    return user.caller


async def _insert_tenant(connection: Connection, caller: Caller, now: datetime) -> None:
    await connection.execute(
        "INSERT INTO tenants (id, created_at) VALUES ($1, $2)", caller.tenant_id, now
    )


async def _accept(connection: Connection, user: NewUser, now: datetime) -> None:
    """Close the invitation by which a user joins; whoever had its token reads their mail."""
    accepted = await connection.fetchval(
        """
        UPDATE invitations
           SET accepted_at = $5
         WHERE tenant_id = $1 AND token_hash = $2 AND email = $3 AND role = $4
           AND expires_at > $5 AND accepted_at IS NULL AND revoked_at IS NULL
        RETURNING id
        """,
        user.caller.tenant_id,
        hash_of(user.invitation),
        user.email,
        user.role,
        now,
    )
    if accepted is None:
        raise MailedTokenInvalid
    await audit.record(
        connection, user.caller, "invitation.accept", ids.show(ids.INVITATION, accepted)
    )
    await mark_verified(connection, user.caller, now)


async def _insert_user(connection: Connection, user: NewUser, now: datetime) -> None:
    inserted = await connection.fetchval(
        """
        INSERT INTO users (tenant_id, id, email, display_name, created_at, role)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (email) DO NOTHING
        RETURNING id
        """,
        user.caller.tenant_id,
        user.caller.user_id,
        user.email,
        user.display_name,
        now,
        user.role,
    )
    if inserted is None:
        raise AlreadyExists("there is an account with this email; log in instead")


async def _insert_account(connection: Connection, user: NewUser) -> None:
    await connection.execute(
        "INSERT INTO accounts (tenant_id, user_id, password_hash) VALUES ($1, $2, $3)",
        user.caller.tenant_id,
        user.caller.user_id,
        user.password_hash,
    )
    await _record(connection, user.caller, "user.create")
