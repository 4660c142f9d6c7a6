"""The Envoys that all of these tests ask."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha import reflection

from local.certificates import Authority
from local.envoy import EdgeLimits
from server import access
from tests.deploy.envoy.site import (
    LOCAL,
    NOW,
    UNARY_SECONDS,
    App,
    Site,
    bearer,
    eventually,
    expect,
    rest,
    token,
)


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    # Not pytest's: the path of a socket must be short.
    path = Path(tempfile.mkdtemp(prefix="kimberly-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def authority(directory: Path) -> Authority:
    return Authority.open(directory / "certificates", now=NOW)


@pytest.fixture(scope="session")
def app(directory: Path) -> Iterator[App]:
    app = App()
    server = grpc.server(ThreadPoolExecutor(8), handlers=[app])
    names = [name for names in access.PROCESSES.values() for name in names]
    reflection.enable_server_reflection(names, server)
    for process in access.PROCESSES:
        server.add_insecure_port(f"unix:{directory / process}.app")
    server.start()
    yield app
    server.stop(None).wait()


@pytest.fixture(scope="session")
def mesh(directory: Path, authority: Authority, app: App) -> Iterator[Site]:
    """Edge, sidecars and a worker's sidecar, in front of `app`."""
    site = Site(directory, authority, LOCAL, EdgeLimits(unary_seconds=UNARY_SECONDS))
    # The edge first, the one that everybody waits for last: any order must do.
    with site.running(access.EDGE, access.WORKER, "jobs", "memory", "auth"):
        with rest(site) as client:
            eventually(lambda: expect(client.get("/healthz"), 200))
            # It sees of each process by itself that it is well.
            for path in ("/v1/user", "/v1/memories/mem_1", "/v1/jobs/job_1"):
                eventually(partial(expect_served, client, path))
        yield site


def expect_served(client: httpx.Client, path: str) -> None:
    expect(client.get(path, headers=bearer(token())), 200)


@pytest.fixture
def client(mesh: Site) -> Iterator[httpx.Client]:
    with rest(mesh) as client:
        yield client
