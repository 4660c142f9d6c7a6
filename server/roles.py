"""What users may do in their tenant, as it stands when they do it."""

from server.access import ROLES, Access, Role
from server.caller import Caller
from server.database import Connection
from server.errors import PermissionDenied


async def check_role(connection: Connection, caller: Caller, access: Access) -> Role:
    """Return the role of a caller, if it opens what asks for `access`.

    Whatever the access token says of a role, what counts is the role that stands in the table.

    Raises:
        PermissionDenied: It does not; or the caller is disabled, here or at home.
    """
    role = await connection.fetchval(
        """
        SELECT users.role
          FROM users
          LEFT JOIN users AS home ON home.id = users.home_id
         WHERE users.tenant_id = $1 AND users.id = $2
           AND users.disabled_at IS NULL AND home.disabled_at IS NULL
        """,
        caller.tenant_id,
        caller.user_id,
    )
    if role not in ROLES[access]:
        raise PermissionDenied
    return Role(role)
