"""What ends when a user takes a consent back. Every method is a part of that transaction."""

from datetime import datetime
from uuid import UUID

from server.auth import api_key_store, session_store
from server.caller import Caller
from server.database import Connection


class ConsentEndings:
    """Ends sessions, and what agents were given."""

    async def end_sessions(
        self, connection: Connection, caller: Caller, now: datetime, *, calling: UUID
    ) -> int:
        """End every session of a user and return how many that were.

        Of the one that calls, the access tokens that are out stay good until they expire: the user
        may want to take along what is theirs, or to have it erased.
        """
        return await session_store.end_all(connection, [caller], "consent", now, lingering=calling)

    async def end_agents(self, connection: Connection, caller: Caller) -> None:
        """Have the access tokens of a user's agents refused; their keys wait for a consent."""
        await api_key_store.replace_grants(connection, caller, of_agents=True)
