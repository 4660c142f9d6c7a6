"""A release goes on when nothing pages, and stops when something does or nobody can tell."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.gate import Refused, watch

FIRING = {"metric": {"alertname": "QueryLatencyBudgetBurns"}, "value": [0, "1"]}


class Prometheus(BaseHTTPRequestHandler):
    """Answers one question after the other with the next answer; the last one stays."""

    answers: list[bytes]

    def do_GET(self) -> None:
        body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def prometheus() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Prometheus)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def answer(*alerts: object) -> bytes:
    return json.dumps({"data": {"result": alerts}}).encode()


def test_a_quiet_time_lets_a_release_go_on(prometheus: str) -> None:
    Prometheus.answers = [answer()]
    assert watch(prometheus, seconds=0.2, every_seconds=0.05) >= 2


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
