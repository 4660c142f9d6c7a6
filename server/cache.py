"""Redis: connections, and its failures in our words."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import structlog
from opentelemetry.trace import SpanKind
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from server import tracing
from server.caller import Caller
from server.errors import StoreUnavailable

log = structlog.get_logger()

KEY_PREFIX = "mesh:"
"""The role of the services may touch no other keys."""

_PATIENCE_SECONDS = 2.0


def prefix_of(caller: Caller) -> str:
    """Return what all keys of a user begin with, and nobody else's."""
    return f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:"


class _TracedPipeline(Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - as it is there
        with _span("pipeline"):
            return await super().execute(raise_on_error)


class _TracedRedis(Redis):
    """Notes in traces which command was sent: neither keys nor values."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _span(str(args[0])):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # theirs

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: FBT001, FBT002 - as it is there
        return _TracedPipeline(
            self.connection_pool, self.response_callbacks, transaction, shard_hint
        )


def _span(command: str) -> AbstractContextManager[object]:
    return tracing.span(f"redis {command}", {"db.system": "redis"}, kind=SpanKind.CLIENT)


def open_cache(url: str) -> Redis:
    """Return a client with a bounded pool. It connects when it is first used.

    Whoever finds all connections in use waits for one, as long as for an answer.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        decode_responses=False,
        max_connections=32,
        timeout=_PATIENCE_SECONDS,
        socket_timeout=_PATIENCE_SECONDS,
        socket_connect_timeout=1.0,
        health_check_interval=30,
    )
    return (_TracedRedis if tracing.has_begun() else Redis).from_pool(pool)


@contextmanager
def out_of_reach() -> Iterator[None]:
    """Turn failures of Redis into StoreUnavailable; wrong use of it stays what it is."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError) as error:
        log.warning("redis out of reach", error=repr(error))
        raise StoreUnavailable("the short-term store") from error


__all__ = ["KEY_PREFIX", "Redis", "RedisError", "open_cache", "out_of_reach", "prefix_of"]
