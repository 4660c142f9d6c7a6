"""Accounts and sessions in Postgres, as the system role: no caller is known yet."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, assert_never
from uuid import UUID

from server import audit, ids
from server.auth.refresh_tokens import Presented, Session, Verdict, judge
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.errors import AlreadyExists

_SESSIONS_KEPT: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Account:
    """What it takes to log in."""

    caller: Caller
    password_hash: str


@dataclass(frozen=True, slots=True)
class NewUser:
    """Who signs up."""

    caller: Caller
    email: str
    display_name: str
    password_hash: str


class AccountStore:
    """Accounts and their sessions."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def sign_up(
        self, user: NewUser, session: Session, token_hash: bytes, now: datetime
    ) -> None:
        """Make tenant, user, account and first session, or nothing.

        Raises:
            AlreadyExists: The email names an account.
        """
        async with self._database.transaction() as connection:
            await connection.execute(
                "INSERT INTO tenants (id, created_at) VALUES ($1, $2)", user.caller.tenant_id, now
            )
            await _insert_user(connection, user, now)
            await _insert_account(connection, user)
            await audit.record(
                connection, user.caller, "user.create", ids.show(ids.USER, user.caller.user_id)
            )
            await _start(connection, session, token_hash, now)

    async def find(self, email: str) -> Account | None:
        """Return the account that an email names, if any."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                SELECT users.tenant_id, users.id AS user_id, accounts.password_hash
                  FROM users
                  JOIN accounts ON accounts.user_id = users.id
                 WHERE users.email = $1
                """,
                email,
            )
        if row is None:
            return None
        return Account(Caller(row["tenant_id"], row["user_id"]), row["password_hash"])

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

    async def start_session(self, session: Session, token_hash: bytes, now: datetime) -> None:
        """Start a session with its first refresh token, and forget the user's expired ones."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM sessions WHERE user_id = $1 AND expires_at < $2",
                session.caller.user_id,
                now - _SESSIONS_KEPT,
            )
            await _start(connection, session, token_hash, now)

    async def use_token(
        self, token_hash: bytes, successor_hash: bytes, now: datetime
    ) -> Session | None:
        """Use a refresh token up and store its successor.

        Uses of one session's tokens take turns. A use that gives a thief away ends the session,
        which is then committed although the answer is a refusal.

        Returns:
            The session, or None if the token is refused.
        """
        async with self._database.transaction() as connection:
            presented = await _lock(connection, token_hash)
            if presented is None:
                return None
            session = presented.session
            verdict = judge(presented, now)
            match verdict:
                case Verdict.USE:
                    await _mark_used(connection, session.id, presented.generation, now)
                case Verdict.REPEAT:
                    await _count_repeat(connection, session.id)
                case Verdict.REVOKE:
                    await _end(connection, session, "reuse", now)
                    return None
                case Verdict.REFUSE:
                    return None
                case _:
                    assert_never(verdict)
            await _insert_token(connection, session.id, successor_hash, presented.generation + 1)
            return session

    async def end_session(self, token_hash: bytes, now: datetime) -> None:
        """End the session that a refresh token belongs to, if there is one and it goes on."""
        async with self._database.transaction() as connection:
            presented = await _lock(connection, token_hash)
            if presented is not None and not presented.has_ended:
                await _end(connection, presented.session, "log_out", now)


async def _insert_user(connection: Connection, user: NewUser, now: datetime) -> None:
    inserted = await connection.fetchval(
        """
        INSERT INTO users (tenant_id, id, email, display_name, created_at)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (email) DO NOTHING
        RETURNING id
        """,
        user.caller.tenant_id,
        user.caller.user_id,
        user.email,
        user.display_name,
        now,
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


async def _start(
    connection: Connection, session: Session, token_hash: bytes, now: datetime
) -> None:
    await connection.execute(
        """
        INSERT INTO sessions (tenant_id, user_id, id, started_at, expires_at)
        VALUES ($1, $2, $3, $4, $5)
        """,
        session.caller.tenant_id,
        session.caller.user_id,
        session.id,
        now,
        session.expires_at,
    )
    await _insert_token(connection, session.id, token_hash, 1)
    await audit.record(connection, session.caller, "session.start", _show(session))


async def _insert_token(
    connection: Connection, session_id: UUID, token_hash: bytes, generation: int
) -> None:
    await connection.execute(
        "INSERT INTO refresh_tokens (hash, session_id, generation) VALUES ($1, $2, $3)",
        token_hash,
        session_id,
        generation,
    )


async def _lock(connection: Connection, token_hash: bytes) -> Presented | None:
    row = await connection.fetchrow(
        """
        SELECT session.id, session.tenant_id, session.user_id, session.expires_at,
               session.used_generation, session.used_at, session.repeats,
               session.ended_at IS NOT NULL AS has_ended, token.generation
          FROM refresh_tokens AS token
          JOIN sessions AS session ON session.id = token.session_id
         WHERE token.hash = $1
           FOR UPDATE OF session
        """,
        token_hash,
    )
    if row is None:
        return None
    return Presented(
        session=Session(row["id"], Caller(row["tenant_id"], row["user_id"]), row["expires_at"]),
        generation=row["generation"],
        used_generation=row["used_generation"],
        used_at=row["used_at"],
        repeats=row["repeats"],
        has_ended=row["has_ended"],
    )


async def _mark_used(
    connection: Connection, session_id: UUID, generation: int, now: datetime
) -> None:
    await connection.execute(
        "UPDATE sessions SET used_generation = $2, used_at = $3, repeats = 0 WHERE id = $1",
        session_id,
        generation,
        now,
    )


async def _count_repeat(connection: Connection, session_id: UUID) -> None:
    await connection.execute("UPDATE sessions SET repeats = repeats + 1 WHERE id = $1", session_id)


async def _end(connection: Connection, session: Session, reason: str, now: datetime) -> None:
    await connection.execute(
        "UPDATE sessions SET ended_at = $2, end_reason = $3 WHERE id = $1",
        session.id,
        now,
        reason,
    )
    action = "session.revoke" if reason == "reuse" else "session.end"
    await audit.record(connection, session.caller, action, _show(session))


def _show(session: Session) -> str:
    return ids.show("ses", session.id)
