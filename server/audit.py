"""The audit log: every change says who did what to whose data, in the change's transaction."""

from typing import Final
from uuid import UUID

from server import ids
from server.caller import Caller
from server.database import Connection
from server.metering import ledger
from server.metrics import count_changes

SYSTEM: Final = "system"
"""Who acts when the mesh does something of its own accord."""

_READ: Final = ".read"
"""Ends actions that change nothing."""


async def record(connection: Connection, caller: Caller, action: str, resource: str) -> None:
    """Append an event to the log, to be committed with the change that it tells of.

    Args:
        connection: The transaction of the change.
        caller: Whose data is touched; also who acts, or has an agent act.
        action: What is done, such as "memory.create".
        resource: Id of what it is done to, never its text.
    """
    await record_all(connection, caller, action, [resource])


async def record_all(
    connection: Connection,
    caller: Caller,
    action: str,
    resources: list[str],
    *,
    actor: str | None = None,
) -> None:
    """Append one event for each resource, in one statement.

    Args:
        connection: The transaction of the changes.
        caller: Whose data is touched.
        action: What is done.
        resources: Ids of what it is done to.
        actor: Who acts; None: the caller.
    """
    events: list[UUID] = [ids.new_id() for _ in resources]
    await connection.execute(
        """
        INSERT INTO audit_events (id, tenant_id, user_id, actor, action, resource)
        SELECT event.id, $3, $4, $5, $6, event.resource
          FROM unnest($1::uuid[], $2::text[]) AS event (id, resource)
        """,
        events,
        resources,
        caller.tenant_id,
        caller.user_id,
        actor or caller.actor,
        action,
    )
    count_changes(action, len(resources))
    changes = len(resources) if actor is None and not action.endswith(_READ) else 0
    if changes and (noted := ledger()):
        noted.note(connection, changes)
