"""Logs as JSON lines, and metrics for Prometheus. Traces are in server/tracing.py."""

import logging
import os
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from opentelemetry import trace
from prometheus_client import MetricsHandler
from structlog.typing import EventDict, WrappedLogger

from server.lately import Lately


def configure(service: str, log_level: str) -> None:
    """Set up the logs of this process: one event a line, on standard error."""
    level = logging.getLevelNamesMapping()[log_level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _add_trace,
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


def _add_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Say which trace a line belongs to, if it belongs to one that is kept."""
    current = trace.get_current_span().get_span_context()
    if current.trace_flags.sampled:
        event["trace_id"] = trace.format_trace_id(current.trace_id)
        event["span_id"] = trace.format_span_id(current.span_id)
    return event


def _adopt_libraries(level: int) -> None:
    """Have what libraries log through the standard library come out as our lines do."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.contextvars.merge_contextvars,
                _add_trace,
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
    """Answers GET with all that this process measures, `?lately` with what it took lately."""

    daemon_threads = True

    def __init__(self, socket: Path) -> None:
        self.lately = Lately()
        super().__init__(os.fspath(socket), _Answer)

    def service_actions(self) -> None:
        # What serves calls this again and again, between requests too.
        self.lately.look()


class _Answer(MetricsHandler):
    """Answers one request."""

    server: _Exposition

    def do_GET(self) -> None:
        if urlsplit(self.path).query == "lately":
            self.registry = self.server.lately
        super().do_GET()


@contextmanager
def exposed(socket: Path | None) -> Iterator[None]:
    """Serve what is measured on a Unix socket, which only the sidecar may reach; None: nowhere.

    On a thread of its own: the text takes milliseconds to write, in which calls go on.
    """
    if socket is None:
        yield
        return
    socket.unlink(missing_ok=True)
    with _Exposition(socket) as server:
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
