"""What `status` tells of a running mesh: what its processes tell Prometheus, summed up."""

import json
import math
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.table import Table

from local.table import uptime

_ANSWER_SECONDS: Final = 2.0
_TIMED: Final = {
    "calls": 'kimberly_rpc_seconds_bucket{method!~"Health/.*|WorkerService/Work|.*Watch.*"}',
    "queries": 'retrieval_latency_seconds_bucket{leg="total"}',
}
"""What has a latency, as Prometheus selects it."""
_NOT_CALLS: Final = ("Health/", "WorkerService/Work", "Watch")


@dataclass(frozen=True, slots=True)
class Figures:
    """What all processes measure."""

    samples: Sequence[Sample]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric, where its labels are these."""
        return sum(sample.value for sample in self._of(name, labels))

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


def read_figures(mesh: Mapping[str, Any]) -> Figures:
    """Return what the processes of a mesh measure now; of one that does not answer, nothing."""
    samples: list[Sample] = []
    for urls in mesh["metrics"].values():
        for url in urls:
            if url.endswith("/metrics"):
                text = _get(url) or ""
                for family in text_string_to_metric_families(text):
                    samples += family.samples
    return Figures(samples)


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


def figure_table(mesh: Mapping[str, Any], *, now: float) -> Table:
    """Return what is worth a look: the queue, meditation, quotas, latencies."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    figures = read_figures(mesh)
    for title, text in (
        ("queue", _queue(figures)),
        ("meditation", _meditation(figures, now)),
        ("memories", _memories(figures)),
        ("quota", _quota(figures)),
        *((title, _latency(mesh, figures, title)) for title in _TIMED),
    ):
        table.add_row(title, text)
    return table


def _queue(figures: Figures) -> str:
    oldest = figures.greatest("jobs_oldest_waiting_seconds")
    return (
        f"{figures.total('jobs_waiting'):.0f} waiting"
        + (f" for up to {oldest:.0f} s" if oldest else "")
        + f", {figures.total('jobs_running'):.0f} running, {figures.total('jobs_dead'):.0f} dead;"
        f" {figures.total('workers_connected'):.0f} workers"
    )


def _meditation(figures: Figures, now: float) -> str:
    running = figures.greatest("memory_meditation_running")
    ended = figures.greatest("memory_meditation_last_success_timestamp_seconds")
    seconds = figures.greatest("memory_meditation_last_duration_seconds")
    last = f"last of all users {uptime(ended, now)} ago, took {seconds:.1f} s" if ended else ""
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


def _latency(mesh: Mapping[str, Any], figures: Figures, title: str) -> str:
    """Return the latency of the last minutes, or since the start if no Prometheus remembers."""
    lately = [_lately(mesh, part, _TIMED[title]) for part in (0.5, 0.99)]
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


def _lately(mesh: Mapping[str, Any], part: float, selected: str) -> float | None:
    if not mesh.get("prometheus"):
        return None
    query = f"histogram_quantile({part}, sum by (le) (rate({selected}[5m])))"
    answer = _get(f"{mesh['prometheus']}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    found = json.loads(answer)["data"]["result"] if answer else []
    value = float(found[0]["value"][1]) if found else math.nan
    return None if math.isnan(value) else value


def _get(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310 - our own
            text: str = answer.read().decode()
            return text
    except OSError:
        return None
