"""A run of tests that leaves a secret in a log has failed, whatever the tests say."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.memory.v1 import memory_pb2 as memory
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector

from tests.canaries import Watch
from tests.telemetry.receiver import Receiver

TOKEN = "Zr3_" + "aB1" * 13
REQUESTS = (
    memory.CreateMemoryRequest(memory=memory.Memory(content="she likes green tea")),
    auth.RefreshTokenRequest(refresh_token=TOKEN),
)
LEAKS = [
    "POST /v1 password='correct horse battery staple'",
    "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ1c3JfMSJ9.c2lnbmF0dXJlc2lnbmF0dXJl",
    "key kim_0123456789_" + "x" * 43,
    "AGE-SECRET-" + "KEY-1" + "Q" * 58,
    "-----BEGIN EC PRIVATE" + " KEY-----",
    "DETAIL: Failing row contains (1, she likes green tea)",
    f"refused {TOKEN}",
    "password is stored-secret-of-postgres",
]
RUN = """
from pathlib import Path
from shutil import rmtree
from local.layout import Layout

def leave(layout, text):
    layout.logs.mkdir(parents=True)
    (layout.logs / "memory.log").write_text(text)

def test_prints():
    print({printed!r})

def test_removes(tmp_path):
    leave(Layout(tmp_path / "mesh"), {removed!r})
    rmtree(tmp_path / "mesh")

def test_keeps(tmp_path):
    leave(Layout(tmp_path), {kept!r})
"""


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory that this run, which is watched as well, finds empty."""
    yield tmp_path
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.unlink()


@pytest.mark.parametrize("leak", LEAKS)
def test_what_is_in_a_log_is_found(leak: str, scratch: Path) -> None:
    watch = Watch()
    for request in REQUESTS:
        watch.hear(request)
    for name, text in (("secrets/postgres", "stored-secret-of-postgres"), ("log/a.log", leak)):
        (scratch / name).parent.mkdir()
        (scratch / name).write_text(text)
    watch.look_into(scratch)
    assert len(watch.found) == 1
    quiet = Watch()
    quiet.look("a log", "usr_1 called GetMemory of correct tea: eyJ kim_ AGE-SECRET-KEY")
    assert quiet.found == {}


@pytest.mark.parametrize("leak", LEAKS[:-1])
def test_what_is_in_a_span_is_found(leak: str) -> None:
    watch, receiver = Watch(), Receiver()
    for request in REQUESTS:
        watch.hear(request)
    sent = collector.ExportTraceServiceRequest()
    span = sent.resource_spans.add().scope_spans.add().spans.add(name="memory.v1/CreateMemory")
    receiver.Export(sent, None)
    watch.look_at_spans(receiver)
    assert watch.found == {}
    span.attributes.add(key="db.statement").value.string_value = leak
    receiver.Export(sent, None)
    watch.look_at_spans(receiver)
    (place,) = watch.found
    assert place.endswith(" in span memory.v1/CreateMemory of ")


@pytest.mark.parametrize(
    ("where", "processes"),
    [("printed", 0), ("removed", 0), ("kept", 0), ("kept", 1), ("nowhere", 1)],
)
def test_a_run_that_leaks_has_failed(where: str, processes: int, scratch: Path) -> None:
    texts = dict.fromkeys(("printed", "removed", "kept"), "nothing to see")
    if where in texts:
        texts[where] = "a key kim_0123456789_" + "x" * 43
    file = scratch / "test_run.py"
    file.write_text(RUN.format(**texts))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "tests.canaries", "-n", str(processes)),
            *("--rootdir", scratch, "-c", "/dev/null", "--basetemp", scratch / "base", file),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "3 passed" in done.stdout
    assert done.returncode == (0 if where == "nowhere" else 1)
    assert ("an API key in" in done.stdout) is (where != "nowhere")
