"""The mesh as a whole: real stores and Envoys, stand-ins for services and worker."""

import contextlib
import io
import json
import os
import signal
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import asyncpg
import httpx
import psutil
import pytest
from minio import Minio
from redis.asyncio import Redis

from local.layout import CHECKOUT, Layout
from local.lock import Identity, holder_of
from local.mesh import Mesh, in_background
from local.postgres import OWNER
from local.servers import BUCKET
from tests.local.stand_in_mesh import COMMANDS
from tests.local.test_servers import listening_hosts

# Linux gives a user 128 watchers of files, and each Envoy takes some: not beside another mesh.
pytestmark = pytest.mark.alone

T = TypeVar("T")
STAND_IN_MESH = Path(__file__).with_name("stand_in_mesh.py")
EVERYTHING = {
    *("postgres", "valkey", "s3", "auth", "memory", "jobs", "worker-1", "edge"),
    *("auth-sidecar", "memory-sidecar", "jobs-sidecar", "worker-1-sidecar"),
}


def until(what: Callable[[], T], seconds: float = 60.0) -> T:
    """Return the first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return answer


def endpoints(layout: Layout) -> dict[str, Any]:
    """Return what mesh.json says, nothing if there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        content: dict[str, Any] = json.loads(layout.endpoints.read_text())
        return content
    return {}


@contextlib.contextmanager
def temporary_layout() -> Iterator[Layout]:
    with TemporaryDirectory(prefix="kimberly-test-") as directory:
        Path(directory).chmod(0o755)
        yield Layout(Path(directory))


# --- one mesh for several tests ----------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with (
        temporary_layout() as layout,
        in_background(Mesh(layout, workers=1, commands=COMMANDS)) as running,
    ):
        yield running


def pid_of(mesh: Mesh, name: str) -> int:
    pid: int = until(
        lambda: endpoints(mesh.layout)["ready"] and endpoints(mesh.layout)["processes"][name]["pid"]
    )
    return pid


def edge_health(mesh: Mesh) -> int:
    trust = ssl.create_default_context(cafile=mesh.ca)
    try:
        return httpx.get(f"{mesh.edge}/healthz", verify=trust).status_code
    except httpx.TransportError:
        return 0


def test_everything_is_ready_and_told_in_the_endpoints_file(mesh: Mesh) -> None:
    told = endpoints(mesh.layout)
    assert told["ready"]
    assert set(told["processes"]) == EVERYTHING
    assert {process["state"] for process in told["processes"].values()} == {"ready"}
    assert stat.S_IMODE(mesh.layout.endpoints.stat().st_mode) == 0o600
    assert mesh.stores.postgres.passwords[OWNER] not in mesh.layout.endpoints.read_text()
    assert edge_health(mesh) == 200


def test_everything_listens_on_the_loopback_interface_only(mesh: Mesh) -> None:
    for name in EVERYTHING:
        assert listening_hosts(pid_of(mesh, name)) <= {"127.0.0.1"}, name


def test_worker_is_told_no_password(mesh: Mesh) -> None:
    told = Path(f"/proc/{pid_of(mesh, 'worker-1')}/environ").read_text()
    assert "KIMBERLY_OUTBOUND_SOCKET" in told
    for name in ("DATABASE", "REDIS", "S3", "MASTER_KEY"):
        assert name not in told


def test_service_knows_nothing_of_the_owner_of_its_tables(mesh: Mesh) -> None:
    told = Path(f"/proc/{pid_of(mesh, 'memory')}/environ").read_text()
    assert "KIMBERLY_DATABASE_URL" in told
    assert "OWNER" not in told


def test_second_start_is_refused_by_name(mesh: Mesh) -> None:
    second = local(mesh.layout, "up")
    assert second.returncode == 1
    assert f"A mesh already runs in {mesh.layout.state} (pid {os.getpid()})" in second.stderr


def test_status_shows_every_process_and_the_way_in(mesh: Mesh) -> None:
    shown = local(mesh.layout, "status")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in EVERYTHING)
    assert f"--cacert {mesh.ca} {mesh.edge}" in shown.stdout


@pytest.mark.parametrize("name", ["memory", "memory-sidecar", "worker-1", "edge"])
def test_killed_process_comes_back(mesh: Mesh, name: str) -> None:
    before = pid_of(mesh, name)
    os.kill(before, signal.SIGKILL)
    until(lambda: endpoints(mesh.layout)["processes"][name]["restarts"] == 1)
    assert pid_of(mesh, name) != before
    until(lambda: edge_health(mesh) == 200)


async def test_killed_postgres_comes_back_with_what_it_acknowledged(mesh: Mesh) -> None:
    connection = await asyncpg.connect(mesh.stores.dsn(OWNER))
    await connection.execute("CREATE TABLE kept (x int); INSERT INTO kept VALUES (7)")
    os.kill(pid_of(mesh, "postgres"), signal.SIGKILL)
    connection.terminate()
    until(lambda: endpoints(mesh.layout)["processes"]["postgres"]["restarts"] == 1)
    pid_of(mesh, "postgres")
    connection = await asyncpg.connect(mesh.stores.dsn(OWNER))
    assert await connection.fetchval("SELECT x FROM kept") == 7
    await connection.close()


# --- from start to end -------------------------------------------------------------------------


@contextlib.contextmanager
def started(layout: Layout) -> Iterator[subprocess.Popen[bytes]]:
    """Run a mesh in a process of its own; yield its supervisor when everything is ready."""
    paths = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "client")])
    with (layout.state / "output").open("wb") as output:
        supervisor = subprocess.Popen(
            (sys.executable, str(STAND_IN_MESH)),
            cwd=CHECKOUT,
            env=os.environ | {"KIMBERLY_STATE": str(layout.state), "PYTHONPATH": paths},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until(
            lambda: (
                (endpoints(layout).get("pid") == supervisor.pid and endpoints(layout).get("ready"))
                or supervisor.poll() is not None
            )
        )
        assert supervisor.poll() is None, (layout.state / "output").read_text()
        yield supervisor
    finally:
        supervisor.kill()
        supervisor.wait()


def family(layout: Layout) -> list[Identity]:
    """Return every process of a mesh, with the children of the children."""
    found = []
    waiting = [process["pid"] for process in endpoints(layout)["processes"].values()]
    while waiting:
        pid = waiting.pop()
        if identity := Identity.of(pid):
            found.append(identity)
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            waiting.extend(map(int, children.split()))
    return found


def unix_sockets(processes: list[Identity]) -> set[str]:
    """Return the paths on which some processes listen."""
    found = [
        connection.laddr
        for process in processes
        for connection in psutil.Process(process.pid).net_connections("unix")
    ]
    return {str(path) for path in found if str(path).startswith("/")}


def survivors(processes: list[Identity]) -> list[Identity]:
    return [process for process in processes if process.is_alive()]


def local(layout: Layout, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "local", *arguments),
        cwd=CHECKOUT,
        env=os.environ | {"KIMBERLY_STATE": str(layout.state)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def stores_of(layout: Layout) -> tuple[str, Redis, Minio]:
    """Return the way to each store, as the endpoints file tells it."""
    told = endpoints(layout)
    s3 = told["s3"]
    access, secret = (Path(s3[name]).read_text() for name in ("access_key", "secret_key"))
    return (
        Path(told["database"]["owner"]).read_text(),
        Redis.from_url(Path(told["redis"]).read_text()),
        Minio(s3["endpoint"], access, secret, secure=False),
    )


async def test_no_process_outlives_a_killed_supervisor_and_nothing_is_lost() -> None:
    with temporary_layout() as layout:
        with started(layout) as supervisor:
            await _write_everywhere(layout)
            processes = family(layout)
            assert len(processes) > len(EVERYTHING), "PostgreSQL has children"
            edge = endpoints(layout)["edge"]
            supervisor.kill()
            supervisor.wait()
            until(lambda: not survivors(processes), seconds=30)
            assert holder_of(layout.state) is None
        with started(layout) as supervisor:
            await _read_everywhere(layout)
            assert endpoints(layout)["edge"] == edge
            _ctrl_c_stops(layout, supervisor)


async def _write_everywhere(layout: Layout) -> None:
    dsn, redis, s3 = stores_of(layout)
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE kept (word text); INSERT INTO kept VALUES ('yesterday')")
    await connection.close()
    async with redis:
        await redis.set("mesh:kept", "yesterday")
    s3.put_object(BUCKET, "kept", io.BytesIO(b"yesterday"), 9)


async def _read_everywhere(layout: Layout) -> None:
    dsn, redis, s3 = stores_of(layout)
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("SELECT word FROM kept") == "yesterday"
    await connection.close()
    async with redis:
        assert await redis.get("mesh:kept") == b"yesterday"
    with s3.get_object(BUCKET, "kept") as answer:
        assert answer.read() == b"yesterday"


def _ctrl_c_stops(layout: Layout, supervisor: subprocess.Popen[bytes]) -> None:
    processes = family(layout)
    listening = unix_sockets(processes)
    assert any("/seaweedfs-" in path for path in listening)
    began = time.monotonic()
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(timeout=15) == 0
    assert time.monotonic() - began < 10
    assert survivors(processes) == []
    assert not layout.endpoints.exists()
    assert not layout.sockets.exists()
    assert not layout.postgres_sockets.exists()
    assert not [path for path in map(Path, listening) if path.exists()]


def test_commands_of_a_stopped_mesh_say_so() -> None:
    with temporary_layout() as layout:
        status, down = local(layout, "status"), local(layout, "down")
        rotated, early = (
            local(layout, "rotate-certificates"),
            local(layout, "rotate-authority", "sign"),
        )
    assert (status.returncode, down.returncode) == (1, 0)
    assert (rotated.returncode, early.returncode) == (0, 1)
    assert "the next one starts with the new certificates" in rotated.stdout
    assert "publish comes first" in early.stderr
    assert "python -m local up" in status.stderr
    assert "No mesh runs" in down.stdout
