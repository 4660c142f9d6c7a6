"""How long things took in the last minutes, for who asks a process that no Prometheus watches."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

WINDOW_SECONDS: Final = 300.0
_EVERY_SECONDS: Final = 30.0
_NOT_CALLS: Final = ("Health/", "WorkerService/Work", "Watch")
"""What takes as long as somebody listens."""
_CALLS: Final = "kimberly_rpc_seconds_bucket"
_QUERIES: Final = "retrieval_latency_seconds_bucket"

Counts = Mapping[tuple[str, float], float]
"""How many observations lie below the upper end of a bucket, by what was observed and that end."""


class _Look(NamedTuple):
    at: float
    counts: Counts


class Lately(Collector):
    """What calls and queries took in the last five minutes, or since the process began.

    It remembers what the histograms held: a few sums every half minute. To observe costs no more
    than it did.
    """

    def __init__(
        self,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to remember.

        Args:
            registry: Has the histograms; those that it has not yet are empty.
            clock: Tells seconds since whenever.
        """
        self._histograms = registry.restricted_registry([_CALLS, _QUERIES])
        self._clock = clock
        kept = math.ceil(WINDOW_SECONDS / _EVERY_SECONDS) + 1
        self._looks = deque([_Look(clock(), {})], kept)

    def look(self) -> None:
        """Remember what the histograms hold, if it is time to. To be called every second or so."""
        now = self._clock()
        if now >= self._looks[-1].at + _EVERY_SECONDS:
            self._looks.append(_Look(now, self._counts()))

    def collect(self) -> Iterator[Metric]:
        """Yield one histogram of what came since, and since when that is."""
        then, before = self._looks[0]
        family = HistogramMetricFamily(
            "kimberly_lately_seconds", "Time that calls and queries took lately.", labels=["of"]
        )
        counts = self._counts()
        for what in dict.fromkeys(what for what, _ in counts):
            buckets = [
                ("+Inf" if math.isinf(end) else str(end), count - before.get((what, end), 0.0))
                for (of, end), count in sorted(counts.items())
                if of == what
            ]
            family.add_metric([what], buckets, None)
        yield family
        yield GaugeMetricFamily(
            "kimberly_lately_window_seconds", "How long that is.", self._clock() - then
        )

    def _counts(self) -> Counts:
        counts: dict[tuple[str, float], float] = {}
        for metric in self._histograms.collect():
            for sample in metric.samples:
                if what := _what(sample):
                    bucket = what, float(sample.labels["le"])
                    counts[bucket] = counts.get(bucket, 0.0) + sample.value
        return counts


def _what(sample: Sample) -> str | None:
    if sample.name == _QUERIES:
        return "queries" if sample.labels["leg"] == "total" else None
    is_call = not any(other in sample.labels["method"] for other in _NOT_CALLS)
    return "calls" if is_call else None
