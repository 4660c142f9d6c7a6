"""Logs as JSON lines, metrics for Prometheus, traces by OpenTelemetry."""

import logging
import os
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import MetricsHandler

_OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def configure(service: str, log_level: str) -> None:
    """Set up the logs of this process: one event a line, on standard error."""
    level = logging.getLevelNamesMapping()[log_level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    _adopt_libraries(level)


def _adopt_libraries(level: int) -> None:
    """Have what libraries log through the standard library come out as our lines do."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ]
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


class _Exposition(socketserver.ThreadingUnixStreamServer):
    """Answers GET with all that this process measures."""

    daemon_threads = True


@contextmanager
def exposed(socket: Path | None) -> Iterator[None]:
    """Serve what is measured on a Unix socket, which only the sidecar may reach; None: nowhere.

    On a thread of its own: the text takes milliseconds to write, in which calls go on.
    """
    if socket is None:
        yield
        return
    socket.unlink(missing_ok=True)
    with _Exposition(os.fspath(socket), MetricsHandler) as server:
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def server_interceptors(service: str) -> list[Any]:
    """Return the interceptors that trace calls: none unless an OTLP endpoint is configured.

    Tracing costs a call tens of microseconds; who looks at traces names where they go.
    """
    if not os.environ.get(_OTLP_ENDPOINT):
        return []
    from opentelemetry.instrumentation.grpc import aio_server_interceptor

    interceptor: Any = aio_server_interceptor  # untyped
    return [interceptor(tracer_provider=_tracer_provider(service))]


def _tracer_provider(service: str) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
