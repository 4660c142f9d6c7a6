"""Sessions in Postgres, as the system role: no caller is known before a session is."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, assert_never
from uuid import UUID

from server import audit, ids
from server.auth.refresh_tokens import Presented, Session, Verdict, judge
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.errors import CredentialsInvalid, NotFound
from server.grants import end_grants

_KEPT: Final = timedelta(days=1)
_MOST_LIVING: Final = 100


@dataclass(frozen=True, slots=True)
class LivingSession:
    """A session as its user sees it."""

    id: UUID
    started_at: datetime
    expires_at: datetime
    refreshed_at: datetime | None
    client_name: str


class SessionStore:
    """Log-ins and their refresh tokens."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def start(self, session: Session, token_hash: bytes, now: datetime) -> None:
        """Start a session with its first refresh token, and forget the user's expired ones.

        Raises:
            CredentialsInvalid: The user was disabled meanwhile.
        """
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM sessions WHERE user_id = $1 AND expires_at < $2",
                session.caller.user_id,
                now - _KEPT,
            )
            await _check_enabled(connection, session.caller)
            await _make_room(connection, session.caller, now)
            await start(connection, session, token_hash, now)

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
                    await _end(connection, session.caller, [session.id], "reuse", now)
                    return None
                case Verdict.REFUSE:
                    return None
                case _:
                    assert_never(verdict)
            await _insert_token(connection, session.id, successor_hash, presented.generation + 1)
            return session

    async def end_by_token(self, token_hash: bytes, now: datetime) -> None:
        """End the session that a refresh token belongs to, if there is one and it goes on."""
        async with self._database.transaction() as connection:
            presented = await _lock(connection, token_hash)
            if presented is not None and not presented.has_ended:
                await _end(
                    connection, presented.session.caller, [presented.session.id], "log_out", now
                )

    async def list_living(self, caller: Caller, now: datetime) -> Sequence[LivingSession]:
        """Return the sessions of a user that go on, the newest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT id, started_at, expires_at, used_at, client_name
                  FROM sessions
                 WHERE tenant_id = $1 AND user_id = $2 AND ended_at IS NULL AND expires_at > $3
                 ORDER BY id DESC
                """,
                caller.tenant_id,
                caller.user_id,
                now,
            )
        return [
            LivingSession(
                id=row["id"],
                started_at=row["started_at"],
                expires_at=row["expires_at"],
                refreshed_at=row["used_at"],
                client_name=row["client_name"],
            )
            for row in rows
        ]

    async def revoke(self, caller: Caller, session_id: UUID, now: datetime) -> None:
        """End one session of a user.

        Raises:
            NotFound: The user has no such session that goes on.
        """
        async with self._database.transaction() as connection:
            found = await connection.fetchval(
                """
                SELECT id
                  FROM sessions
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                   AND ended_at IS NULL AND expires_at > $4
                   FOR UPDATE
                """,
                caller.tenant_id,
                caller.user_id,
                session_id,
                now,
            )
            if found is None:
                raise NotFound("session")
            await _end(connection, caller, [session_id], "revoked", now)

    async def end_everywhere(self, caller: Caller, now: datetime) -> int:
        """End every session of a user and return how many that were."""
        async with self._database.transaction() as connection:
            return await end_all(connection, caller, "log_out_everywhere", now)


async def end_all(
    connection: Connection,
    caller: Caller,
    reason: str,
    now: datetime,
    *,
    kept: UUID | None = None,
    lingering: UUID | None = None,
) -> int:
    """End every session of a user, but for one that may be kept, and return how many that were.

    Of one that lingers, the access tokens that are out stay good until they expire.
    """
    rows = await connection.fetch(
        """
        SELECT id
          FROM sessions
         WHERE tenant_id = $1 AND user_id = $2 AND ended_at IS NULL AND expires_at > $3
           AND id IS DISTINCT FROM $4
         ORDER BY id
           FOR UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        now,
        kept,
    )
    session_ids = [row["id"] for row in rows]
    await _end(connection, caller, session_ids, reason, now, lingering=lingering)
    return len(rows)


async def _check_enabled(connection: Connection, caller: Caller) -> None:
    """Make sure that a user is not disabled, and is not until this transaction ends."""
    enabled = await connection.fetchval(
        """
        SELECT id FROM users WHERE tenant_id = $1 AND id = $2 AND disabled_at IS NULL FOR SHARE
        """,
        caller.tenant_id,
        caller.user_id,
    )
    if enabled is None:
        raise CredentialsInvalid


async def _make_room(connection: Connection, caller: Caller, now: datetime) -> None:
    """End the oldest sessions of a user who has as many as one may have."""
    rows = await connection.fetch(
        """
        SELECT id
          FROM sessions
         WHERE tenant_id = $1 AND user_id = $2 AND ended_at IS NULL AND expires_at > $3
         ORDER BY id DESC
        OFFSET $4
           FOR UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        now,
        _MOST_LIVING - 1,
    )
    await _end(connection, caller, [row["id"] for row in rows], "crowded", now)


async def start(connection: Connection, session: Session, token_hash: bytes, now: datetime) -> None:
    """Store a session with its first refresh token."""
    await connection.execute(
        """
        INSERT INTO sessions (tenant_id, user_id, id, started_at, expires_at, client_name)
        VALUES ($1, $2, $3, $4, $5, $6)
        """,
        session.caller.tenant_id,
        session.caller.user_id,
        session.id,
        now,
        session.expires_at,
        session.client_name,
    )
    await _insert_token(connection, session.id, token_hash, 1)
    shown = ids.show(ids.SESSION, session.id)
    await audit.record(connection, session.caller, "session.start", shown)


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
               session.ended_at IS NOT NULL AS has_ended, token.generation, users.role
          FROM refresh_tokens AS token
          JOIN sessions AS session ON session.id = token.session_id
          JOIN users ON users.id = session.user_id
         WHERE token.hash = $1
           FOR UPDATE OF session
        """,
        token_hash,
    )
    if row is None:
        return None
    return Presented(
        session=Session(
            row["id"],
            Caller(row["tenant_id"], row["user_id"]),
            row["expires_at"],
            role=row["role"],
        ),
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


async def _end(
    connection: Connection,
    caller: Caller,
    session_ids: Sequence[UUID],
    reason: str,
    now: datetime,
    *,
    lingering: UUID | None = None,
) -> None:
    if not session_ids:
        return
    await connection.execute(
        "UPDATE sessions SET ended_at = $2, end_reason = $3 WHERE id = ANY ($1)",
        session_ids,
        now,
        reason,
    )
    refused = [session_id for session_id in session_ids if session_id != lingering]
    await end_grants(connection, caller, refused)
    action = "session.revoke" if reason == "reuse" else "session.end"
    shown = [ids.show(ids.SESSION, session_id) for session_id in session_ids]
    await audit.record_all(connection, caller, action, shown)
