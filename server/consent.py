"""Consent: asked in one place, inside the transaction that needs it."""

from typing import Final

from server.caller import Caller
from server.database import Connection
from server.errors import ConsentMissing

MEMORY_STORE: Final = "memory.store"
MEMORY_EMBED: Final = "memory.embed"


async def require(connection: Connection, caller: Caller, purpose: str) -> None:
    """Refuse to go on unless the user's last word on the purpose was yes.

    Raises:
        ConsentMissing: The user never agreed, or withdrew.
    """
    granted = await connection.fetchval(
        """
        SELECT granted
          FROM consents
         WHERE tenant_id = $1 AND user_id = $2 AND purpose = $3
         ORDER BY version DESC
         LIMIT 1
        """,
        caller.tenant_id,
        caller.user_id,
        purpose,
    )
    if not granted:
        raise ConsentMissing(purpose)
