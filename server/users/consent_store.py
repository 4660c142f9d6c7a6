"""Decisions on consents in Postgres, as the system role: some of them end sessions."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

import asyncpg

from server import audit
from server.caller import Caller
from server.clock import Clock, utc_now
from server.consent import MEMORY_AGENT_ACCESS, MEMORY_STORE
from server.database import Connection, SystemDatabase, enter
from server.embedding_requests import ask_for_embedding, wait_for_writes
from server.users.withdrawals import Withdrawal


@dataclass(frozen=True, slots=True)
class Consent:
    """A decision on one purpose."""

    purpose: str
    granted: bool
    version: int
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class Recorded:
    """A decision, and what came of it."""

    consent: Consent
    ended_sessions: int = 0


class Endings(Protocol):
    """Ends what rests on a consent, inside the transaction that withdraws it."""

    async def end_sessions(
        self, connection: Connection, caller: Caller, now: datetime, *, calling: UUID
    ) -> int:
        """End every session of a user and return how many that were.

        Of the one that calls, the access tokens that are out stay good until they expire.
        """

    async def end_agents(self, connection: Connection, caller: Caller) -> None:
        """Have the access tokens of a user's agents refused."""


class ConsentStore:
    """What users agreed to, and what they took back."""

    def __init__(
        self, database: SystemDatabase, endings: Endings, *, clock: Clock = utc_now
    ) -> None:
        self._database = database
        self._endings = endings
        self._clock = clock

    async def record(
        self, caller: Caller, purpose: str, *, granted: bool, session_id: UUID
    ) -> Recorded:
        """Add a decision to the history and to the audit log, and end what rested on the old one.

        Args:
            caller: Whose decision it is.
            purpose: What it is about.
            granted: Whether they agree.
            session_id: The session that calls.
        """
        action = "consent.grant" if granted else "consent.withdraw"
        async with self._database.transaction() as connection:
            await enter(connection, caller)
            await wait_for_writes(connection, caller)
            consent = None
            while consent is None:
                consent = await _insert_next(connection, caller, purpose, granted=granted)
            await audit.record(connection, caller, action, purpose)
            ended = 0 if granted else await self._end(connection, caller, consent, session_id)
            await ask_for_embedding(connection, caller)
        return Recorded(consent, ended)

    async def unarchived(self, limit: int) -> Sequence[Withdrawal]:
        """Return withdrawals that only Postgres knows of. Who is erased has none to speak of."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT tenant_id, user_id, purpose, version, recorded_at
                  FROM consents
                 WHERE NOT granted AND archived_at IS NULL AND NOT is_erased(tenant_id, user_id)
                 ORDER BY recorded_at
                 LIMIT $1
                """,
                limit,
            )
        return [_withdrawal(row) for row in rows]

    async def note_archived(self, withdrawal: Withdrawal) -> None:
        """Note that S3 knows of a withdrawal as well."""
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                UPDATE consents
                   SET archived_at = now()
                 WHERE tenant_id = $1 AND user_id = $2 AND purpose = $3 AND version = $4
                   AND archived_at IS NULL
                """,
                withdrawal.caller.tenant_id,
                withdrawal.caller.user_id,
                withdrawal.purpose,
                withdrawal.version,
            )

    async def withdraw_again(self, withdrawal: Withdrawal) -> bool:
        """Record a withdrawal that a restored backup does not know; tell whether it did not.

        It keeps its version, so that whatever is decided from now on counts for more than all that
        was ever withdrawn.
        """
        caller = withdrawal.caller
        async with self._database.transaction() as connection:
            await enter(connection, caller)
            await wait_for_writes(connection, caller)
            version = await connection.fetchval(
                """
                INSERT INTO consents
                       (tenant_id, user_id, purpose, version, granted, recorded_at)
                SELECT $1, $2, $3, $4, false, $5
                  FROM users
                 WHERE tenant_id = $1 AND id = $2
                   AND $4 > ALL (SELECT version
                                   FROM consents
                                  WHERE tenant_id = $1 AND user_id = $2 AND purpose = $3)
                RETURNING version
                """,
                caller.tenant_id,
                caller.user_id,
                withdrawal.purpose,
                withdrawal.version,
                withdrawal.recorded_at,
            )
            if version is None:
                return False
            await audit.record_all(
                connection, caller, "consent.withdraw", [withdrawal.purpose], actor=audit.SYSTEM
            )
            await ask_for_embedding(connection, caller)
        return True

    async def _end(
        self, connection: Connection, caller: Caller, consent: Consent, session_id: UUID
    ) -> int:
        """End what rests on a consent that is withdrawn; return how many sessions that were.

        A session rests on memory.store: without it nothing is left to do but to leave. Whoever
        declines at once, or says no again, has nothing that rests on it.
        """
        if consent.purpose == MEMORY_AGENT_ACCESS:
            await self._endings.end_agents(connection, caller)
        if consent.purpose != MEMORY_STORE or not await _stood(connection, caller, consent):
            return 0
        return await self._endings.end_sessions(
            connection, caller, self._clock(), calling=session_id
        )


async def _insert_next(
    connection: Connection, caller: Caller, purpose: str, *, granted: bool
) -> Consent | None:
    """Insert under the next version; None if a decision made at the same time took it.

    The statement then waited for that decision, and the next attempt counts from it.
    """
    row = await connection.fetchrow(
        """
        INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
        SELECT $1, $2, $3, 1 + coalesce(max(version), 0), $4
          FROM consents
         WHERE tenant_id = $1 AND user_id = $2 AND purpose = $3
            ON CONFLICT DO NOTHING
        RETURNING purpose, granted, version, recorded_at
        """,
        caller.tenant_id,
        caller.user_id,
        purpose,
        granted,
    )
    return Consent(**row) if row else None


async def _stood(connection: Connection, caller: Caller, consent: Consent) -> bool:
    """Tell whether the user had agreed until this decision."""
    stood: bool | None = await connection.fetchval(
        """
        SELECT granted
          FROM consents
         WHERE tenant_id = $1 AND user_id = $2 AND purpose = $3 AND version < $4
         ORDER BY version DESC
         LIMIT 1
        """,
        caller.tenant_id,
        caller.user_id,
        consent.purpose,
        consent.version,
    )
    return bool(stood)


def _withdrawal(row: asyncpg.Record) -> Withdrawal:
    return Withdrawal(
        Caller(UUID(int=row["tenant_id"].int), UUID(int=row["user_id"].int)),
        row["purpose"],
        row["version"],
        row["recorded_at"],
    )
