"""How much of the short-term tier a user may fill, and for how long."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from server import audit
from server.caller import Caller
from server.database import Connection
from server.errors import QuotaExceeded
from server.memory.metrics import QUOTA_REFUSALS
from server.memory.model import Tier

_SHARES: Final = (80, 100)
"""Percentages of the quota that the audit log is told of."""


@dataclass(frozen=True, slots=True)
class Room:
    """How much a user may keep, and for how long."""

    limit_bytes: int
    lifetime: timedelta

    @property
    def milliseconds(self) -> int:
        """The lifetime as Redis counts it."""
        return int(self.lifetime.total_seconds() * 1000)

    def refusal(self, used_bytes: int) -> QuotaExceeded:
        """Count and return the refusal of what does not fit."""
        QUOTA_REFUSALS.labels(Tier.SHORT_TERM.value).inc()
        return QuotaExceeded(
            Tier.SHORT_TERM.value,
            used_bytes,
            self.limit_bytes,
            "delete short-term memories, move them to long-term, or end sessions",
            room=max(self.limit_bytes - used_bytes, 0),
        )


async def room_of(connection: Connection, caller: Caller, lifetime: timedelta) -> Room:
    """Return what a user may keep, for `lifetime` unless they chose another one."""
    row = await connection.fetchrow(
        """
        SELECT quota.short_term_bytes,
               (SELECT short_term_hours
                  FROM settings
                 WHERE tenant_id = $1 AND user_id = $2) AS hours
          FROM quotas_of($1, $2) AS quota
        """,
        caller.tenant_id,
        caller.user_id,
    )
    hours = row["hours"]
    return Room(row["short_term_bytes"], lifetime if hours is None else timedelta(hours=hours))


async def note_usage(
    connection: Connection, caller: Caller, used_bytes: int, added: int, room: Room
) -> None:
    """Tell the audit log when the memories come to a share of their quota."""
    crossed = [
        f"usage/{Tier.SHORT_TERM}/{share}"
        for share in _SHARES
        if (used_bytes - added) * 100 < room.limit_bytes * share <= used_bytes * 100
    ]
    if crossed:
        await audit.record_all(connection, caller, "quota.threshold", crossed, actor=audit.SYSTEM)
