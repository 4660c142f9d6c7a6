"""A tenant keeps an owner, whoever leaves it, steps down, is disabled or erased."""

from collections.abc import Collection
from typing import Final
from uuid import UUID

from server import audit, ids
from server.caller import Caller
from server.database import Connection
from server.errors import StateConflict

_STANDING: Final = """
      FROM users
      LEFT JOIN users AS home ON home.id = users.home_id
     WHERE users.tenant_id = ANY ($1) AND users.disabled_at IS NULL AND home.disabled_at IS NULL
       AND NOT EXISTS (SELECT FROM erasures WHERE erasures.user_id = users.id)
"""
"""Who belongs to some tenants, and is neither disabled nor to be erased."""


async def take_turns(connection: Connection, tenant_ids: Collection[UUID]) -> None:
    """Wait for others who change who belongs to tenants, and have them wait until this commits.

    To be called before anything that waits for a writer: two would wait for each other.
    """
    locks = sorted(int.from_bytes(each.bytes[-8:], signed=True) for each in tenant_ids)
    for lock in locks:
        await connection.execute("SELECT pg_advisory_xact_lock($1)", lock)


async def check_owner_left(connection: Connection, tenant_id: UUID) -> None:
    """Make sure that a tenant has an owner.

    Raises:
        StateConflict: It has none.
    """
    left = await connection.fetchval(
        f"SELECT EXISTS (SELECT {_STANDING} AND users.role = 'owner')",
        [tenant_id],
    )
    if not left:
        raise StateConflict("the tenant would have no owner; make somebody else an owner first")


async def hand_over(connection: Connection, tenant_ids: Collection[UUID]) -> None:
    """Make somebody an owner of each tenant that has none, if anybody is left in it.

    Admins come first, then members, then auditors; of these, whoever has been there longest.
    """
    rows = await connection.fetch(
        f"""
        WITH first AS (
            SELECT DISTINCT ON (users.tenant_id) users.id
            {_STANDING}
             ORDER BY users.tenant_id,
                      array_position(ARRAY['owner', 'admin', 'member', 'auditor'], users.role),
                      users.created_at, users.id
        )
        UPDATE users
           SET role = 'owner'
          FROM first
         WHERE users.id = first.id AND users.role <> 'owner'
        RETURNING users.tenant_id, users.id AS user_id
        """,  # noqa: S608 - a constant
        list(tenant_ids),
    )
    for heir in [Caller(**row) for row in rows]:
        shown = ids.show(ids.USER, heir.user_id)
        await audit.record_all(connection, heir, "member.assign_owner", [shown], actor=audit.SYSTEM)
