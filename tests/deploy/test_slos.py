"""The rules made of promises: each pair of windows fires when it should, and only then."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import observing, slos, tools
from deploy.slos import PAIRS, Pair, Slo
from tests.needs import needs_prometheus

PROMTOOL = tools.PROMETHEUS / "promtool"
SLOS = slos.read(slos.SLOS)

Rates = list[tuple[float, int]]
"""How much is bad, as a share of all, and for how many minutes; one after the other."""

EVENTS = 100_000
"""A sample."""
SETTLED = 3000
"""Minutes after which the first moment of all is long ago."""

# What a process would count of all events, and of the bad ones or of the good ones.
QUERIES = 'method="MemoryService/QueryMemories"'
CREATED = 'method="MemoryService/CreateMemory"'
SERIES = {
    "edge-errors": (
        'envoy_cluster_upstream_rq_xx{job="envoy",process="edge",envoy_response_code_class="2"}',
        "good",
        'envoy_cluster_upstream_rq_xx{job="envoy",process="edge",envoy_response_code_class="5"}',
        "bad",
    ),
    "query-errors": (
        f'kimberly_rpc_seconds_count{{{QUERIES},code="OK"}}',
        "good",
        f'kimberly_rpc_seconds_count{{{QUERIES},code="INTERNAL"}}',
        "bad",
    ),
    "query-latency": (
        f'kimberly_rpc_seconds_count{{{QUERIES},code="OK"}}',
        "all",
        f'kimberly_rpc_seconds_bucket{{{QUERIES},code="OK",le="0.015"}}',
        "good",
    ),
    "write-errors": (
        f'kimberly_rpc_seconds_count{{{CREATED},code="RESOURCE_EXHAUSTED"}}',
        "good",
        f'kimberly_rpc_seconds_count{{{CREATED},code="UNAVAILABLE"}}',
        "bad",
    ),
    "write-latency": (
        f'kimberly_rpc_seconds_count{{{CREATED},code="OK"}}',
        "all",
        f'kimberly_rpc_seconds_bucket{{{CREATED},code="OK",le="0.025"}}',
        "good",
    ),
    "login-errors": (
        'kimberly_rpc_seconds_count{method="AuthService/LogIn",code="UNAUTHENTICATED"}',
        "good",
        'kimberly_rpc_seconds_count{method="AuthService/RefreshToken",code="UNKNOWN"}',
        "bad",
    ),
    "job-start": (
        'jobs_start_delay_seconds_count{kind="embedding.batch"}',
        "all",
        'jobs_start_delay_seconds_bucket{kind="embedding.batch",le="5.0"}',
        "good",
    ),
}
NIGHTS = 'memory_meditation_last_success_timestamp_seconds{job="memory"}'

SCENES = ("burns", "burns slower", "burns for a moment", "burned until a while ago")


def minutes(window: str) -> int:
    return int(window[:-1]) * {"m": 1, "h": 60, "d": 1440}[window[-1]]


@dataclass(frozen=True)
class Clock:
    """How often there is a sample, and how often rules are looked at, in minutes."""

    sample: int
    look: int


def clock(slo: Slo, pair: Pair) -> Clock:
    """Return one that is as coarse as the windows allow: finer ones take minutes."""
    if slo.bad_while:
        # A state is what it was when somebody looked.
        return Clock(5, 5)
    return Clock(1, 5) if pair.short == "5m" else Clock(5, minutes(pair.short) // 2)


def scene(name: str, slo: Slo, pair: Pair) -> Rates:
    """Return what happens; only the first of the scenes is to be told of."""
    burning = float(pair.factor * slo.budget)
    short, long = minutes(pair.short), minutes(pair.long)
    match name:
        case "burns":
            return [(1.2 * burning, long)]
        case "burns slower":
            return [(0.8 * burning, long)]
        case "burns for a moment":
            return [(0, long), (min(5 * burning, 1), short)]
        case _:
            return [(min(2 * burning, 1), long), (0, short + clock(slo, pair).look)]


def night_scene(name: str, slo: Slo, pair: Pair) -> Rates:
    """Return the same for a state: it is bad, or it is not, for as long as the budget lasts."""
    budget = float(pair.factor * slo.budget * minutes(pair.long))
    long = minutes(pair.long)
    late, not_late = (5 * round(share * budget / 5) for share in (1.3, 0.7))
    match name:
        case "burns":
            return [(0, long), (1, late)]
        case "burns slower":
            return [(0, long), (1, not_late)]
        case "burns for a moment":
            return [(0, long), (1, 5)]
        case _:
            return [(0, long), (1, late), (0, minutes(pair.short) + 10)]


def counted(rates: Rates, what: str, every: int) -> str:
    """Return the values of a counter of bad, good or all events."""
    total, values = 0, ["0"]
    for bad, length in rates:
        step = {"bad": round(EVENTS * bad), "good": round(EVENTS * (1 - bad)), "all": EVENTS}[what]
        values.append(f"{total + step}+{step}x{length // every - 1}")
        total += step * (length // every)
    return " ".join(values)


def nights(rates: Rates, every: int) -> str:
    """Return when the last night was: in the future, which is in time, or at the first moment."""
    stretches = [f"{1 if bad else 1e9:.0f}x{length // every - 1}" for bad, length in rates]
    return " ".join([f"1e9x{SETTLED // every}", *stretches])


def series(slo: Slo, rates: Rates, every: int) -> tuple[list[dict[str, str]], int]:
    """Return what is counted, and the minute at which it ends."""
    length = sum(each for _, each in rates)
    if slo.bad_while:
        return [{"series": NIGHTS, "values": nights(rates, every)}], SETTLED + length
    first, of_first, second, of_second = SERIES[slo.name]
    return [
        {"series": first, "values": counted(rates, of_first, every)},
        {"series": second, "values": counted(rates, of_second, every)},
    ], length


def unit_test(slo: Slo, pair: Pair, name: str) -> dict[str, Any]:
    every = clock(slo, pair).sample
    happens = (night_scene if slo.bad_while else scene)(name, slo, pair)
    given, end = series(slo, happens, every)
    windows = f"{pair.short}/{pair.long}"
    labels = f'slo="{slo.name}",severity="{pair.severity}",windows="{windows}"'
    firing = [{"labels": f"{{{labels}}}", "value": 1}]
    query = f'ALERTS{{alertname="{slo.alert}",windows="{windows}",alertstate="firing"}}'
    return {
        "interval": f"{every}m",
        "input_series": given,
        "promql_expr_test": [
            {
                "expr": f"count by (slo, severity, windows) ({query})",
                "eval_time": f"{end}m",
                "exp_samples": firing if name == SCENES[0] else [],
            }
        ],
    }


def run(directory: Path, slo: Slo, pair: Pair, rules: str) -> str:
    """Have promtool look at every scene of a pair; return what it has against the rules."""
    name = f"{slo.name}-{pair.short}"
    (directory / f"{name}.rules.yaml").write_text(rules)
    tests = {
        "rule_files": [f"{name}.rules.yaml"],
        "evaluation_interval": f"{clock(slo, pair).look}m",
        "tests": [unit_test(slo, pair, each) for each in SCENES],
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(tests))
    command = [str(PROMTOOL), "test", "rules", str(directory / f"{name}.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{name}:\n{done.stderr}" if done.returncode else ""


def test_what_is_generated_is_what_is_described() -> None:
    assert list(observing.drifted()) == []


@needs_prometheus
def test_each_pair_of_windows_fires_when_its_budget_burns_and_only_then(tmp_path: Path) -> None:
    pairs = [(slo, pair) for slo in SLOS for pair in slo.pairs]
    with ThreadPoolExecutor(2) as threads:
        told = threads.map(
            lambda each: run(tmp_path, each[0], each[1], slos.rules((each[0],))), pairs
        )
        assert [each for each in told if each] == []


@needs_prometheus
def test_an_alert_that_outlasts_its_cause_would_be_noticed(tmp_path: Path) -> None:
    """The scenes can fail: here the rules look at the long window only."""
    promise = next(slo for slo in SLOS if slo.name == "query-errors")
    blind = slos.rules((promise,)).replace(
        'ratio_rate5m{slo="query-errors"} >', 'ratio_rate1h{slo="query-errors"} >'
    )
    told = run(tmp_path, promise, PAIRS[0], blind)
    assert told.count("FAILED") == 1
    assert "time: 1h10m" in told


def test_a_promise_that_could_never_be_broken_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "slos.yaml"
    promise = {"name": "easy", "promise": "Most works.", "bad": "b", "all": "a"}
    file.write_text(yaml.safe_dump({"slos": [promise | {"objective": 90}]}))
    with pytest.raises(ValueError, match="leaves nothing to alert"):
        slos.read(file)


def test_a_promise_that_wakes_nobody_has_tickets_only() -> None:
    promise = next(slo for slo in SLOS if not slo.pages)
    assert {pair.severity for pair in promise.pairs} == {"ticket"}
