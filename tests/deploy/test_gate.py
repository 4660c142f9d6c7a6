"""A release goes on when nothing pages, and stops when something does or nobody can tell."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from deploy import rendering, tools
from deploy.__main__ import app
from deploy.gate import Refused, paging, watch
from deploy.manifests import Manifests
from deploy.slos import RULES
from tests.needs import needs_kustomize, needs_prometheus

FIRING = {"metric": {"alertname": "QueryLatencyBudgetBurns"}, "value": [0, "1"]}


class Prometheus(BaseHTTPRequestHandler):
    """Answers one question after the other with the next answer; the last one stays."""

    answers: list[bytes]
    rules: bytes

    def do_GET(self) -> None:
        if self.path.startswith("/api/v1/rules"):
            body = self.rules
        else:
            body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def prometheus() -> Iterator[str]:
    Prometheus.rules = rules()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Prometheus)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def answer(*alerts: object) -> bytes:
    return json.dumps({"data": {"result": alerts}}).encode()


def rules(*, without: str = "", health: str = "ok") -> bytes:
    known = [
        {"name": name, "labels": {"windows": windows}, "health": health}
        for name, windows in paging()
        if name != without
    ]
    return json.dumps({"data": {"groups": [{"rules": known}]}}).encode()


def test_a_quiet_time_lets_a_release_go_on(prometheus: str) -> None:
    Prometheus.answers = [answer()]
    assert watch(prometheus, seconds=2, every_seconds=0.05) >= 2


def test_an_alert_that_comes_later_stops_it(prometheus: str) -> None:
    Prometheus.answers = [answer(), answer(), answer(FIRING)]
    with pytest.raises(Refused, match="QueryLatencyBudgetBurns"):
        watch(prometheus, seconds=5, every_seconds=0.05)


@pytest.mark.parametrize("said", [b"{}", b"no JSON"])
def test_no_news_is_no_good_news(prometheus: str, said: bytes) -> None:
    Prometheus.answers = [said]
    with pytest.raises(Refused, match="does not tell"):
        watch(prometheus, seconds=0)


def test_a_prometheus_that_is_away_stops_it() -> None:
    with pytest.raises(Refused, match="does not tell"):
        watch("http://127.0.0.1:1", seconds=0)


@pytest.mark.parametrize("known", [rules(without="QueryLatencyBudgetBurns"), rules(health="err")])
def test_an_alert_that_nobody_evaluates_stops_it(prometheus: str, known: bytes) -> None:
    """Quiet it is then, and means nothing."""
    Prometheus.answers, Prometheus.rules = [answer()], known
    with pytest.raises(Refused, match=r"not watched: .*QueryLatencyBudgetBurns"):
        watch(prometheus, seconds=0.1, every_seconds=0.05)


# --- through the API server of a cluster ---------------------------------------------------------

KUBECTL = f"""#!{sys.executable}
import os, signal, sys
with open(os.environ["NOTES"], "a") as notes:
    print(*sys.argv[1:], file=notes)
if "LISTENS" not in os.environ:
    sys.exit('Error from server (NotFound): services "prometheus" not found')
print("Forwarding from", os.environ["LISTENS"], "-> 9090", flush=True)
signal.pause()
"""
"""A cluster that passes a port on, or has nothing behind it."""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What kubectl was asked for."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


@pytest.mark.parametrize(("told", "code"), [(answer(), 0), (answer(FIRING), 1)])
def test_the_prometheus_of_a_cluster_is_reached_by_a_forwarded_port(
    prometheus: str, notes: Path, monkeypatch: pytest.MonkeyPatch, told: bytes, code: int
) -> None:
    Prometheus.answers = [told]
    monkeypatch.setenv("LISTENS", prometheus.removeprefix("http://"))
    ended = CliRunner().invoke(app, ["gate", "--minutes", "0"])
    assert ended.exit_code == code, ended.output
    assert notes.read_text() == "-n kimberly port-forward service/prometheus :9090\n"


def test_a_cluster_that_has_no_prometheus_stops_it(notes: Path) -> None:
    ended = CliRunner().invoke(app, ["gate", "--minutes", "0"])
    assert ended.exit_code == 1
    assert 'services "prometheus" not found' in ended.output
    assert notes.exists()


@needs_kustomize
@pytest.mark.parametrize("overlay", ["staging", "prod"])
def test_where_a_release_goes_there_is_a_prometheus_to_ask(overlay: str) -> None:
    manifests = Manifests.parse(rendering.render(rendering.targets()[overlay]))
    (port,) = manifests.named("Service")["prometheus"]["spec"]["ports"]
    assert port["port"] == 9090
    # The kubelet forwards to the loopback address of the pod: no policy is asked.
    (container,) = manifests.pod("StatefulSet/prometheus").containers
    assert not [each for each in container.command if "web.listen-address" in each]


# --- with a real Prometheus --------------------------------------------------------------------


@contextmanager
def real(directory: Path) -> Iterator[str]:
    """Run a Prometheus with the rules that lie in the directory, evaluated every second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {"global": {"evaluation_interval": "1s"}, "rule_files": ["rules/*.yaml"]}
    (directory / "prometheus.yaml").write_text(json.dumps(config))
    with (directory / "log").open("wb") as log:
        child = subprocess.Popen(
            [
                tools.PROMETHEUS / "prometheus",
                f"--config.file={directory / 'prometheus.yaml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while not is_ready(f"http://{address}"):
            assert time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.05)
        yield f"http://{address}"
    finally:
        child.terminate()
        child.wait()


def is_ready(prometheus: str) -> bool:
    """Tell whether it answers, and has evaluated once what it is to evaluate."""
    try:
        if httpx.get(f"{prometheus}/-/ready").status_code != httpx.codes.OK:
            return False
        groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    except httpx.TransportError:
        return False
    return all(rule["health"] != "unknown" for group in groups for rule in group["rules"])


@needs_prometheus
def test_a_real_prometheus_with_our_rules_lets_a_release_go_on(tmp_path: Path) -> None:
    shutil.copytree(RULES, tmp_path / "rules")
    with real(tmp_path) as prometheus:
        assert watch(prometheus, seconds=5, every_seconds=0.5) >= 1


@needs_prometheus
def test_a_real_prometheus_without_them_does_not(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    with real(tmp_path) as prometheus, pytest.raises(Refused, match="not watched"):
        watch(prometheus, seconds=0.5, every_seconds=0.1)


@needs_prometheus
def test_a_real_prometheus_that_pages_stops_it(tmp_path: Path) -> None:
    shutil.copytree(RULES, tmp_path / "rules")
    alert = {"alert": "Lost", "expr": "vector(1)", "labels": {"severity": "page"}}
    groups = {"groups": [{"name": "more", "rules": [alert]}]}
    (tmp_path / "rules" / "more.yaml").write_text(json.dumps(groups))
    with real(tmp_path) as prometheus, pytest.raises(Refused, match="firing: Lost"):
        watch(prometheus, seconds=10, every_seconds=0.1)
