"""Where a mesh under test sends its traces: an OTLP collector that keeps them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True, slots=True)
class Seen:
    """A span as it came."""

    trace: bytes
    id: bytes
    parent: bytes
    """Empty: it begins its trace."""
    service: str
    name: str
    attributes: Mapping[str, str]
    text: str = field(repr=False)
    """All that it holds, however it holds it."""
    began: int
    ended: int
    """Nanoseconds since 1970, by the clock of who sent it."""
    links: frozenset[tuple[bytes, bytes]]
    """Trace and span of what it is linked to."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.ended - self.began) / 1e9


class Receiver(rpc.TraceServiceServicer):
    """Keeps every span that comes."""

    def __init__(self) -> None:
        self._spans: list[Seen] = []
        self._lock = threading.Lock()
        self.port = 0

    @property
    def endpoint(self) -> str:
        """What processes are told of it."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[Seen]:
        """What has come so far."""
        with self._lock:
            return list(self._spans)

    def traces(self) -> dict[bytes, list[Seen]]:
        """Return the spans by their trace."""
        found: dict[bytes, list[Seen]] = {}
        for span in self.spans:
            found.setdefault(span.trace, []).append(span)
        return found

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: Any
    ) -> pb.ExportTraceServiceResponse:
        came = [
            _seen(span, _values(resource.resource.attributes).get("service.name", ""))
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += came
        return pb.ExportTraceServiceResponse()


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Receive on a port of the loopback interface until the context ends."""
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call] # theirs
    receiver.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver
    finally:
        server.stop(None).wait()


def _seen(span: trace_pb2.Span, service: str) -> Seen:
    return Seen(
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        service,
        span.name,
        _values(span.attributes),
        str(span),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        frozenset((link.trace_id, link.span_id) for link in span.links),
    )


def _values(attributes: Iterator[KeyValue] | Any) -> dict[str, str]:
    return {each.key: str(each.value.string_value or each.value.int_value) for each in attributes}
