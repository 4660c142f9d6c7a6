"""Sessions in Postgres, as the system role: no caller is known before a session is."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, assert_never
from uuid import UUID

from server import audit, ids
from server.auth import api_key_store, people
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
    tenant_id: UUID


class SessionStore:
    """Log-ins and their refresh tokens."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def start(
        self, session: Session, token_hash: bytes, now: datetime, *, password_changes: int
    ) -> None:
        """Start a session with its first refresh token, and forget the user's expired ones.

        Args:
            session: Of a user who proved their password.
            token_hash: Of its first refresh token.
            now: When it starts.
            password_changes: How often another password had been set when it was proved.

        Raises:
            CredentialsInvalid: The user was disabled meanwhile, or another password was set.
        """
        async with self._database.transaction() as connection:
            if not await lock_enabled(connection, session.caller):
                raise CredentialsInvalid
            if await _lock_password(connection, session.caller) != password_changes:
                raise CredentialsInvalid
            await begin(connection, session, token_hash, now)

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
                    await _end_with_others(connection, [session.id], "reuse", now)
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
                await _end_with_others(connection, [presented.session.id], "log_out", now)

    async def list_living(self, caller: Caller, now: datetime) -> Sequence[LivingSession]:
        """Return the sessions that go on of the person that a user is, the newest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT id, started_at, expires_at, used_at, client_name, tenant_id
                  FROM sessions
                 WHERE user_id = ANY ($1) AND ended_at IS NULL AND expires_at > $2
                 ORDER BY id DESC
                """,
                _ids(await people.everywhere(connection, caller)),
                now,
            )
        return [
            LivingSession(
                id=row["id"],
                started_at=row["started_at"],
                expires_at=row["expires_at"],
                refreshed_at=row["used_at"],
                client_name=row["client_name"],
                tenant_id=row["tenant_id"],
            )
            for row in rows
        ]

    async def revoke(self, caller: Caller, session_id: UUID, now: datetime) -> None:
        """End one session of the person that a user is.

        Raises:
            NotFound: They have no such session that goes on.
        """
        async with self._database.transaction() as connection:
            found = await connection.fetchval(
                """
                SELECT id
                  FROM sessions
                 WHERE user_id = ANY ($1) AND id = $2 AND ended_at IS NULL AND expires_at > $3
                   FOR UPDATE
                """,
                _ids(await people.everywhere(connection, caller)),
                session_id,
                now,
            )
            if found is None:
                raise NotFound("session")
            await _end_with_others(connection, [session_id], "revoked", now)

    async def end_everywhere(
        self, caller: Caller, now: datetime, *, with_keys: bool
    ) -> tuple[int, int]:
        """End every session of the person that a user is, and the keys if asked.

        Returns:
            How many of each those were.
        """
        async with self._database.transaction() as connection:
            everywhere = await people.everywhere(connection, caller)
            revoked = await api_key_store.end_all(connection, everywhere, now) if with_keys else 0
            ended = await end_all(connection, everywhere, "log_out_everywhere", now)
        return ended, revoked


async def end_all(
    connection: Connection,
    callers: Sequence[Caller],
    reason: str,
    now: datetime,
    *,
    kept: UUID | None = None,
    lingering: UUID | None = None,
) -> int:
    """End every session of some users, but for one that may be kept; return how many those were.

    Of one that lingers, the access tokens that are out stay good until they expire. Sessions that
    were switched to from them go on: those of other users are not ended by this.
    """
    count = 0
    # What is being begun from one of them holds it, and is there once that has ended.
    while session_ids := await _lock_all(connection, callers, now, kept):
        await _end(connection, session_ids, reason, now, lingering=lingering)
        count += len(session_ids)
    return count


async def _lock_all(
    connection: Connection, callers: Sequence[Caller], now: datetime, kept: UUID | None
) -> Sequence[UUID]:
    rows = await connection.fetch(
        """
        SELECT id
          FROM sessions
         WHERE user_id = ANY ($1) AND ended_at IS NULL AND expires_at > $2
           AND id IS DISTINCT FROM $3
         ORDER BY id
           FOR UPDATE
        """,
        _ids(callers),
        now,
        kept,
    )
    return [row["id"] for row in rows]


async def lock_enabled(connection: Connection, caller: Caller) -> bool:
    """Tell whether neither a user nor their home is disabled, nor will be before this commits."""
    rows = await connection.fetch(
        """
        SELECT disabled_at
          FROM users
         WHERE (tenant_id = $1 AND id = $2)
            OR id = (SELECT home_id FROM users WHERE tenant_id = $1 AND id = $2)
           FOR SHARE
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return bool(rows) and not any(row["disabled_at"] for row in rows)


async def _lock_password(connection: Connection, caller: Caller) -> int | None:
    """Return how often another password was set. None is before this commits."""
    changes: int | None = await connection.fetchval(
        """
        SELECT password_changes FROM accounts WHERE tenant_id = $1 AND user_id = $2 FOR SHARE
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return changes


async def lock_living(
    connection: Connection, caller: Caller, session_id: UUID, now: datetime
) -> datetime | None:
    """Return when a session expires that goes on, and does not end before this commits."""
    expires_at: datetime | None = await connection.fetchval(
        """
        SELECT expires_at
          FROM sessions
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
           AND ended_at IS NULL AND expires_at > $4
           FOR SHARE
        """,
        caller.tenant_id,
        caller.user_id,
        session_id,
        now,
    )
    return expires_at


async def begin(
    connection: Connection,
    session: Session,
    token_hash: bytes,
    now: datetime,
    *,
    switched_from: UUID | None = None,
) -> None:
    """Start a session, after making room for it and forgetting the user's expired ones."""
    await connection.execute(
        "DELETE FROM sessions WHERE user_id = $1 AND expires_at < $2",
        session.caller.user_id,
        now - _KEPT,
    )
    await _make_room(connection, session.caller, now, kept=switched_from)
    await start(connection, session, token_hash, now, switched_from=switched_from)


async def _make_room(
    connection: Connection, caller: Caller, now: datetime, *, kept: UUID | None
) -> None:
    """End the oldest sessions of a person who has as many as one may have, but for one kept.

    The others are not locked: those who switch from one session would wait for each other.
    """
    rows = await connection.fetch(
        """
        SELECT id
          FROM sessions
         WHERE user_id = ANY ($1) AND ended_at IS NULL AND expires_at > $2
           AND id IS DISTINCT FROM $4
         ORDER BY id DESC
        OFFSET $3
        """,
        _ids(await people.everywhere(connection, caller)),
        now,
        _MOST_LIVING - 1 - (kept is not None),
        kept,
    )
    await _end_with_others(connection, [row["id"] for row in rows], "crowded", now)


async def start(
    connection: Connection,
    session: Session,
    token_hash: bytes,
    now: datetime,
    *,
    switched_from: UUID | None = None,
) -> None:
    """Store a session with its first refresh token."""
    await connection.execute(
        """
        INSERT INTO sessions (tenant_id, user_id, id, started_at, expires_at, client_name,
                              switched_from)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        session.caller.tenant_id,
        session.caller.user_id,
        session.id,
        now,
        session.expires_at,
        session.client_name,
        switched_from,
    )
    await _insert_token(connection, session.id, token_hash, 1)
    action = "session.switch" if switched_from else "session.start"
    await audit.record(connection, session.caller, action, ids.show(ids.SESSION, session.id))


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


async def _end_with_others(
    connection: Connection, session_ids: Sequence[UUID], reason: str, now: datetime
) -> None:
    """End sessions, and those that were switched to from them, wherever they are.

    What is being begun from a session holds it: once that has ended, all that came of it is there.
    """
    while session_ids:
        await _end(connection, session_ids, reason, now)
        rows = await connection.fetch(
            "SELECT id FROM sessions WHERE switched_from = ANY ($1) AND ended_at IS NULL",
            session_ids,
        )
        session_ids = [row["id"] for row in rows]


async def _end(
    connection: Connection,
    session_ids: Sequence[UUID],
    reason: str,
    now: datetime,
    *,
    lingering: UUID | None = None,
) -> None:
    if not session_ids:
        return
    rows = await connection.fetch(
        """
        UPDATE sessions
           SET ended_at = $2, end_reason = $3
         WHERE id = ANY ($1) AND ended_at IS NULL
        RETURNING tenant_id, user_id, id
        """,
        session_ids,
        now,
        reason,
    )
    action = "session.revoke" if reason == "reuse" else "session.end"
    ended = defaultdict[Caller, list[UUID]](list)
    for row in rows:
        ended[Caller(row["tenant_id"], row["user_id"])].append(row["id"])
    for caller, theirs in ended.items():
        await end_grants(connection, caller, [one for one in theirs if one != lingering])
        shown = [ids.show(ids.SESSION, session_id) for session_id in theirs]
        await audit.record_all(connection, caller, action, shown)


def _ids(callers: Sequence[Caller]) -> list[UUID]:
    return [caller.user_id for caller in callers]
