"""What the users slice measures."""

from typing import Final

from prometheus_client import Gauge

from server.database import SystemDatabase

SEAL_LAG: Final = Gauge("audit_seal_lag_seconds", "Age of the oldest audit event not chained yet.")
UNSIGNED: Final = Gauge(
    "audit_unsigned_seconds", "Age of the oldest chained event that no signed checkpoint is behind."
)


class AuditReadings:
    """Reads gauges out of the audit log."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def lag(self) -> None:
        """Tell how far the sealing is behind."""
        rows = await self._database.fetch_alone(
            """
            SELECT extract(epoch FROM now() - event.event_time)::float8 AS seconds
              FROM audit_cursor AS cursor
             CROSS JOIN LATERAL (
                   SELECT event_time
                     FROM audit_events
                    WHERE (xid, id) > (cursor.xid, cursor.event_id)
                    ORDER BY xid, id
                    LIMIT 1
                   ) AS event
            """
        )
        SEAL_LAG.set(rows[0]["seconds"] if rows else 0)

    async def unsigned(self) -> None:
        """Tell how far the signing is behind: nothing signs while no worker does its jobs."""
        rows = await self._database.fetch_alone(
            """
            SELECT max(extract(epoch FROM now() - event.event_time))::float8 AS seconds
              FROM audit_heads AS head
              LEFT JOIN audit_checkpoints AS signed USING (tenant_id)
              JOIN audit_links AS link
                ON link.tenant_id = head.tenant_id
               AND link.position = coalesce(signed.position, 0) + 1
              JOIN audit_events AS event ON event.id = link.event_id
             WHERE head.position > coalesce(signed.position, 0)
            """
        )
        UNSIGNED.set(rows[0]["seconds"] or 0)
