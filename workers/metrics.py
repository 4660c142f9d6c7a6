"""What a worker measures."""

import functools
from typing import Final

from prometheus_client import Counter, Histogram

JOBS: Final = Histogram(
    "worker_jobs_seconds",
    "Time that the handlers of jobs took.",
    ["kind", "outcome"],
    buckets=(0.01, 0.05, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0),
)
RECONNECTS: Final = Counter("worker_reconnects", "Streams to the queue that broke.")


@functools.cache
def seconds_of(kind: str, outcome: str) -> Histogram:
    """Return where the time of jobs is observed: looking a series up costs more than that."""
    return JOBS.labels(kind, outcome)
