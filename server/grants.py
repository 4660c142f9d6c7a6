"""Grants, by which access tokens are made, and their end: log-ins and API keys.

An access token says which grant it descends from. Ending a grant writes it down in the same
transaction; every process reads what was written every few seconds, and refuses the tokens of
what ended: `RELOAD_SECONDS` later at most, and the time that it takes to read.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, NoReturn
from uuid import UUID

import structlog

from server.caller import Caller
from server.clock import Clock, utc_now
from server.database import Connection, SystemDatabase
from server.errors import StoreUnavailable, Unauthenticated
from server.tokens import LEEWAY_SECONDS, LONGEST_LIFETIME_SECONDS

log = structlog.get_logger()

RELOAD_SECONDS: Final = 3.0
_LATEST_COMMIT: Final = timedelta(minutes=2)
"""Longer than a transaction lasts: what was written before that has been read."""
_KEPT: Final = timedelta(seconds=LONGEST_LIFETIME_SECONDS + LEEWAY_SECONDS) + _LATEST_COMMIT
"""After this no token of an ended grant is believed anyway."""


async def end_grants(connection: Connection, caller: Caller, grant_ids: Sequence[UUID]) -> None:
    """Have every process refuse the access tokens of a user's grants, once this commits."""
    await connection.execute(
        """
        INSERT INTO ended_grants (tenant_id, user_id, id)
        SELECT $1, $2, unnest($3::uuid[])
            ON CONFLICT (id) DO NOTHING
        """,
        caller.tenant_id,
        caller.user_id,
        list(grant_ids),
    )


async def check_living(connection: Connection, caller: Caller, grant_id: UUID) -> None:
    """Make sure that a grant has not ended, whatever this process has read of that.

    Raises:
        Unauthenticated: It has.
    """
    has_ended = await connection.fetchval(
        "SELECT true FROM ended_grants WHERE tenant_id = $1 AND user_id = $2 AND id = $3",
        caller.tenant_id,
        caller.user_id,
        grant_id,
    )
    if has_ended:
        raise Unauthenticated("what the call was made with has ended")


class EndedGrants:
    """The grants that ended so lately that tokens of theirs might be shown. Ask it with `in`.

    With PostgreSQL away it goes on with what it has read: nothing can end then.
    """

    def __init__(self, database: SystemDatabase, *, clock: Clock = utc_now) -> None:
        self._database = database
        self._clock = clock
        self._forget_at: dict[UUID, float] = {}
        self._has_read = False

    def __contains__(self, grant_id: object) -> bool:
        """Tell whether a grant has ended."""
        return grant_id in self._forget_at

    async def refresh(self) -> None:
        """Read what ended since it was last read.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        now = self._clock().timestamp()
        since = _LATEST_COMMIT if self._has_read else _KEPT
        for grant_id in await self._ended_within(since):
            self._forget_at.setdefault(grant_id, now + _KEPT.total_seconds())
        self._has_read = True
        for grant_id in [each for each, then in self._forget_at.items() if then <= now]:
            del self._forget_at[grant_id]

    async def run(self) -> NoReturn:
        """Keep reading."""
        while True:
            try:
                await self.refresh()
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("ended grants not read", error=repr(error))
            await asyncio.sleep(RELOAD_SECONDS)

    async def forget(self, now: datetime) -> None:
        """Delete from the store what no process reads any more."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM ended_grants WHERE ended_at < $1", now - 2 * _KEPT
            )

    async def _ended_within(self, past: timedelta) -> list[UUID]:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "SELECT id FROM ended_grants WHERE ended_at > now() - $1::interval", past
            )
        return [UUID(int=row["id"].int) for row in rows]
