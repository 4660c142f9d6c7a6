"""What `status` makes of what the processes of a mesh measure."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from kimberly.cli.figures import (
    Figures,
    ago,
    latencies_in,
    quantile,
    told_by_processes,
)
from prometheus_client.samples import Sample
from rich.console import Console

from local.prometheus import configuration
from local.table import figure_table

MEASURED = """
jobs_waiting{kind="a"} 3
jobs_waiting{kind="b"} 4
jobs_oldest_waiting_seconds{kind="a"} 12
jobs_running{kind="a"} 2
jobs_dead{kind="a"} 1
workers_connected 2
memory_items{tier="long_term",state="active"} 70
memory_quota_usage_users{tier="long_term",threshold="80"} 5
memory_meditation_last_success_timestamp_seconds 1000
memory_meditation_last_duration_seconds 2.5
memory_meditation_running 1
# TYPE retrieval_latency_seconds histogram
retrieval_latency_seconds_bucket{leg="total",le="0.01"} 5000
retrieval_latency_seconds_bucket{leg="total",le="+Inf"} 5000
"""
LATELY = """
# TYPE kimberly_lately_seconds histogram
kimberly_lately_seconds_bucket{of="queries",le="0.01"} 50
kimberly_lately_seconds_bucket{of="queries",le="0.1"} 100
kimberly_lately_seconds_bucket{of="queries",le="+Inf"} 100
kimberly_lately_seconds_bucket{of="calls",le="0.01"} 0
kimberly_lately_seconds_bucket{of="calls",le="+Inf"} 0
kimberly_lately_window_seconds 317
"""


class Measuring(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write((LATELY if self.path.endswith("?lately") else MEASURED).encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is there
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Measuring) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()
        thread.join()


def shown(mesh: dict[str, object]) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(figure_table(mesh, now=1000 + 7200))
    return captured.get()


def test_status_sums_up_what_processes_measure(url: str) -> None:
    text = shown({"metrics": {"jobs": [url]}, "prometheus": None})
    assert "7 waiting for up to 12 s, 2 running, 1 dead; 2 workers" in text
    assert "last of all users 2 h ago, took 2.5 s; 1 running" in text
    assert "70 long-term, 0 permanent, 0 archived" in text
    assert "5 users at 80 %, 0 at 100 %" in text
    assert "p50 / p99 10.0 / 98.2 ms, of the last 5 min" in text
    (calls,) = [line for line in text.splitlines() if "calls" in line]
    assert "none lately" in calls


def test_status_does_without_what_does_not_answer(url: str) -> None:
    gone = "http://127.0.0.1:9/metrics"
    assert told_by_processes([gone]).samples == []
    assert "nothing that it measures" in shown({"metrics": {"jobs": [gone]}, "prometheus": None})
    text = shown({"metrics": {"jobs": [gone], "memory": [url]}, "prometheus": "http://127.0.0.1:9"})
    assert "7 waiting" in text
    assert "of the last 5 min" in text


def test_latencies_of_processes_are_told_together_with_the_longest_of_their_windows() -> None:
    def told(window: float, fast: float, slow: float) -> list[Sample]:
        ends = (("0.01", fast), ("0.1", fast + slow), ("+Inf", fast + slow))
        return [
            Sample("kimberly_lately_window_seconds", {}, window),
            *(
                Sample("kimberly_lately_seconds_bucket", {"of": "calls", "le": end}, count)
                for end, count in ends
            ),
        ]

    both = latencies_in([*told(301, 50, 0), *told(40, 0, 50)])["calls"]
    assert both.p99_seconds == pytest.approx(0.0982)
    assert (both.p50_seconds, both.window) == (0.01, "5 min")
    assert latencies_in(told(40, 10, 0))["calls"].window == "40 s"
    assert latencies_in(told(40, 0, 0)) == {}


def test_what_two_replicas_read_from_one_database_is_counted_once() -> None:
    def told(name: str, value: float, instance: str, kind: str = "a") -> Sample:
        return Sample(name, {"job": "jobs", "instance": instance, "kind": kind}, value)

    figures = Figures(
        [
            *(told("jobs_waiting", 3, instance) for instance in ("one", "two")),
            told("jobs_waiting", 4, "two", kind="b"),
            *(told("workers_connected", 2, instance) for instance in ("one", "two")),
        ]
    )
    assert figures.known("jobs_waiting") == 7
    assert figures.known("jobs_waiting", kind="b") == 4
    assert figures.total("workers_connected") == 4


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_how_long_ago_is_said_in_the_unit_that_people_would_take(
    seconds: float, expected: str
) -> None:
    assert ago(1000, 1000 + seconds) == expected
    assert ago(None, 1000) == ""


@pytest.mark.parametrize(
    ("part", "buckets", "expected"),
    [
        (0.5, [(1.0, 10.0), (2.0, 20.0), (math.inf, 20.0)], 1.0),
        (0.75, [(1.0, 10.0), (2.0, 20.0), (math.inf, 20.0)], 1.5),
        (0.99, [(1.0, 10.0), (math.inf, 20.0)], 1.0),
        (0.5, [(1.0, 0.0), (math.inf, 0.0)], None),
        (0.5, [], None),
    ],
)
def test_quantile_lies_where_prometheus_says(
    part: float, buckets: list[tuple[float, float]], expected: float | None
) -> None:
    assert quantile(part, buckets) == expected


def test_prometheus_asks_every_process_and_every_envoy() -> None:
    told = configuration(
        {
            "edge": ["http://127.0.0.1:1/stats/prometheus"],
            "worker-2": ["http://127.0.0.1:2/metrics", "http://127.0.0.1:2/stats/prometheus"],
        }
    )
    assert told["scrape_configs"] == [
        {
            "job_name": "/metrics",
            "metrics_path": "/metrics",
            "static_configs": [target("127.0.0.1:2", "worker", "worker-2", "/metrics")],
        },
        {
            "job_name": "/stats/prometheus",
            "metrics_path": "/stats/prometheus",
            "static_configs": [
                target("127.0.0.1:1", "edge", "edge", "/stats/prometheus"),
                target("127.0.0.1:2", "worker", "worker-2", "/stats/prometheus"),
            ],
        },
    ]


def target(address: str, job: str, instance: str, path: str) -> dict[str, object]:
    return {"targets": [address], "labels": {"job": job, "instance": instance, "path": path}}
