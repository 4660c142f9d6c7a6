"""The users that one person is: one in each tenant, of which one is the home of their account.

The account is who logs in, and the home stands for it. Whatever happens to the account happens to
all of its users; whatever happens in one tenant, to the user there alone.
"""

from collections.abc import Sequence

import asyncpg

from server.caller import Caller
from server.database import Connection


async def everywhere(connection: Connection, caller: Caller) -> Sequence[Caller]:
    """Return all users of the person that a user is; of nobody, none."""
    rows = await connection.fetch(
        """
        WITH home AS (
            SELECT coalesce(home_id, id) AS id FROM users WHERE tenant_id = $1 AND id = $2
        )
        SELECT tenant_id, id AS user_id FROM users JOIN home USING (id)
         UNION ALL
        SELECT tenant_id, users.id AS user_id FROM users JOIN home ON home.id = users.home_id
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return _callers(rows)


async def standing_with(connection: Connection, caller: Caller) -> Sequence[Caller]:
    """Return the users that are disabled with one: itself, and with a home all of the person."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, id AS user_id
          FROM users
         WHERE (tenant_id = $1 AND id = $2) OR home_id = $2
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return _callers(rows)


def _callers(rows: Sequence[asyncpg.Record]) -> Sequence[Caller]:
    return [Caller(**row) for row in rows]
