"""What a process tells of its last minutes."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.lately import WINDOW_SECONDS, Lately
from server.metrics import RPC_SECONDS
from server.telemetry import exposed


class Watch:
    """A clock that is put forward."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Process:
    """One that measures and remembers, and is looked at as often as it would be."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.watch = Watch()
        self.lately = Lately(registry, self.watch)
        self.calls = Histogram(
            "kimberly_rpc_seconds",
            "c",
            ["method", "code"],
            buckets=(0.01, 0.1, 1),
            registry=registry,
        )
        self.queries = Histogram(
            "retrieval_latency_seconds", "q", ["leg"], buckets=(0.01, 0.1, 1), registry=registry
        )

    def pass_(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.5)):
            self.watch.now += 0.5
            self.lately.look()

    def told(self) -> dict[tuple[str, str], float]:
        """Return what is told: counts by what and upper end, and the window."""
        text = generate_latest(self.lately).decode()
        return {
            (sample.labels.get("of", "window"), sample.labels.get("le", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture
def process() -> Process:
    return Process()


def test_a_process_tells_of_the_last_five_minutes_only(process: Process) -> None:
    call = process.calls.labels("Memory/Get", "OK")
    for _ in range(100):
        call.observe(0.5)
    process.pass_(WINDOW_SECONDS + 60)
    for _ in range(3):
        call.observe(0.05)
    process.pass_(60)
    told = process.told()
    assert told["calls", "0.1"] == 3
    assert told["calls", "+Inf"] == 3
    assert WINDOW_SECONDS <= told["window", ""] <= WINDOW_SECONDS + 30
    process.pass_(WINDOW_SECONDS + 60)
    assert process.told()["calls", "+Inf"] == 0


def test_a_process_that_just_began_tells_of_what_it_has_seen_and_since_when(
    process: Process,
) -> None:
    process.pass_(45)
    assert set(process.told()) == {("window", "")}
    process.calls.labels("Memory/Get", "OK").observe(0.05)
    process.pass_(45)
    assert process.told() == {
        ("calls", "0.01"): 0,
        ("calls", "0.1"): 1,
        ("calls", "1.0"): 1,
        ("calls", "+Inf"): 1,
        ("window", ""): 90,
    }


def test_what_lasts_as_long_as_somebody_listens_is_no_call_and_a_leg_no_query(
    process: Process,
) -> None:
    for method in ("Health/Check", "WorkerService/Work", "JobService/WatchJob"):
        process.calls.labels(method, "OK").observe(0.5)
    process.calls.labels("WorkerService/Other", "OK").observe(0.005)
    process.queries.labels("lexical").observe(0.5)
    process.queries.labels("total").observe(0.05)
    told = process.told()
    assert (told["calls", "0.01"], told["calls", "+Inf"]) == (1, 1)
    assert (told["queries", "0.01"], told["queries", "+Inf"]) == (0, 1)


async def test_what_was_lately_is_asked_for_beside_all_that_there_ever_was(
    tmp_path: Path,
) -> None:
    RPC_SECONDS.labels("Memory/Get", "OK").observe(0.05)
    transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "metrics"))
    with exposed(tmp_path / "metrics"):
        async with httpx.AsyncClient(transport=transport, base_url="http://metrics") as client:
            ever = (await client.get("/metrics")).text
            lately = (await client.get("/metrics?lately")).text
    assert "kimberly_rpc_seconds_bucket" in ever
    assert "kimberly_lately" not in ever
    assert "kimberly_rpc_seconds_bucket" not in lately
    assert 'kimberly_lately_seconds_bucket{le="+Inf",of="calls"}' in lately
