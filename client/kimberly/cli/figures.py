"""What a mesh measures, summed up for people: the queue, meditation, quotas, latencies.

It is had from the processes themselves where they can be reached, as on one machine, or from the
Prometheus that asks them.
"""

import json
import math
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_ANSWER_SECONDS: Final = 2.0
_TIMED: Final = {
    "calls": 'kimberly_rpc_seconds_bucket{method!~"Health/.*|WorkerService/Work|.*Watch.*"}',
    "queries": 'retrieval_latency_seconds_bucket{leg="total"}',
}
"""What has a latency, as Prometheus selects it."""
_NOT_CALLS: Final = ("Health/", "WorkerService/Work", "Watch")
_SUMMED_UP: Final = (
    "jobs_.*|workers_connected|memory_items|memory_quota_.*|memory_meditation_.*"
    "|kimberly_rpc_seconds_bucket|retrieval_latency_seconds_bucket"
)
"""The metrics that are read here, as an expression."""
_OF_THE_ASKED: Final = frozenset({"instance", "job", "path"})
"""Labels that say who told, not what."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What all processes measure."""

    samples: Sequence[Sample]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of what each process has of its own, where its labels are these."""
        return sum(sample.value for sample in self._of(name, labels))

    def known(self, name: str, **labels: str) -> float:
        """Return the sum of what every replica reads from the database: each tells all of it."""
        greatest: defaultdict[frozenset[tuple[str, str]], float] = defaultdict(float)
        for sample in self._of(name, labels):
            what = frozenset(each for each in sample.labels.items() if each[0] not in _OF_THE_ASKED)
            greatest[what] = max(greatest[what], sample.value)
        return sum(greatest.values())

    def greatest(self, name: str, **labels: str) -> float:
        """Return the greatest value of a metric, where its labels are these; 0 if there is none."""
        return max((sample.value for sample in self._of(name, labels)), default=0.0)

    def buckets(self, name: str, **labels: str) -> list[tuple[float, float]]:
        """Return the buckets of a histogram: upper ends, and how many lie below each."""
        counts: defaultdict[float, float] = defaultdict(float)
        for sample in self._of(f"{name}_bucket", labels):
            if not any(other in sample.labels.get("method", "") for other in _NOT_CALLS):
                counts[float(sample.labels["le"])] += sample.value
        return sorted(counts.items())

    def _of(self, name: str, labels: Mapping[str, str]) -> Iterator[Sample]:
        for sample in self.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample


def told_by_processes(urls: Iterable[str]) -> Figures:
    """Return what processes measure now; of one that does not answer, nothing.

    Args:
        urls: Where they tell it, as Prometheus asks for it.
    """
    samples: list[Sample] = []
    for url in urls:
        for family in text_string_to_metric_families(_get(url) or ""):
            samples += family.samples
    return Figures(samples)


def told_by_prometheus(url: str) -> Figures:
    """Return what a Prometheus heard last; nothing if it does not answer."""
    found = _asked(url, f'{{__name__=~"{_SUMMED_UP}"}}')
    return Figures(
        [
            Sample(each["metric"].pop("__name__"), each["metric"], float(each["value"][1]))
            for each in found
        ]
    )


def quantile(part: float, buckets: Sequence[tuple[float, float]]) -> float | None:
    """Return below which value a part of the observations lies, 0 to 1; None: there are none.

    As Prometheus has it: within a bucket they lie evenly, and none above the last end.
    """
    if not buckets or not buckets[-1][1]:
        return None
    wanted = part * buckets[-1][1]
    low, below = 0.0, 0.0
    for end, count in buckets:
        if count >= wanted:
            if math.isinf(end):
                return low
            return low + (end - low) * (wanted - below) / ((count - below) or 1.0)
        low, below = end, count
    return low


def summed_up(figures: Figures, prometheus: str | None, *, now: float) -> dict[str, str]:
    """Return what is worth a look, by what it is about.

    Args:
        figures: What the processes measure.
        prometheus: The URL of the one that remembers the last minutes, if there is one.
        now: Seconds since 1970.
    """
    if not figures.samples:
        return {"mesh": "nothing that it measures could be read"}
    return {
        "queue": _queue(figures),
        "meditation": _meditation(figures, now),
        "memories": _memories(figures),
        "quota": _quota(figures),
        **{title: _latency(prometheus, figures, title) for title in _TIMED},
    }


def ago(then: float | None, now: float) -> str:
    """Return how long ago something was, such as 4 s, 12 min or 3 h; "" if it never was."""
    if then is None:
        return ""
    seconds = int(now - then)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _queue(figures: Figures) -> str:
    oldest = figures.greatest("jobs_oldest_waiting_seconds")
    return (
        f"{figures.known('jobs_waiting'):.0f} waiting"
        + (f" for up to {oldest:.0f} s" if oldest else "")
        + f", {figures.known('jobs_running'):.0f} running, {figures.known('jobs_dead'):.0f} dead;"
        f" {figures.total('workers_connected'):.0f} workers"
    )


def _meditation(figures: Figures, now: float) -> str:
    running = figures.greatest("memory_meditation_running")
    ended = figures.greatest("memory_meditation_last_success_timestamp_seconds")
    seconds = figures.greatest("memory_meditation_last_duration_seconds")
    last = f"last of all users {ago(ended, now)} ago, took {seconds:.1f} s" if ended else ""
    return f"{last or 'none of all users yet'}; {running:.0f} running"


def _memories(figures: Figures) -> str:
    return ", ".join(
        f"{figures.greatest('memory_items', tier=tier):.0f} {tier.replace('_', '-')}"
        for tier in ("long_term", "permanent", "archived")
    )


def _quota(figures: Figures) -> str:
    near, over = (
        sum(
            figures.greatest("memory_quota_usage_users", tier=tier, threshold=threshold)
            for tier in ("long_term", "permanent")
        )
        for threshold in ("80", "100")
    )
    refused = figures.total("memory_quota_refusals_total")
    return f"{near:.0f} users at 80 %, {over:.0f} at 100 %; {refused:.0f} memories refused"


def _latency(prometheus: str | None, figures: Figures, title: str) -> str:
    """Return the latency of the last minutes, or since the start if no Prometheus remembers."""
    lately = [_lately(prometheus, part, _TIMED[title]) for part in (0.5, 0.99)]
    if all(lately):
        return f"{_shown(lately)}, of the last 5 min"
    buckets = (
        figures.buckets("kimberly_rpc_seconds")
        if title == "calls"
        else figures.buckets("retrieval_latency_seconds", leg="total")
    )
    since_start = [quantile(part, buckets) for part in (0.5, 0.99)]
    return f"{_shown(since_start)}, since the start" if all(since_start) else "none yet"


def _shown(seconds: Sequence[float | None]) -> str:
    return "p50 / p99 " + " / ".join(f"{(each or 0) * 1000:.1f}" for each in seconds) + " ms"


def _lately(prometheus: str | None, part: float, selected: str) -> float | None:
    if not prometheus:
        return None
    found = _asked(prometheus, f"histogram_quantile({part}, sum by (le) (rate({selected}[5m])))")
    value = float(found[0]["value"][1]) if found else math.nan
    return None if math.isnan(value) else value


def _asked(prometheus: str, query: str) -> list[dict[str, Any]]:
    answer = _get(
        f"{prometheus.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    )
    return list(json.loads(answer)["data"]["result"]) if answer else []


def _get(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310 - see callers
            text: str = answer.read().decode()
            return text
    except OSError:
        return None
