"""Changes of memories, as the audit log tells them."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

from server import ids
from server.caller import Caller
from server.consent import MEMORY_AGENT_ACCESS, MEMORY_STORE
from server.database import SystemDatabase

_NO_EVENT: Final = UUID(int=0)


class ChangeKind(enum.Enum):
    """What was done to a memory."""

    CREATED = enum.auto()
    UPDATED = enum.auto()
    DELETED = enum.auto()
    ARCHIVED = enum.auto()
    RESTORED = enum.auto()


KINDS: Final[Mapping[str, ChangeKind]] = {
    "memory.create": ChangeKind.CREATED,
    "memory.see": ChangeKind.UPDATED,
    "memory.update": ChangeKind.UPDATED,
    "memory.promote": ChangeKind.UPDATED,
    "memory.protect": ChangeKind.UPDATED,
    "memory.unprotect": ChangeKind.UPDATED,
    "memory.feedback": ChangeKind.UPDATED,
    "memory.archive": ChangeKind.ARCHIVED,
    "memory.delete_later": ChangeKind.ARCHIVED,
    "memory.restore": ChangeKind.RESTORED,
    "memory.delete": ChangeKind.DELETED,
}
"""What the audit log calls it."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the audit log: behind one of its events, in the order of (xid, event)."""

    xid: int
    event_id: UUID = _NO_EVENT
    """No event: before the first one of the transaction."""


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """A change of a memory."""

    kind: ChangeKind
    memory_id: UUID
    happened_at: datetime
    cursor: Cursor
    """Where to go on after it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose changes are asked for."""

    caller: Caller
    after: Cursor | None
    """None: none that are there already."""
    limit: int


@dataclass(frozen=True, slots=True)
class News:
    """What there is for one who asked."""

    lacks: str | None
    """A purpose that the user does not consent to, without which nothing is told."""
    events: Sequence[MemoryEvent]
    """In order; there may be more if they are as many as were asked for."""
    horizon: Cursor
    """Every change of the past comes before it, and every change to come after."""
    is_lost: bool
    """Whether what they ask from was told by a mesh that a backup has replaced since."""


class ChangeStore:
    """Reads the changes of many users at once, as the system role."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def news(self, asked: Sequence[Asked]) -> list[News]:
        """Return what there is for each, in the order of the asking.

        A change is told once no transaction can commit one that comes before it: not until all
        transactions that began earlier have ended.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT watch.number, horizon.xid AS horizon,
                       CASE WHEN consent.granted IS NOT TRUE THEN $6
                            WHEN watch.is_agents AND access.granted IS NOT TRUE THEN $8
                       END AS lacks,
                       (watch.xid, watch.event_id) > (transactions_lost_from(), $10)
                       AND watch.xid < renumbered('0') AS is_lost,
                       event.id, event.xid, event.action, event.resource, event.event_time
                  FROM (SELECT transactions_ended() AS xid) AS horizon
                 CROSS JOIN unnest($1::uuid[], $2::uuid[], $3::xid8[], $4::uuid[], $5::integer[],
                                   $9::boolean[])
                       WITH ORDINALITY
                         AS watch (tenant_id, user_id, xid, event_id, room, is_agents, number)
                  LEFT JOIN LATERAL (
                       SELECT granted
                         FROM consents
                        WHERE tenant_id = watch.tenant_id AND user_id = watch.user_id
                          AND purpose = $6
                        ORDER BY version DESC
                        LIMIT 1
                       ) AS consent ON true
                  LEFT JOIN LATERAL (
                       SELECT granted
                         FROM consents
                        WHERE tenant_id = watch.tenant_id AND user_id = watch.user_id
                          AND purpose = $8
                        ORDER BY version DESC
                        LIMIT 1
                       ) AS access ON watch.is_agents
                  LEFT JOIN LATERAL (
                       SELECT id, xid, action, resource, event_time
                         FROM audit_events
                        WHERE tenant_id = watch.tenant_id AND user_id = watch.user_id
                          AND (xid, id) > (watch.xid, watch.event_id)
                          AND xid < horizon.xid
                          AND action = ANY ($7)
                        ORDER BY xid, id
                        LIMIT watch.room
                       ) AS event ON true
                 ORDER BY watch.number, event.xid, event.id
                """,
                [one.caller.tenant_id for one in asked],
                [one.caller.user_id for one in asked],
                [one.after.xid if one.after else None for one in asked],
                [one.after.event_id if one.after else None for one in asked],
                [one.limit for one in asked],
                MEMORY_STORE,
                list(KINDS),
                MEMORY_AGENT_ACCESS,
                [one.caller.agent is not None for one in asked],
                _NO_EVENT,
            )
        return [_news(list(group)) for _, group in groupby(rows, itemgetter("number"))]


def _news(rows: Sequence[Mapping[str, Any]]) -> News:
    first = rows[0]
    told: Iterable[Mapping[str, Any]] = rows if first["id"] else ()
    return News(
        lacks=first["lacks"],
        events=[_event(row) for row in told],
        horizon=Cursor(first["horizon"]),
        is_lost=bool(first["is_lost"]),
    )


def _event(row: Mapping[str, Any]) -> MemoryEvent:
    return MemoryEvent(
        kind=KINDS[row["action"]],
        memory_id=ids.parse(ids.MEMORY, row["resource"], "resource"),
        happened_at=row["event_time"],
        cursor=Cursor(row["xid"], row["id"]),
    )
