"""Traces: what one call led to, from the edge to the worker that finishes its job.

The edge decides which calls are traced, and everybody after it follows; a job goes on with the
trace of the call that asked for it, and one that nobody asked for begins its own. Spans hold names
and ids. They hold no text: not what is stored, not what is asked, and not what an error says.

While nothing is traced, this costs a look at the current span.
"""

import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Final

from opentelemetry import context, trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Attributes = Mapping[str, str | int | bool]

TRACEPARENT: Final = "traceparent"
"""The header that W3C Trace Context names, and its only one that we pass on."""

ENDPOINT: Final = r"^(http://[\w.-]+:\d+)?$"
"""A collector within the machine's or the cluster's own network: no TLS is spoken to it."""

_TRACEPARENT_LENGTH: Final = 55
_MOST_LINKS: Final = 128
"""Of a span, more of which the library drops."""
_EXPORT_SECONDS: Final = 2.0
_EXPORT_EVERY_MILLISECONDS: Final = 1000
_FORMAT: Final = TraceContextTextMapPropagator()
_tracer: Final = trace.get_tracer("kimberly")


def begin(service: str, endpoint: str, ratio: float) -> None:
    """Send the spans of this process to a collector from now on.

    Args:
        service: The name of the process.
        endpoint: Where the collector takes OTLP over gRPC, such as http://localhost:4317.
        ratio: Of what begins here rather than at the edge, how much is traced; 0 to 1.
    """
    # Half of the memory that a small process needs, and only for those whose spans go anywhere.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    from server.sampling import LinkedFirst

    provider = TracerProvider(
        resource=Resource.create({"service.name": service}),
        sampler=ParentBased(LinkedFirst(TraceIdRatioBased(ratio))),
    )
    exporter = OTLPSpanExporter(
        endpoint, insecure=endpoint.startswith("http://"), timeout=_EXPORT_SECONDS
    )
    provider.add_span_processor(
        BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_EVERY_MILLISECONDS)
    )
    trace.set_tracer_provider(provider)
    has_begun.cache_clear()


@functools.cache
def has_begun() -> bool:
    """Tell whether this process sends its spans anywhere. Every job asks: it is kept."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def is_kept(parent: str) -> bool:
    """Tell whether a traceparent names a trace that is kept: its last bit says so."""
    return len(parent) == _TRACEPARENT_LENGTH and parent[-1] in "13579bdf"


def is_traced() -> bool:
    """Tell whether what runs is part of a trace that is kept."""
    return trace.get_current_span().get_span_context().trace_flags.sampled


def traceparent() -> str | None:
    """Return what makes somebody else's work a part of this trace; None: it is not kept."""
    if not is_traced():
        return None
    carrier: dict[str, str] = {}
    _FORMAT.inject(carrier)
    return carrier[TRACEPARENT]


def carried() -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call that goes on with this trace."""
    parent = traceparent()
    return ((TRACEPARENT, parent),) if parent else ()


def span(
    name: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL
) -> AbstractContextManager[object]:
    """Note how long something takes, if it is part of a trace."""
    if not is_traced():
        return nullcontext()
    return _current(_tracer.start_span(name, kind=kind, attributes=dict(attributes or {})))


def continued(
    name: str, parent: str, attributes: Attributes, *, kind: SpanKind
) -> AbstractContextManager[object]:
    """Go on with the trace that a traceparent names; without one, perhaps begin another."""
    if not parent and not has_begun():
        return nullcontext()
    whole = _FORMAT.extract({TRACEPARENT: parent}, context.Context())
    return _current(_tracer.start_span(name, whole, kind, dict(attributes)))


def opened(name: str, parent: str, attributes: Attributes) -> None:
    """Go on with a trace in a stream: the span is that of its opening, and ends here.

    What follows in the stream is the span's child. A span as long as a stream would come hours
    after its children, or never.
    """
    whole = _FORMAT.extract({TRACEPARENT: parent}, context.Context())
    opening = _tracer.start_span(name, whole, SpanKind.SERVER, dict(attributes))
    opening.end()
    # Never detached: whoever serves a call does so in a task of its own.
    context.attach(trace.set_span_in_context(opening))


def began(name: str, attributes: Attributes) -> str:
    """Perhaps begin the trace of a stream that nobody else traces, and say which it is.

    The span is that of its opening, and ends here. What the stream carries is no child of it,
    which would come for hours: batches are linked to it.

    Returns:
        Its traceparent; "" if it is not kept.
    """
    if not has_begun():
        return ""
    opening = _tracer.start_span(name, context.Context(), SpanKind.SERVER, dict(attributes))
    opening.end()
    if not opening.get_span_context().trace_flags.sampled:
        return ""
    carrier: dict[str, str] = {}
    _FORMAT.inject(carrier, trace.set_span_in_context(opening, context.Context()))
    return carrier[TRACEPARENT]


def batch_has_been(
    name: str, seconds: float, parents: Iterable[str], attributes: Attributes
) -> None:
    """Note a batch that just ended, which is part of several traces and a child of none.

    Its span begins a trace of its own, with links to the others. Where none of these is kept,
    neither is it.

    Args:
        name: What was done.
        seconds: How long it took.
        parents: A traceparent of each trace; "" for what has none. The same may come again.
        attributes: What the span holds.
    """
    kept = dict.fromkeys(filter(is_kept, parents))
    if not kept or not has_begun():
        return
    now = time.time_ns()
    past = _tracer.start_span(
        name,
        context.Context(),
        links=[_link(parent) for parent in islice(kept, _MOST_LINKS)],
        attributes=dict(attributes),
        start_time=now - int(seconds * 1e9),
    )
    past.end(now)


def _link(parent: str) -> Link:
    whole = _FORMAT.extract({TRACEPARENT: parent}, context.Context())
    return Link(trace.get_current_span(whole).get_span_context())


def has_been(name: str, seconds: float, attributes: Attributes, *, error: str = "") -> None:
    """Note, if it is part of a trace, what just ended and how long it took."""
    if not is_traced():
        return
    now = time.time_ns()
    past = _tracer.start_span(
        name,
        kind=SpanKind.CLIENT,
        attributes=dict(attributes),
        start_time=now - int(seconds * 1e9),
    )
    if error:
        past.set_status(Status(StatusCode.ERROR, error))
    past.end(now)


@contextmanager
def _current(started: Span) -> Iterator[Span]:
    # Not what the library records of an error: its message may hold what a user said.
    with trace.use_span(
        started, end_on_exit=True, record_exception=False, set_status_on_exception=False
    ):
        try:
            yield started
        except BaseException as error:
            started.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
