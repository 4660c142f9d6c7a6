"""Named crash points around everything that a process asks its stores to change.

Nothing in the server knows of them: they sit in the drivers of the stores, where a process really
dies and answers really get lost. `watch_stores` puts them there.
"""

from __future__ import annotations

import enum
import errno
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import asyncpg
import redis.asyncio
import redis.exceptions
import urllib3
from urllib3.connection import HTTPConnection

from server import cache

COMMIT: Final = "commit"

OF_QUEUE: Final = ("lease", "extend", "settle", "release")
"""What answers a worker, and as crash points are named."""

_READING: Final = {
    *("GET", "MGET", "EXISTS", "PTTL", "PEXPIRETIME", "HGET", "HMGET", "HGETALL", "ZCARD"),
    *("ZRANGE", "ZRANGEBYSCORE", "SCAN", "PING", "SCRIPT LOAD"),
}


class Kind(enum.StrEnum):
    """What happens at a crash point."""

    KILLED_BEFORE = "killed before"
    KILLED_AFTER = "killed after"
    REFUSED = "refused"
    """The store does nothing and does not answer."""
    UNANSWERED = "unanswered"
    """The store does it and does not answer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens, and when."""

    kind: Kind
    point: str
    number: int
    """At which pass of the point: 1 is the first."""
    times: int = 1
    """At so many passes in a row. Some drivers ask again by themselves."""

    def __str__(self) -> str:
        often = f" {self.times} times" if self.times > 1 else ""
        return f"{self.kind} {self.point} {self.number}{often}"


class Points:
    """Counts how often each point was passed, and lets the fault happen that is due."""

    def __init__(self) -> None:
        self.passes: Counter[str] = Counter()
        self.happened = 0
        self._fault: Fault | None = None

    def arm(self, fault: Fault | None) -> None:
        """Count from 0 again, and let this fault happen from now on."""
        self.passes.clear()
        self.happened = 0
        self._fault = fault

    def is_refused(self, point: str) -> bool:
        """Pass the near side of a point, and tell whether nothing is to be done behind it."""
        self.passes[point] += 1
        if self._is_due(point, Kind.KILLED_BEFORE):
            _die()
        return self._is_due(point, Kind.REFUSED)

    def is_unanswered(self, point: str) -> bool:
        """Pass the far side of a point, and tell whether the answer is lost."""
        if self._is_due(point, Kind.KILLED_AFTER):
            _die()
        return self._is_due(point, Kind.UNANSWERED)

    def _is_due(self, point: str, kind: Kind) -> bool:
        fault = self._fault
        if fault is None or (fault.point, fault.kind) != (point, kind):
            return False
        is_due = 0 <= self.passes[point] - fault.number < fault.times
        self.happened += is_due
        return is_due


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


POINTS: Final = Points()


def watch_stores() -> None:
    """Put crash points around every commit, every write to Redis and every write to S3."""
    asyncpg.create_pool = _create_pool
    cache.Redis = _Redis  # type: ignore[misc]
    urllib3.HTTPConnectionPool.ConnectionCls = _Connection


_answering: ContextVar[str] = ContextVar("answering", default="")
"""What of the queue a worker waits for, in the task that does it."""


def watch_queue(queue: type) -> None:
    """Put crash points around what the queue commits before it answers a worker.

    It does so as the system role, as its loops do: only who asks tells one from the other.
    """
    for name in OF_QUEUE:
        setattr(queue, name, _named(name, getattr(queue, name)))


def _named(name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def answering(*args: Any, **options: Any) -> Any:
        token = _answering.set(name)
        try:
            return await method(*args, **options)
        finally:
            _answering.reset(token)

    return answering


async def _create_pool(url: str, **options: Any) -> asyncpg.Pool:
    """Open a pool. What loops do as the system role is no answer to a call: it is not counted."""
    is_system = options["server_settings"]["application_name"].endswith("-system")
    options["connection_class"] = _SystemSession if is_system else _Session
    return await asyncpg.pool.create_pool(url, **options)


class _Session(asyncpg.Connection):  # type: ignore[misc] # it is untyped
    """A connection to PostgreSQL whose commits are crash points."""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109 - its signature
        point = self._point() if query == "COMMIT" else ""
        return str(await self._pass(point, super().execute(query, *args, timeout=timeout)))

    async def fetch(self, query: str, *args: Any, **options: Any) -> list[asyncpg.Record]:
        """Run a query; one that writes outside of a transaction commits as it ends."""
        commits = not self.is_in_transaction() and self._writes(query)
        point = self._point() if commits else ""
        rows: list[asyncpg.Record] = await self._pass(point, super().fetch(query, *args, **options))
        return rows

    def _point(self) -> str:
        return COMMIT

    def _writes(self, query: str) -> bool:
        return "INSERT INTO" in query

    async def _pass(self, point: str, commit: Coroutine[Any, Any, Any]) -> Any:
        if point and POINTS.is_refused(point):
            commit.close()
            raise self._cut_off()
        answer = await commit
        if point and POINTS.is_unanswered(point):
            raise self._cut_off()
        return answer

    def _cut_off(self) -> Exception:
        self.terminate()
        error: Exception = asyncpg.ConnectionDoesNotExistError("closed in the middle")
        return error


class _SystemSession(_Session):
    """A connection as the system role; crash points are only what answers a worker."""

    def _point(self) -> str:
        return _answering.get()

    def _writes(self, query: str) -> bool:
        return True


class _Redis(redis.asyncio.Redis):
    """A client of Redis whose writes are crash points."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        command = str(args[0])
        execute: Any = super().execute_command
        if command in _READING:
            return await execute(*args, **options)
        point = "script" if command in {"EVALSHA", "EVAL"} else f"redis {command}"
        if POINTS.is_refused(point):
            raise redis.exceptions.ConnectionError("connection refused")
        answer = await execute(*args, **options)
        if POINTS.is_unanswered(point):
            raise redis.exceptions.TimeoutError("timed out")
        return answer


class _Connection(HTTPConnection):
    """A connection to S3 whose writes are crash points. urllib3 itself asks some again."""

    _point = ""

    def request(self, method: str, url: str, *args: Any, **options: Any) -> None:
        self._point = point_of(method, url)
        if self._point and POINTS.is_refused(self._point):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")
        super().request(method, url, *args, **options)

    def getresponse(self) -> Any:
        response = super().getresponse()
        if self._point and POINTS.is_unanswered(self._point):
            raise TimeoutError("timed out")
        return response


def point_of(method: str, url: str) -> str:
    """Return the name of what an S3 request changes; empty if it changes no object."""
    query = parse_qs(urlsplit(url).query, keep_blank_values=True)
    if method == "POST":
        return "s3 begin" if "uploads" in query else "s3 assemble"
    if method == "DELETE":
        return "s3 abort" if "uploadId" in query else "s3 delete"
    return "s3 put" if method == "PUT" and "versioning" not in query else ""
