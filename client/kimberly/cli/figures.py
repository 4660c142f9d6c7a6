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
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_ANSWER_SECONDS: Final = 2.0
_TIMED: Final = {
    "calls": 'kimberly_rpc_seconds_bucket{method!~"Health/.*|WorkerService/Work|.*Watch.*"}',
    "queries": 'retrieval_latency_seconds_bucket{leg="total"}',
}
"""What has a latency, as Prometheus selects it."""
_PARTS: Final = (0.5, 0.99)
_WINDOW_SECONDS: Final = 300
"""The last minutes, as Prometheus is asked for them; processes remember as many."""
_SUMMED_UP: Final = "jobs_.*|workers_connected|memory_items|memory_quota_.*|memory_meditation_.*"
"""The metrics that are read here, as an expression."""
_OF_THE_ASKED: Final = frozenset({"instance", "job", "path"})
"""Labels that say who told, not what."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Below what most of something lay in the last minutes."""

    p50_seconds: float
    p99_seconds: float
    window: str
    """Which minutes, such as "5 min"."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What all processes measure."""

    samples: Sequence[Sample]
    latencies: Mapping[str, Latency] = field(default_factory=dict)
    """Of calls and of queries; what there was none of lately is not in it."""

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
    lately: list[Sample] = []
    for url in urls:
        samples += _samples(_get(url))
        lately += _samples(_get(f"{url}?lately"))
    return Figures(samples, latencies_in(lately))


def told_by_prometheus(url: str) -> Figures:
    """Return what a Prometheus heard last; nothing if it does not answer."""
    found = _asked(url, f'{{__name__=~"{_SUMMED_UP}"}}')
    samples = [
        Sample(each["metric"].pop("__name__"), each["metric"], float(each["value"][1]))
        for each in found
    ]
    latencies = {title: _latency_at(url, selected) for title, selected in _TIMED.items()}
    return Figures(samples, {title: each for title, each in latencies.items() if each})


def latencies_in(lately: Iterable[Sample]) -> dict[str, Latency]:
    """Return the latencies of what processes remember, each of its own last minutes.

    Whoever began later than others has seen all of theirs: the window is that of the oldest.
    """
    buckets: dict[str, defaultdict[float, float]] = {title: defaultdict(float) for title in _TIMED}
    window = 0.0
    for sample in lately:
        if sample.name == "kimberly_lately_seconds_bucket" and sample.labels["of"] in buckets:
            buckets[sample.labels["of"]][float(sample.labels["le"])] += sample.value
        elif sample.name == "kimberly_lately_window_seconds":
            window = max(window, sample.value)
    latencies = {
        title: _latency([quantile(part, sorted(counts.items())) for part in _PARTS], window)
        for title, counts in buckets.items()
    }
    return {title: each for title, each in latencies.items() if each}


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


def summed_up(figures: Figures, *, now: float) -> dict[str, str]:
    """Return what is worth a look, by what it is about.

    Args:
        figures: What the processes measure.
        now: Seconds since 1970.
    """
    if not figures.samples:
        return {"mesh": "nothing that it measures could be read"}
    return {
        "queue": _queue(figures),
        "meditation": _meditation(figures, now),
        "memories": _memories(figures),
        "quota": _quota(figures),
        **{title: _shown(figures.latencies.get(title)) for title in _TIMED},
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


def _shown(latency: Latency | None) -> str:
    if latency is None:
        return "none lately"
    shown = [f"{each * 1000:.1f}" for each in (latency.p50_seconds, latency.p99_seconds)]
    return f"p50 / p99 {' / '.join(shown)} ms, of the last {latency.window}"


def _latency_at(prometheus: str, selected: str) -> Latency | None:
    lately = f"sum by (le) (rate({selected}[{_WINDOW_SECONDS}s]))"
    found = [_asked(prometheus, f"histogram_quantile({part}, {lately})") for part in _PARTS]
    values = [float(each[0]["value"][1]) if each else math.nan for each in found]
    return _latency([None if math.isnan(value) else value for value in values], _WINDOW_SECONDS)


def _latency(quantiles: Sequence[float | None], window_seconds: float) -> Latency | None:
    p50, p99 = quantiles
    if p50 is None or p99 is None:
        return None
    return Latency(p50, p99, ago(0, window_seconds))


def _samples(text: str | None) -> list[Sample]:
    return [
        sample for family in text_string_to_metric_families(text or "") for sample in family.samples
    ]


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
