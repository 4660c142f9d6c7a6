"""One adapter that puts the same layers around all four kinds of RPC."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from typing import Any, TypeAlias

import grpc

from server.errors import MalformedMessage

Layer = Callable[["Call"], AbstractAsyncContextManager[None]] | Callable[["Call"], Awaitable[None]]
"""What also looks after the call is an async context manager; a mere check is a coroutine."""
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
MaybeHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"

_MALFORMED = object()


class Call:
    """One call that is being served, as the layers see it."""

    __slots__ = ("context", "metadata", "method", "received_bytes", "streams")

    def __init__(self, method: str, context: Any, *, streams: bool) -> None:
        self.method = method
        """Full name, such as /kimberly.memory.v1.MemoryService/GetMemory."""
        self.context = context
        """grpc.aio.ServicerContext of the call."""
        self.streams = streams
        """Whether either side sends more than one message."""
        self.received_bytes = 0
        """Size of the requests that have come."""
        self.metadata: dict[str, str | bytes] = dict(context.invocation_metadata() or ())


class Around(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """Runs every RPC inside a list of layers, the first outermost.

    Streams stay inside their layers until the last message: nothing that holds for unary calls is
    forgotten for them.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple((layer, inspect.iscoroutinefunction(layer)) for layer in layers)
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(  # type: ignore[override] # None says: no such method
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[MaybeHandler]],
        details: grpc.HandlerCallDetails,
    ) -> MaybeHandler:
        """Return the method's handler with the layers around it."""
        method = details.method
        if method not in self._wrapped:
            handler = await continuation(details)
            if handler is None:
                return None
            self._wrapped[method] = _wrap(handler, method, self._enter)
        return self._wrapped[method]

    async def _enter(self, stack: AsyncExitStack, call: Call) -> None:
        for layer, is_check in self._layers:
            # Two kinds of callable: the flag tells mypy nothing.
            entered: Any = layer(call)
            await (entered if is_check else stack.enter_async_context(entered))


Enter = Callable[[AsyncExitStack, Call], Awaitable[None]]


def _wrap(handler: Handler, method: str, enter: Enter) -> Handler:
    codec = {
        "request_deserializer": _guarded(handler.request_deserializer),
        "response_serializer": handler.response_serializer,
    }
    if handler.unary_unary:
        unary = _answers_once(handler.unary_unary, method, enter, streams=False)
        return grpc.unary_unary_rpc_method_handler(unary, **codec)
    if handler.stream_unary:
        unary = _answers_once(handler.stream_unary, method, enter, streams=True)
        return grpc.stream_unary_rpc_method_handler(unary, **codec)
    if handler.unary_stream:
        stream = _answers_often(handler.unary_stream, method, enter)
        return grpc.unary_stream_rpc_method_handler(stream, **codec)
    stream = _answers_often(handler.stream_stream, method, enter)
    return grpc.stream_stream_rpc_method_handler(stream, **codec)


def _answers_once(behavior: Any, method: str, enter: Enter, *, streams: bool) -> Any:
    async def serve(request: Any, context: Any) -> Any:
        async with AsyncExitStack() as stack:
            call = Call(method, context, streams=streams)
            await enter(stack, call)
            return await behavior(_well_formed(request, call), context)

    return serve


def _answers_often(behavior: Any, method: str, enter: Enter) -> Any:
    async def serve(request: Any, context: Any) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            call = Call(method, context, streams=True)
            await enter(stack, call)
            responses = await stack.enter_async_context(
                aclosing(behavior(_well_formed(request, call), context))
            )
            async for response in responses:
                yield response

    return serve


def _guarded(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Keep undecodable bytes from reaching grpc.aio, which answers UNKNOWN with Python's text."""
    if deserialize is None:
        return None

    def attempt(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:  # noqa: BLE001 - whatever the parser raises, the bytes are at fault
            return _MALFORMED

    return attempt


def _well_formed(request: Any, call: Call) -> Any:
    """Return the request, or an iterator over it that stops at the first malformed message."""
    if request is _MALFORMED:
        raise MalformedMessage
    if hasattr(request, "__aiter__"):
        return _each_well_formed(request, call)
    call.received_bytes = request.ByteSize()
    return request


async def _each_well_formed(requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _MALFORMED:
            raise MalformedMessage
        call.received_bytes += request.ByteSize()
        yield request
