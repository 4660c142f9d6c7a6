"""Audit events of other members of a tenant, as the system role: for those who may look at it."""

from collections.abc import Sequence
from typing import Final
from uuid import UUID

from server import audit, ids
from server.access import Access
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.errors import NotFound, PermissionDenied
from server.roles import check_role
from server.users.store import AuditEvent

# Who was erased is no member any more; the events that tell of it stay.
_MEMBERS: Final = """
    SELECT id AS user_id FROM users WHERE tenant_id = $1
     UNION
    SELECT user_id FROM erasures WHERE tenant_id = $1
"""


class TenantAudits:
    """Shows auditors, admins and owners what the log has of others, and tells the log of that."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def events(
        self, caller: Caller, whose: UUID | None, *, before: UUID | None, limit: int
    ) -> Sequence[AuditEvent]:
        """Return the newest events of a member, or the newest before one of them.

        Whatever the access token says of a role, what counts is the role that stands in the table.

        Args:
            caller: Who asks.
            whose: The member; None: everybody of the tenant.
            before: The event to go on from; None: the newest.
            limit: How many at most.

        Raises:
            NotFound: The tenant never had such a member.
            PermissionDenied: The caller is an agent, or no auditor, admin or owner.
        """
        async with self._database.transaction() as connection:
            await _check_may_look(connection, caller)
            if whose is not None:
                await _check_member(connection, caller, whose)
            rows = await connection.fetch(
                f"""
                SELECT event.id, event.event_time, event.actor, event.action, event.resource,
                       event.user_id, link.position AS chain_position, agent.name AS agent_name
                  FROM ({_MEMBERS}) AS member
                 CROSS JOIN LATERAL (
                       SELECT *
                         FROM audit_events
                        WHERE tenant_id = $1 AND user_id = member.user_id AND id < $3
                        ORDER BY id DESC
                        LIMIT $4
                       ) AS event
                  LEFT JOIN audit_links AS link ON link.event_id = event.id
                  LEFT JOIN agents AS agent
                    ON agent.id = agent_of(event.actor) AND agent.tenant_id = $1
                 WHERE $2::uuid IS NULL OR member.user_id = $2
                 ORDER BY event.id DESC
                 LIMIT $4
                """,  # noqa: S608 - a constant
                caller.tenant_id,
                whose,
                before or ids.ABOVE_ALL,
                limit,
            )
            await _record(connection, caller, whose)
        return [AuditEvent(**row) for row in rows]


async def _check_may_look(connection: Connection, caller: Caller) -> None:
    if caller.agent:
        raise PermissionDenied
    await check_role(connection, caller, Access.AUDITOR)


async def _check_member(connection: Connection, caller: Caller, whose: UUID) -> None:
    found = await connection.fetchval(
        f"SELECT true FROM ({_MEMBERS}) AS member WHERE user_id = $2",  # noqa: S608 - a constant
        caller.tenant_id,
        whose,
    )
    if not found:
        raise NotFound("member")


async def _record(connection: Connection, caller: Caller, whose: UUID | None) -> None:
    """Tell whoever was looked at, in their own log; of everybody, the one who looks."""
    if whose is None:
        shown = ids.show(ids.TENANT, caller.tenant_id)
        await audit.record(connection, caller, "audit.read", shown)
    else:
        member = Caller(caller.tenant_id, whose)
        shown = ids.show(ids.USER, whose)
        await audit.record_all(connection, member, "audit.read", [shown], actor=caller.actor)
