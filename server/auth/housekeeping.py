"""Deletes what nothing asks for any more."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Final, NoReturn

import structlog

from server.clock import Clock, utc_now
from server.errors import StoreUnavailable

log = structlog.get_logger()

_EVERY_SECONDS: Final = 600.0

Forget = Callable[[datetime], Awaitable[None]]


class Housekeeping:
    """Has stores forget, again and again. Every process of auth does it: twice does no harm."""

    def __init__(self, forgetful: Sequence[Forget], *, clock: Clock = utc_now) -> None:
        self._forgetful = forgetful
        self._clock = clock

    async def run(self) -> NoReturn:
        """Keep forgetting."""
        while True:
            for forget in self._forgetful:
                try:
                    await forget(self._clock())
                except (StoreUnavailable, TimeoutError) as error:
                    log.warning("nothing forgotten", error=repr(error))
            await asyncio.sleep(_EVERY_SECONDS)
