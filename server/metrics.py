"""What every service measures, for Prometheus to ask for.

An instrument stands where its slice can see it: this module has those of all services, a slice's
`metrics.py` has its own. A process exports what it has imported, and so nothing of the others.
Ids of users, memories and jobs never become labels: they would make a time series each.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Final, NoReturn

import asyncpg
import structlog
from prometheus_client import Counter, Gauge, Histogram

from server.errors import StoreUnavailable

log = structlog.get_logger()

Reading = Callable[[], Awaitable[None]]
"""Reads gauges out of a store, and sets them."""

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Upper ends of the buckets of what takes as long as a call."""
LONG_SECONDS: Final = (0.01, 0.05, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
"""The same of what takes as long as a job."""

RPC_SECONDS: Final = Histogram(
    "kimberly_rpc_seconds",
    "Time that calls took, streams to their last message.",
    ["method", "code"],
    buckets=SECONDS,
)
RPCS_IN_FLIGHT: Final = Gauge("kimberly_rpcs_in_flight", "Calls that are being served.")
DATABASE_CONNECTIONS: Final = Gauge(
    "kimberly_database_connections", "Connections to PostgreSQL.", ["pool", "state"]
)
DATABASE_LIMIT: Final = Gauge(
    "kimberly_database_connections_limit", "Connections that there may be.", ["pool"]
)
ITEMS_CHANGED: Final = Counter(
    "memory_items_changed", "Changes of memories, as the audit log tells them.", ["change"]
)
RATE_LIMITED: Final = Counter(
    "rate_limited", "Calls refused because there were too many.", ["scope"]
)

_KNOWN: Final[dict[Gauge, set[tuple[str, ...]]]] = {}
"""The labels that gauges are set for."""
_CHANGES: Final[Mapping[str, str]] = {
    "memory.create": "created",
    "memory.see": "updated",
    "memory.update": "updated",
    "memory.protect": "updated",
    "memory.unprotect": "updated",
    "memory.feedback": "updated",
    "memory.promote": "promoted",
    "memory.archive": "archived",
    "memory.delete_later": "archived",
    "memory.restore": "restored",
    "memory.delete": "deleted",
}


def count_changes(action: str, number: int) -> None:
    """Count what an action of the audit log did to memories; any other counts as nothing."""
    if change := _CHANGES.get(action):
        ITEMS_CHANGED.labels(change).inc(number)


@cache
def rpc_seconds(method: str, code: str) -> Histogram:
    """Return what the time of a call is told to.

    Args:
        method: Full name, such as /kimberly.memory.v1.MemoryService/GetMemory.
        code: Name of the status.
    """
    service, _, name = method.removeprefix("/").rpartition("/")
    return RPC_SECONDS.labels(f"{service.rpartition('.')[2]}/{name}", code)


def watch_pool(name: str, pool: asyncpg.Pool) -> None:
    """Tell of the connections of a pool whenever somebody asks."""
    idle = DATABASE_CONNECTIONS.labels(name, "idle")
    idle.set_function(pool.get_idle_size)
    used = DATABASE_CONNECTIONS.labels(name, "used")
    used.set_function(lambda: pool.get_size() - pool.get_idle_size())
    DATABASE_LIMIT.labels(name).set(pool.get_max_size())


def set_all(gauge: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
    """Set a gauge for these labels, and to 0 for those that it had before."""
    expect(gauge, values)
    for labels in _KNOWN[gauge]:
        gauge.labels(*labels).set(values.get(labels, 0))


def expect(gauge: Gauge, labels: Iterable[tuple[str, ...]]) -> None:
    """Have a gauge be 0 for these labels, rather than unknown, while nothing is read for them."""
    _KNOWN.setdefault(gauge, set()).update(labels)


async def read_forever(readings: Sequence[Reading], every_seconds: float) -> NoReturn:
    """Read gauges again and again. What is out of reach keeps the value that it had."""
    while True:
        for read in readings:
            try:
                await read()
            except (StoreUnavailable, TimeoutError, asyncpg.PostgresError) as error:
                log.warning("metrics out of reach", error=repr(error))
        await asyncio.sleep(every_seconds)
