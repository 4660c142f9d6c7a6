"""What the jobs slice measures."""

from collections import Counter as Counts
from collections.abc import Iterable
from typing import Final

from prometheus_client import Counter, Gauge

from server import metrics
from server.database import SystemDatabase
from server.histograms import BatchHistogram
from server.metrics import LONG_SECONDS, set_all

_MOST_COUNTED: Final = 100_000

WAITING: Final = Gauge(
    "jobs_waiting", "Jobs that are due and not begun, at most 100000 of a kind.", ["kind"]
)
OLDEST: Final = Gauge(
    "jobs_oldest_waiting_seconds", "For how long the oldest of them has been due.", ["kind"]
)
RUNNING: Final = Gauge("jobs_running", "Jobs that a worker holds.", ["kind"])
DEAD: Final = Gauge("jobs_dead", "Jobs that were given up and are still kept.", ["kind"])
FINISHED: Final = Counter("jobs_finished", "Attempts that ended.", ["kind", "outcome"])
START_DELAY: Final = BatchHistogram(
    "jobs_start_delay_seconds",
    "Time from when jobs were due until a worker had them.",
    ["kind"],
    buckets=LONG_SECONDS,
)
DURATION: Final = BatchHistogram(
    "job_seconds",
    "Time from when jobs were due until they succeeded.",
    ["kind"],
    buckets=LONG_SECONDS,
)
WORKERS: Final = Gauge("workers_connected", "Workers whose streams are open here.")
FAILURES: Final = Counter("worker_failures", "Workers that let a job down.", ["reason"])


def count_finished(attempts: Iterable[tuple[str, str]]) -> None:
    """Count attempts that ended together, each by kind and outcome."""
    for labels, number in Counts(attempts).items():
        FINISHED.labels(*labels).inc(number)


def observe_delays(delays: Iterable[tuple[str, float]]) -> None:
    """Observe after how many seconds jobs began that were leased together, each by its kind."""
    by_kind: dict[str, list[float]] = {}
    for kind, seconds in delays:
        by_kind.setdefault(kind, []).append(seconds)
    for kind, all_seconds in by_kind.items():
        START_DELAY.labels(kind).observe_all(all_seconds)


def expect(kinds: Iterable[str]) -> None:
    """Tell of kinds of jobs even while there are none: workers would take them."""
    for gauge in (WAITING, OLDEST, RUNNING, DEAD):
        metrics.expect(gauge, {(kind,) for kind in kinds})


class JobReadings:
    """Reads gauges out of the queue, from indexes as small as the work that is left."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def waiting(self) -> None:
        """Count what waits, and for how long. Of a kind with many the first are looked at."""
        rows = await self._database.fetch_alone(
            """
            WITH RECURSIVE kinds AS (
                (SELECT kind FROM jobs WHERE state = 'waiting' AND due ORDER BY kind LIMIT 1)
                 UNION ALL
                SELECT (SELECT kind
                          FROM jobs
                         WHERE state = 'waiting' AND due AND jobs.kind > kinds.kind
                         ORDER BY kind
                         LIMIT 1)
                  FROM kinds
                 WHERE kind IS NOT NULL
            )
            SELECT kind, waiting.jobs, waiting.seconds
              FROM kinds
             CROSS JOIN LATERAL (
                   SELECT count(*) AS jobs,
                          greatest(extract(epoch FROM now() - min(run_at)), 0)::float8 AS seconds
                     FROM (SELECT run_at
                             FROM jobs
                            WHERE state = 'waiting' AND due AND jobs.kind = kinds.kind
                            LIMIT $1) AS first
                   ) AS waiting
             WHERE waiting.jobs > 0
            """,
            _MOST_COUNTED,
        )
        set_all(WAITING, {(row["kind"],): row["jobs"] for row in rows})
        set_all(OLDEST, {(row["kind"],): row["seconds"] for row in rows})

    async def standing(self) -> None:
        """Count what runs and what was given up."""
        rows = await self._database.fetch_alone(
            """
            SELECT kind, count(*) AS jobs, true AS runs
              FROM jobs
             WHERE state = 'running'
             GROUP BY kind
             UNION ALL
            SELECT kind, count(*) AS jobs, false AS runs
              FROM jobs
             WHERE state = 'dead'
             GROUP BY kind
            """
        )
        set_all(RUNNING, {(row["kind"],): row["jobs"] for row in rows if row["runs"]})
        set_all(DEAD, {(row["kind"],): row["jobs"] for row in rows if not row["runs"]})
