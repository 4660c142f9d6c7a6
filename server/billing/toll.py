"""How fast users may call, and counting what they do.

The bucket of a user is in Valkey, one for all processes and both transports: whoever restarts
empties none; and so is the bucket of their tenant, which all its users share. A process takes a few
calls at a time out of both, so that most calls ask nobody; what it took and nobody used within a
second is lost to them, which is little beside the burst. Where Valkey does not answer nobody is
refused: the limits are there for the many, not against them.

What was used is counted here, as it is committed, and added in Postgres every few seconds, one
statement for many users: no call writes, and no row is written often. A call that changed more than
a hundred things costs calls besides, which are taken out of the bucket at the same time: an import
is not refused for its size, and its user waits for it afterwards, no longer than the bucket takes
to fill. A process that is killed takes the counts of its last seconds with it.
"""

import asyncio
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Final, TypeVar
from uuid import UUID

import asyncpg
import structlog

from server.billing.plans import JOB, METERS, QUERY, Rates, Usage, calls_beside
from server.billing.store import BillingStore
from server.buckets import Buckets, Rate, Taken, Want
from server.cache import KEY_PREFIX, Redis, prefix_of
from server.caller import Caller
from server.clock import Clock, utc_now
from server.errors import RateLimited, StoreUnavailable
from server.metering import Count
from server.metrics import RATE_LIMITED

K = TypeVar("K")
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
    """Calls that this process has taken out of a bucket."""

    calls: int = 0
    until: float = 0.0

    def is_spent(self, now: float) -> bool:
        """Tell whether no call is left that is good."""
        return not self.calls or self.until < now


_SPENT: Final = _Purse()


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
        self._users: OrderedDict[Caller, _Purse] = OrderedDict()
        self._tenants: OrderedDict[UUID, _Purse] = OrderedDict()
        self._rates: OrderedDict[Caller, tuple[Rates, float]] = OrderedDict()
        self._used: defaultdict[tuple[Caller, date], Usage] = defaultdict(Usage)
        self._owed: dict[Caller, int] = {}

    async def admit(self, caller: Caller) -> None:
        """Let a call of a user pass.

        Raises:
            RateLimited: There were too many; says when the next may come.
        """
        own, tenants = await self._purses(caller)
        own.calls -= 1
        tenants.calls -= 1

    def meter(self, caller: Caller, method: str, received: Callable[[], int]) -> Count | None:
        """Return what counts the changes of a call; None: they count as nothing.

        Args:
            caller: Whose call it is.
            method: Its full name.
            received: Returns how many bytes of it have come.
        """
        match METERS.get(method):
            case "writes":
                return _Writes(self, caller, received).count
            case "jobs":
                return _Asking(self, caller).count
            case _:
                return None

    def note(self, caller: Caller, method: str) -> None:
        """Count a call that was served."""
        if METERS.get(method) == "queries":
            self.add(caller, QUERY)

    def note_job(self, caller: Caller) -> None:
        """Count a job that was asked for without a call."""
        self.add(caller, JOB)

    def add(self, caller: Caller, used: Usage) -> None:
        """Count what a user used."""
        key = caller, self._clock().date().replace(day=1)
        if key in self._used or len(self._used) < _MOST_COUNTED:
            self._used[key] += used

    def owe(self, caller: Caller, calls: int) -> None:
        """Have calls taken out of a user's bucket that were made already."""
        if calls:
            self._owed[caller] = self._owed.get(caller, 0) + calls

    async def flush(self) -> None:
        """Add what was counted and take what is owed.

        What cannot be added is kept for the next time; what cannot be taken is forgotten.
        """
        await self._add_up()
        await self._charge()

    async def _add_up(self) -> None:
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

    async def _charge(self) -> None:
        owed, self._owed = self._owed, {}
        try:
            for caller, calls in owed.items():
                rate = (await self._rates_of(caller)).own.times(self._scale)
                await self._buckets.charge(_bucket_of(caller), rate, calls)
        except (StoreUnavailable, TimeoutError, asyncpg.PostgresError) as error:
            log.warning("calls are not charged", error=repr(error))

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

    async def _purses(self, caller: Caller) -> tuple[_Purse, _Purse]:
        """Return purses of a user and of their tenant that hold a call each."""
        while True:
            own = self._users.get(caller, _SPENT)
            tenants = self._tenants.get(caller.tenant_id, _SPENT)
            now = self._seconds()
            if not own.is_spent(now) and not tenants.is_spent(now):
                return own, tenants
            # Others may take what was fetched before this goes on.
            await self._fetch(caller, of_user=own.is_spent(now), of_tenant=tenants.is_spent(now))

    async def _fetch(self, caller: Caller, *, of_user: bool, of_tenant: bool) -> None:
        """Take calls out of buckets: out of both in one trip, or out of none.

        Raises:
            RateLimited: One of them is empty.
        """
        rates = await self._rates_of(caller)
        wants = dict[str, Want]()
        if of_user:
            wants["user"] = self._want(_bucket_of(caller), rates.own)
        if of_tenant:
            wants["tenant"] = self._want(f"{KEY_PREFIX}{caller.tenant_id.hex}:calls", rates.tenant)
        try:
            taken = await self._buckets.take(*wants.values())
        except StoreUnavailable:
            taken = Taken([want.calls for want in wants.values()])
        if taken.empty is not None:
            whose = list(wants)[taken.empty]
            RATE_LIMITED.labels(whose).inc()
            raise RateLimited(f"calls of this {whose}", taken.wait)
        for whose, calls in zip(wants, taken.calls, strict=True):
            if whose == "user":
                _put(self._users, caller, calls, self._seconds())
            else:
                _put(self._tenants, caller.tenant_id, calls, self._seconds())

    def _want(self, key: str, rate: Rate) -> Want:
        scaled = rate.times(self._scale)
        return Want(key, scaled, max(1, min(_TAKEN_AT_ONCE, scaled.burst // _PART_OF_BURST)))

    async def _rates_of(self, caller: Caller) -> Rates:
        """Return how fast a user and their tenant may call, as it was at most a minute ago."""
        known = self._rates.get(caller)
        if known and known[1] > self._seconds():
            return known[0]
        rates = await self._store.rates_of(caller)
        _remember(self._rates, caller, (rates, self._seconds() + _RATE_SECONDS))
        return rates


class _Writes:
    """Counts what one call changes, and the bytes of it that have come by then."""

    __slots__ = ("_caller", "_counted_bytes", "_received", "_toll")

    def __init__(self, toll: Toll, caller: Caller, received: Callable[[], int]) -> None:
        self._toll = toll
        self._caller = caller
        self._received = received
        self._counted_bytes = 0

    def count(self, changes: int, uploaded_bytes: int) -> None:
        received = self._received()
        fresh = received - self._counted_bytes
        self._counted_bytes = received
        self._toll.add(self._caller, Usage(writes=changes, bytes=fresh + uploaded_bytes))
        self._toll.owe(self._caller, calls_beside(changes))


class _Asking:
    """Counts that one call asked for a job, whatever else changed with that."""

    __slots__ = ("_caller", "_has_asked", "_toll")

    def __init__(self, toll: Toll, caller: Caller) -> None:
        self._toll = toll
        self._caller = caller
        self._has_asked = False

    def count(self, _changes: int, _uploaded_bytes: int) -> None:
        if not self._has_asked:
            self._has_asked = True
            self._toll.note_job(self._caller)


def _bucket_of(caller: Caller) -> str:
    return f"{prefix_of(caller)}calls"


def _put(purses: "OrderedDict[K, _Purse]", key: K, calls: int, now: float) -> None:
    """Put calls into a purse, with those in it that are still good."""
    purse = purses.get(key) or _Purse()
    purse.calls = calls + (0 if purse.is_spent(now) else purse.calls)
    purse.until = now + _KEPT_SECONDS
    _remember(purses, key, purse)


def _remember(kept: "OrderedDict[K, T]", key: K, value: T) -> None:
    kept.pop(key, None)
    kept[key] = value
    if len(kept) > _MOST_REMEMBERED:
        kept.popitem(last=False)
