"""Consent: asked in one place, inside the transaction that needs it.

The database answers, by the function consented(purpose): a statement that is a transaction of
its own asks it in its WHERE.
"""

from typing import Final

from server.database import Connection
from server.errors import ConsentMissing

MEMORY_STORE: Final = "memory.store"
MEMORY_EMBED: Final = "memory.embed"
MEMORY_SENSITIVE: Final = "memory.sensitive"
MEMORY_AGENT_ACCESS: Final = "memory.agent_access"
"""Asked by the database itself, at the beginning of every transaction of an agent."""


async def require(connection: Connection, purpose: str) -> None:
    """Refuse to go on unless the last word of the transaction's user was yes.

    Raises:
        ConsentMissing: The user never agreed, or withdrew.
    """
    granted = await connection.fetchval("SELECT consented($1)", purpose)
    if not granted:
        raise ConsentMissing(purpose)
