"""A user's own rows in Postgres: profile, consents, audit events."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from server import audit
from server.caller import Caller
from server.database import Connection, Database
from server.errors import NotFound


@dataclass(frozen=True, slots=True)
class User:
    """Who the caller is."""

    id: UUID
    tenant_id: UUID
    email: str
    display_name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Consent:
    """A decision on one purpose."""

    purpose: str
    granted: bool
    version: int
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """An event of the caller's audit log."""

    id: UUID
    event_time: datetime
    actor: str
    action: str
    resource: str
    chain_position: int | None


class UserStore:
    """The caller's own account."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, caller: Caller) -> User:
        """Return the caller.

        Raises:
            NotFound: The account is gone, though its last token is still good.
        """
        async with self._database.transaction(caller) as connection:
            row = await connection.fetchrow(
                """
                SELECT id, tenant_id, email, display_name, created_at
                  FROM users
                 WHERE tenant_id = $1 AND id = $2
                """,
                caller.tenant_id,
                caller.user_id,
            )
        if row is None:
            raise NotFound("user")
        return User(**row)

    async def record_consent(self, caller: Caller, purpose: str, *, granted: bool) -> Consent:
        """Add a decision to the history, and to the audit log."""
        action = "consent.grant" if granted else "consent.withdraw"
        async with self._database.transaction(caller) as connection:
            consent = None
            while consent is None:
                consent = await _insert_next(connection, caller, purpose, granted=granted)
            await audit.record(connection, caller, action, purpose)
        return consent

    async def list_consents(self, caller: Caller) -> Sequence[Consent]:
        """Return the latest decision on each purpose."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT DISTINCT ON (purpose) purpose, granted, version, recorded_at
                  FROM consents
                 WHERE tenant_id = $1 AND user_id = $2
                 ORDER BY purpose, version DESC
                """,
                caller.tenant_id,
                caller.user_id,
            )
        return [Consent(**row) for row in rows]

    async def list_audit_events(
        self, caller: Caller, *, before: UUID | None, limit: int
    ) -> Sequence[AuditEvent]:
        """Return the newest events of the caller, or the newest before one of them."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT event.id, event.event_time, event.actor, event.action, event.resource,
                       link.position AS chain_position
                  FROM audit_events AS event
                  LEFT JOIN audit_links AS link ON link.event_id = event.id
                 WHERE event.tenant_id = $1 AND event.user_id = $2
                   AND event.id < coalesce($3::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
                 ORDER BY event.id DESC
                 LIMIT $4
                """,
                caller.tenant_id,
                caller.user_id,
                before,
                limit,
            )
        return [AuditEvent(**row) for row in rows]


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
