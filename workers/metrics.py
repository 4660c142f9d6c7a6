"""What a worker measures."""

from collections.abc import Collection
from typing import Final

from prometheus_client import Counter

from server.histograms import BatchHistogram

JOBS: Final = BatchHistogram(
    "worker_jobs_seconds",
    "Time that the handlers of jobs took.",
    ["kind", "outcome"],
    buckets=(0.01, 0.05, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0),
)
RECONNECTS: Final = Counter("worker_reconnects", "Streams to the queue that broke.")


def observe_jobs(kind: str, outcome: str, seconds: Collection[float]) -> None:
    """Observe how long the handlers of jobs took that ended in the same way."""
    JOBS.labels(kind, outcome).observe_all(seconds)
