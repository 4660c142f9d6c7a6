"""Buckets of calls in Valkey: one for all processes, and for both transports.

Whoever restarts fills none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from server.cache import Redis, out_of_reach

# The generic cell rate algorithm (ITU-T I.371): one instant says how full the bucket is. The time
# is Valkey's own, so that processes need not agree on it. Of several buckets one that is empty
# leaves the others as they are.
_TAKE: Final = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local fulls, taken = {}, {}
for n, key in ipairs(KEYS) do
    local interval, burst, wanted = ARGV[3 * n - 2], tonumber(ARGV[3 * n - 1]), ARGV[3 * n]
    local full = math.max(tonumber(redis.call('GET', key) or 0), now)
    local room = math.floor(burst - (full - now) / interval)
    if room < 1 then return {n, math.ceil(full - now - (burst - 1) * interval)} end
    taken[n] = math.min(room, tonumber(wanted))
    fulls[n] = full + taken[n] * interval
end
for n, key in ipairs(KEYS) do
    local left = math.ceil((fulls[n] - now) / 1000)
    redis.call('SET', key, string.format('%.0f', fulls[n]), 'PX', left)
end
return {0, 0, unpack(taken)}
"""


# Takes what is not there, too: the bucket stays empty until that much has come back, and twice as
# long as it takes to fill it at most.
_CHARGE: Final = """
local interval, burst, calls = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local full = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now) + calls * interval
full = math.min(full, now + 2 * burst * interval)
redis.call('SET', KEYS[1], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000))
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast somebody may call."""

    calls_per_second: float
    burst: int

    def times(self, scale: float) -> "Rate":
        """Return a rate that many times as fast, of at least one call at a time."""
        return Rate(self.calls_per_second * scale, max(1, round(self.burst * scale)))


@dataclass(frozen=True, slots=True)
class Want:
    """What is to be taken out of a bucket."""

    key: str
    rate: Rate
    calls: int = 1
    """At most; one that has some gives what it has."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What came out of buckets: something out of each of them, or nothing out of any."""

    calls: Sequence[int]
    empty: int | None = None
    """Place of the first that had nothing."""
    wait: timedelta = timedelta(0)
    """Until there is another call in that one."""


class Buckets:
    """Takes calls out of buckets."""

    def __init__(self, redis: Redis) -> None:
        self._take = redis.register_script(_TAKE)
        self._charge = redis.register_script(_CHARGE)

    async def take(self, *wants: Want) -> Taken:
        """Take calls out of some buckets in one trip. One that is full again is not kept.

        Raises:
            StoreUnavailable: Valkey does not answer.
        """
        args = [
            given
            for want in wants
            for given in (1_000_000 / want.rate.calls_per_second, want.rate.burst, want.calls)
        ]
        with out_of_reach():
            empty, wait, *calls = await self._take(keys=[want.key for want in wants], args=args)
        if empty:
            return Taken((), int(empty) - 1, timedelta(microseconds=int(wait)))
        return Taken([int(each) for each in calls])

    async def charge(self, key: str, rate: Rate, calls: int) -> None:
        """Take calls that were made already: who made more than there were waits for them.

        Raises:
            StoreUnavailable: Valkey does not answer.
        """
        interval = 1_000_000 / rate.calls_per_second
        with out_of_reach():
            await self._charge(keys=[key], args=[interval, rate.burst, calls])
