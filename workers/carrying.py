"""The channel of handlers: each call is part of the trace of the job that makes it."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import grpc

from server import tracing


def carrying_trace(channel: grpc.aio.Channel) -> grpc.aio.Channel:
    """Return a channel whose calls say which trace they belong to."""
    return cast("grpc.aio.Channel", _Carrying(channel))


class _Carrying:
    """A channel as stubs use it.

    No interceptor: grpc.aio's client side loses cancellations in them, and keeps the messages of
    streams until these end.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        return partial(_make, getattr(self._channel, kind))


def _make(make: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    return partial(_call, make(*args, **options))


def _call(call: Callable[..., Any], *args: Any, metadata: Any = (), **options: Any) -> Any:
    return call(*args, metadata=(*metadata, *tracing.carried()), **options)
