"""Redis: connections, and its failures in our words."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from server.caller import Caller
from server.errors import StoreUnavailable

log = structlog.get_logger()

KEY_PREFIX = "mesh:"
"""The role of the services may touch no other keys."""

_PATIENCE_SECONDS = 2.0


def prefix_of(caller: Caller) -> str:
    """Return what all keys of a user begin with, and nobody else's."""
    return f"{KEY_PREFIX}{caller.tenant_id.hex}:{caller.user_id.hex}:"


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
    return Redis.from_pool(pool)


@contextmanager
def out_of_reach() -> Iterator[None]:
    """Turn failures of Redis into StoreUnavailable; wrong use of it stays what it is."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError) as error:
        log.warning("redis out of reach", error=repr(error))
        raise StoreUnavailable("the short-term store") from error


__all__ = ["KEY_PREFIX", "Redis", "RedisError", "open_cache", "out_of_reach", "prefix_of"]
