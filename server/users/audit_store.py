"""The audit log of whole tenants in Postgres, as the system role."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg

from server.database import Connection, SystemDatabase
from server.errors import StoreUnavailable
from server.users import chain
from server.users.chain import Event, Head, Link, StoredLink

_LOCK: Final = 0x6B696D63  # any number that nothing else locks


@dataclass(frozen=True, slots=True)
class End:
    """Where a tenant's chain ends."""

    recorded: Head
    """The head as the sealer left it."""

    last_position: int
    """Place of the last link there is; the same, unless somebody tampered."""


class AuditStore:
    """Audit events, their links, and how far the sealing got."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def seal(self, limit: int) -> int:
        """Chain the next events and return how many, at most `limit`.

        Only events of transactions that ended are taken, up to the oldest one still running:
        from there on an event could still appear before one that is already visible. Sealers
        take turns, and a batch is chained whole or not at all.

        Raises:
            StoreUnavailable: Another sealer does not get ready.
        """
        async with self._database.transaction() as connection:
            await _take_turns(connection)
            events = await _unchained(connection, limit)
            if not events:
                return 0
            heads = await _heads(connection, {event.tenant_id for event in events})
            links, grown = chain.extend(heads, events)
            await _insert_links(connection, links)
            await _move_heads(connection, grown)
            await _move_cursor(connection, events[-1])
            return len(events)

    async def end(self, tenant_id: UUID) -> End:
        """Return where a tenant's chain ends."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                SELECT head.position, head.hash,
                       (SELECT max(link.position)
                          FROM audit_links AS link
                         WHERE link.tenant_id = $1) AS last_position
                  FROM (VALUES (true)) AS always
                  LEFT JOIN audit_heads AS head ON head.tenant_id = $1
                """,
                tenant_id,
            )
        recorded = Head(row["position"], row["hash"]) if row["hash"] else chain.start(tenant_id)
        return End(recorded, row["last_position"] or 0)

    async def links(
        self, tenant_id: UUID, *, after: int, until: int, limit: int
    ) -> Sequence[StoredLink]:
        """Return a tenant's links with their events, in order of their places."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT link.position, link.hash, event.id, event.tenant_id, event.user_id,
                       event.actor, event.action, event.resource, event.event_time, event.xid
                  FROM audit_links AS link
                  LEFT JOIN audit_events AS event ON event.id = link.event_id
                 WHERE link.tenant_id = $1 AND link.position > $2 AND link.position <= $3
                 ORDER BY link.position
                 LIMIT $4
                """,
                tenant_id,
                after,
                until,
                limit,
            )
        return [
            StoredLink(row["position"], row["hash"], _event(row) if row["id"] else None)
            for row in rows
        ]

    async def find_inserted(self, tenant_id: UUID) -> int | None:
        """Return the place of an event that the sealer must have passed and did not chain.

        An event of a transaction that has not begun yet is just as forged.
        """
        async with self._database.transaction() as connection:
            place: int | None = await connection.fetchval(
                """
                SELECT 1 + (SELECT count(*)
                              FROM audit_links AS link
                              JOIN audit_events AS earlier ON earlier.id = link.event_id
                             WHERE link.tenant_id = $1
                               AND (earlier.xid, earlier.id) < (event.xid, event.id))
                  FROM audit_events AS event, audit_cursor AS cursor
                 WHERE event.tenant_id = $1
                   AND ((event.xid, event.id) <= (cursor.xid, cursor.event_id)
                        OR event.xid >= transactions_begun())
                   AND NOT EXISTS (SELECT FROM audit_links AS link WHERE link.event_id = event.id)
                 ORDER BY event.xid, event.id
                 LIMIT 1
                """,
                tenant_id,
            )
        return place


async def _take_turns(connection: Connection) -> None:
    try:
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
    except asyncpg.LockNotAvailableError as error:
        raise StoreUnavailable("the sealer of the audit log") from error


async def _unchained(connection: Connection, limit: int) -> Sequence[Event]:
    cursor = await connection.fetchrow("SELECT xid, event_id FROM audit_cursor")
    rows = await connection.fetch(
        """
        SELECT id, tenant_id, user_id, actor, action, resource, event_time, xid
          FROM audit_events
         WHERE (xid, id) > ($1, $2)
           AND xid < transactions_ended()
         ORDER BY xid, id
         LIMIT $3
        """,
        cursor["xid"],
        cursor["event_id"],
        limit,
    )
    return [_event(row) for row in rows]


async def _heads(connection: Connection, tenants: Iterable[UUID]) -> Mapping[UUID, Head]:
    rows = await connection.fetch(
        "SELECT tenant_id, position, hash FROM audit_heads WHERE tenant_id = ANY ($1)",
        list(tenants),
    )
    return {row["tenant_id"]: Head(row["position"], row["hash"]) for row in rows}


async def _insert_links(connection: Connection, links: Sequence[Link]) -> None:
    await connection.execute(
        """
        INSERT INTO audit_links (tenant_id, position, event_id, hash)
        SELECT link.tenant_id, link.position, link.event_id, link.hash
          FROM unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::bytea[])
               AS link (tenant_id, position, event_id, hash)
        """,
        [link.tenant_id for link in links],
        [link.position for link in links],
        [link.event_id for link in links],
        [link.hash for link in links],
    )


async def _move_heads(connection: Connection, heads: Mapping[UUID, Head]) -> None:
    await connection.execute(
        """
        INSERT INTO audit_heads (tenant_id, position, hash)
        SELECT head.tenant_id, head.position, head.hash
          FROM unnest($1::uuid[], $2::bigint[], $3::bytea[]) AS head (tenant_id, position, hash)
            ON CONFLICT (tenant_id)
            DO UPDATE SET position = excluded.position, hash = excluded.hash
        """,
        list(heads),
        [head.position for head in heads.values()],
        [head.hash for head in heads.values()],
    )


async def _move_cursor(connection: Connection, last: Event) -> None:
    await connection.execute(
        "UPDATE audit_cursor SET xid = $1, event_id = $2 WHERE singleton", last.xid, last.id
    )


def _event(row: Mapping[str, Any]) -> Event:
    return Event(
        id=row["id"],
        tenant_id=row["tenant_id"],
        user_id=row["user_id"],
        actor=row["actor"],
        action=row["action"],
        resource=row["resource"],
        event_time=row["event_time"],
        xid=row["xid"],
    )
