"""A mesh that ends leaves no sockets under /tmp; the next one removes those of a killed one."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from local.layout import CHECKOUT, Layout
from local.leftovers import seaweed_socket
from local.ports import GRPC_OFFSET, LOOPBACK, open_ports
from local.servers import claimed

CLAIM = """
import os, signal, sys
from pathlib import Path
from local.layout import Layout
from local.private import make_private
from local.servers import claimed

layout = Layout(Path(sys.argv[1]))
with claimed(layout):
    make_private(layout.postgres_sockets)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Layout:
    """A mesh whose supervisor was killed."""
    layout = Layout(tmp_path / "killed")
    done = subprocess.run((sys.executable, "-c", CLAIM, layout.state), cwd=CHECKOUT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert layout.sockets.is_dir()
    assert layout.postgres_sockets.is_dir()
    return layout


def test_sockets_of_a_killed_mesh_go_when_another_starts(killed: Layout, tmp_path: Path) -> None:
    with claimed(Layout(tmp_path / "other")):
        assert not killed.sockets.exists()
        assert not killed.postgres_sockets.exists()


def test_sockets_of_a_mesh_that_runs_stay_and_go_when_it_ends(tmp_path: Path) -> None:
    running, other = Layout(tmp_path / "running"), Layout(tmp_path / "other")
    with claimed(running):
        (running.sockets / "auth.app").touch()
        with claimed(other):
            assert (running.sockets / "auth.app").exists()
        assert not other.sockets.exists()
    assert not running.sockets.exists()


@pytest.fixture
def left(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A port, and the socket that a filer which listened there has left."""
    with open_ports(tmp_path / "ports.json") as ports:
        port = ports.claim("filer", offsets=(0, GRPC_OFFSET)) + GRPC_OFFSET
    path = seaweed_socket("filer", port)
    with closing(socket.socket(socket.AF_UNIX)) as filer:
        filer.bind(str(path))
    yield port, path
    path.unlink(missing_ok=True)


def test_socket_of_a_filer_that_is_gone_goes(left: tuple[int, Path], tmp_path: Path) -> None:
    port, path = left
    with closing(socket.create_server((LOOPBACK, port))), claimed(Layout(tmp_path / "one")):
        assert path.exists(), "somebody listens"
    with open_ports(tmp_path / "another.json") as ports:
        ports.claim("filer", preferred=[port])
        with claimed(Layout(tmp_path / "two")):
            assert path.exists(), "a mesh is about to start it"
    with claimed(Layout(tmp_path / "three")):
        assert not path.exists()
