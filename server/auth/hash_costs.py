"""Knowing what the hashes cost that accounts have, so that those without one can cost as much."""

import asyncio
from typing import Final, NoReturn

import structlog

from server.auth.passwords import Passwords
from server.auth.store import AccountStore
from server.errors import StoreUnavailable

log = structlog.get_logger()

_EVERY_SECONDS: Final = 3600.0


class HashCosts:
    """Tells Passwords of the parameters of stored hashes."""

    def __init__(self, accounts: AccountStore, hashing: Passwords) -> None:
        self._accounts = accounts
        self._hashing = hashing

    async def refresh(self) -> None:
        """Look at the accounts.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        await self._hashing.know(await self._accounts.one_hash_of_each_cost())

    async def run(self) -> NoReturn:
        """Keep looking: costs that no account has any more are no longer paid."""
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            try:
                await self.refresh()
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("costs of hashes not read", error=repr(error))
