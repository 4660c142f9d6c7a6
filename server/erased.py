"""Users who asked to be erased: what tokens of theirs are still out opens nothing.

The database refuses what they write from the first moment on, in whichever process. This here is
for what they read, and lags by as long as nobody looked.
"""

import asyncio
from datetime import timedelta
from typing import Final, NoReturn
from uuid import UUID

import structlog

from server.database import SystemDatabase
from server.errors import StoreUnavailable

log = structlog.get_logger()

_TOKENS_LIVE: Final = timedelta(hours=1)
"""Longer than any access token that was issued before."""
_PAUSE_SECONDS: Final = 1.0


class ErasedUsers:
    """Those of whom a token may still be out."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database
        self._users: frozenset[UUID] = frozenset()

    def __contains__(self, user_id: object) -> bool:
        """Tell whether a user is among them."""
        return user_id in self._users

    async def refresh(self) -> None:
        """Look who they are.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "SELECT user_id FROM erasures WHERE requested_at > now() - $1::interval",
                _TOKENS_LIVE,
            )
        self._users = frozenset(UUID(int=row["user_id"].int) for row in rows)

    async def run(self) -> NoReturn:
        """Look again and again."""
        while True:
            try:
                await self.refresh()
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("erased users not looked up", error=repr(error))
            await asyncio.sleep(_PAUSE_SECONDS)
