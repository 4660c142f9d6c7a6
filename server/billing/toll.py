"""How fast users may call, and counting what they do.

The bucket of a user is in Valkey, one for all processes and both transports: whoever restarts
empties none. A process takes a few calls at a time out of it, so that most calls ask nobody; what
it took and nobody used within a second is lost to the user, which is little beside the burst.
Where Valkey does not answer nobody is refused: the limit is there for the many, not against them.

What was used is counted here and added in Postgres every few seconds, one statement for many
users: no call writes, and no row is written often. A process that is killed takes the counts of
its last seconds with it.
"""

import asyncio
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final, TypeVar

import asyncpg
import structlog

from server.billing.plans import Usage, usage_of
from server.billing.store import BillingStore
from server.buckets import Buckets, Rate, Taken
from server.cache import Redis, prefix_of
from server.caller import Caller
from server.clock import Clock, utc_now
from server.errors import RateLimited, StoreUnavailable
from server.metrics import RATE_LIMITED

T = TypeVar("T")

log = structlog.get_logger()

_TAKEN_AT_ONCE: Final = 20
_PART_OF_BURST: Final = 20
"""No process takes more than this part of a burst at once."""
_KEPT_SECONDS: Final = 1.0
_RATE_SECONDS: Final = 60.0
_MOST_REMEMBERED: Final = 10_000
_MOST_COUNTED: Final = 100_000
_FLUSH_SECONDS: Final = 2.0
_LAST_SECONDS: Final = 2.0


@dataclass(slots=True)
class _Purse:
    """Calls of one user that this process has taken."""

    calls: int
    until: float


class Toll:
    """Admits calls, and counts them."""

    def __init__(
        self,
        redis: Redis,
        store: BillingStore,
        *,
        scale: float = 1.0,
        clock: Clock = utc_now,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Admit as many calls as plans say, times `scale`."""
        self._buckets = Buckets(redis)
        self._store = store
        self._scale = scale
        self._clock = clock
        self._seconds = seconds
        self._purses: OrderedDict[Caller, _Purse] = OrderedDict()
        self._rates: OrderedDict[Caller, tuple[Rate, float]] = OrderedDict()
        self._used: defaultdict[tuple[Caller, date], Usage] = defaultdict(Usage)

    async def admit(self, caller: Caller) -> None:
        """Let a call of a user pass.

        Raises:
            RateLimited: There were too many; says when the next may come.
        """
        purse = self._purses.get(caller)
        if purse is None or not purse.calls or purse.until < self._seconds():
            purse = await self._fetch(caller)
        purse.calls -= 1

    def note(self, caller: Caller, method: str, received_bytes: int) -> None:
        """Count a call that was served."""
        used = usage_of(method, received_bytes)
        key = caller, self._clock().date().replace(day=1)
        if used != Usage() and (key in self._used or len(self._used) < _MOST_COUNTED):
            self._used[key] += used

    async def flush(self) -> None:
        """Add what was counted. What cannot be added is kept for the next time."""
        used = dict(self._used)
        self._used.clear()
        if not used:
            return
        try:
            await self._store.add(used)
        except (StoreUnavailable, TimeoutError, asyncpg.PostgresError) as error:
            log.warning("usage waits", error=repr(error))
            for key, usage in used.items():
                self._used[key] += usage

    async def run(self) -> None:
        """Add counts every few seconds, and once more when cancelled."""
        try:
            while True:
                await asyncio.sleep(_FLUSH_SECONDS)
                await self.flush()
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await self.flush()

    async def _fetch(self, caller: Caller) -> _Purse:
        """Take calls out of the user's bucket."""
        rate = (await self._rate(caller)).times(self._scale)
        wanted = max(1, min(_TAKEN_AT_ONCE, rate.burst // _PART_OF_BURST))
        try:
            taken = await self._buckets.take(f"{prefix_of(caller)}calls", rate, wanted)
        except StoreUnavailable:
            taken = Taken(wanted, timedelta(0))
        if not taken.calls:
            RATE_LIMITED.labels("user").inc()
            raise RateLimited("calls", taken.wait)
        purse = _Purse(taken.calls, self._seconds() + _KEPT_SECONDS)
        _remember(self._purses, caller, purse)
        return purse

    async def _rate(self, caller: Caller) -> Rate:
        """Return how fast a user may call, as it was at most a minute ago."""
        known = self._rates.get(caller)
        if known and known[1] > self._seconds():
            return known[0]
        rate = (await self._store.plan_of(caller)).rate
        _remember(self._rates, caller, (rate, self._seconds() + _RATE_SECONDS))
        return rate


def _remember(kept: "OrderedDict[Caller, T]", caller: Caller, value: T) -> None:
    kept.pop(caller, None)
    kept[caller] = value
    if len(kept) > _MOST_REMEMBERED:
        kept.popitem(last=False)
