"""Buckets of calls in Valkey: one for all processes, and for both transports.

Whoever restarts fills none.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from server.cache import Redis, out_of_reach

# The generic cell rate algorithm (ITU-T I.371): one instant says how full the bucket is. The time
# is Valkey's own, so that processes need not agree on it.
_TAKE: Final = """
local interval, burst, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local full = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local room = math.floor(burst - (full - now) / interval)
if room < 1 then return {0, math.ceil(full - now - (burst - 1) * interval)} end
local taken = math.min(room, wanted)
full = full + taken * interval
redis.call('SET', KEYS[1], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000))
return {taken, 0}
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
class Taken:
    """What came out of a bucket."""

    calls: int
    wait: timedelta
    """Until there is another call in the bucket, if there was none."""


class Buckets:
    """Takes calls out of buckets."""

    def __init__(self, redis: Redis) -> None:
        self._take = redis.register_script(_TAKE)
        self._charge = redis.register_script(_CHARGE)

    async def take(self, key: str, rate: Rate, wanted: int = 1) -> Taken:
        """Take up to `wanted` calls. A bucket that is full again is not kept.

        Raises:
            StoreUnavailable: Valkey does not answer.
        """
        interval = 1_000_000 / rate.calls_per_second
        with out_of_reach():
            calls, wait = await self._take(keys=[key], args=[interval, rate.burst, wanted])
        return Taken(int(calls), timedelta(microseconds=int(wait)))

    async def charge(self, key: str, rate: Rate, calls: int) -> None:
        """Take calls that were made already: who made more than there were waits for them.

        Raises:
            StoreUnavailable: Valkey does not answer.
        """
        interval = 1_000_000 / rate.calls_per_second
        with out_of_reach():
            await self._charge(keys=[key], args=[interval, rate.burst, calls])
