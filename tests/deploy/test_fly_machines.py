"""Fly.io: a machine a process runs here, with its Envoy, and does the main job."""

import contextlib
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy import fly, pods
from deploy.smoke import Failed, smoke
from local.layout import CHECKOUT, Layout
from local.mesh import in_background
from local.postgres import SUPERUSER
from local.processes import installed
from local.servers import Stores
from server import access
from server.access import EDGE, WORKER
from tests.deploy.fly_apps import NOW, app_of, environments, values

# Two runs at once do not meet.
NETWORK = f"127.78.{os.getpid() % 250}"
ADDRESSES = {name: f"{NETWORK}.{number}" for number, name in enumerate(fly.PROCESSES, start=2)}
PEERS = {f"kimberly-{name}.internal": ADDRESSES[name] for name in access.PROCESSES}
CLIENT = "203.0.113.7"
PATIENCE_SECONDS = 90.0


@dataclass
class Organization:
    """Machines, each on a loopback address."""

    directory: Path
    told: Mapping[str, Mapping[str, str]]
    machines: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": ".:client",
            "FLY_MACHINE_ID": f"d{name}",
            "FLY_PRIVATE_IP": ADDRESSES[name],
            "KIMBERLY_LISTEN_ADDRESS": ADDRESSES[name],
            "KIMBERLY_MACHINE_DIRECTORY": str(self.directory / name),
            "KIMBERLY_ENVOY_PROGRAM": str(next(installed("envoy").glob("_bin/envoy*"))),
            "KIMBERLY_SETTLE_SECONDS": "0",
            "KIMBERLY_LEAVE_SECONDS": "0.2",
            **self.told[name],
        }
        with self.log(name).open("wb") as log:
            self.machines[name] = subprocess.Popen(
                [sys.executable, "tests/deploy/machine_here.py", name, json.dumps(PEERS)],
                cwd=CHECKOUT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def is_ready(self, name: str) -> bool:
        """Do what Fly's check does."""
        (check,) = app_of(name).checks.values()
        try:
            return httpx.get(f"http://{ADDRESSES[name]}:{check.port}{check.path}").is_success
        except httpx.TransportError:
            return False

    def await_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        for name, machine in self.machines.items():
            while not self.is_ready(name):
                assert machine.poll() is None, self.log(name).read_text()[-3000:]
                assert time.monotonic() < deadline, (name, self.log(name).read_text()[-3000:])
                time.sleep(0.2)

    def service(self, name: str) -> int:
        """Return the id of the process of ours that a machine runs beside its Envoy."""
        children = subprocess.run(
            ["ps", "--ppid", str(self.machines[name].pid), "-o", "pid=,args="],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        (service,) = (int(line.split()[0]) for line in children if f"-m server {name}" in line)
        return service

    def stop(self) -> dict[str, int]:
        """Do what Fly does to end machines, and return how each ended."""
        for machine in self.machines.values():
            machine.terminate()
        return {name: machine.wait(30) for name, machine in self.machines.items()}


def pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def proxy_of_fly() -> Iterator[int]:
    """Pass TCP through to the edge, after the client's address in the PROXY protocol, version 2."""
    addresses = socket.inet_aton(CLIENT) + socket.inet_aton("198.51.100.1")
    header = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11" + struct.pack("!H", 12) + addresses
    header += struct.pack("!HH", 50000, 443)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                edge = socket.create_connection((ADDRESSES[EDGE], pods.EDGE_PORT))
                edge.sendall(header)
                for pair in ((client, edge), (edge, client)):
                    thread = threading.Thread(target=pass_on, args=pair, daemon=True)
                    thread.start()
                    threads.append((thread, *pair))

    threads: list[tuple[threading.Thread, socket.socket, socket.socket]] = []
    accepting = threading.Thread(target=serve, daemon=True)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join(5)
        for thread, *ends in threads:
            for end in ends:
                end.close()
            thread.join(5)


def given_here(stores: Stores, name: str, own: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return what a machine is told, with the stores of this machine."""
    secrets = fly.variables(name, own, prefix="kimberly", host_name="localhost", now=NOW)
    place = f"@127.0.0.1:{stores.postgres.port}/"
    environment = environments()[name] | secrets
    environment |= {
        key: value.replace("@kimberly-postgres.internal:5432/", place)
        for key, value in environment.items()
    }
    here = {
        "KIMBERLY_REDIS_URL": stores.valkey.url,
        "KIMBERLY_S3_ENDPOINT": stores.s3.endpoint,
        "KIMBERLY_S3_REGION": "us-east-1",
        "KIMBERLY_S3_SECURE": "false",
        "KIMBERLY_HOST_NAMES": "localhost",
        "KIMBERLY_TOKEN_ISSUER": "https://localhost",
    }
    environment |= {key: value for key, value in here.items() if key in environment}
    # Nobody carries mails here.
    environment["KIMBERLY_SIGN_UP_CONFIRMS_EMAIL"] = "false"
    # The bucket of backups is the third store, and none of this test's.
    return {key: value for key, value in environment.items() if "_BACKUP_S3_" not in key}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Organization, Any]]:
    """Every process of the mesh on a machine of its own, ready; and its secrets."""
    own = values()
    with contextlib.ExitStack() as stack:
        # Not pytest's: the path of a socket must be short.
        directory = Path(tempfile.mkdtemp(prefix="fly-"))
        stack.callback(shutil.rmtree, directory)
        layout = Layout(tmp_path_factory.mktemp("stores"))
        stores = stack.enter_context(in_background(Stores(layout, durable=False)))
        own["s3"] = {"access-key": stores.s3.access_key, "secret-key": stores.s3.secret_key}
        own["database-owner"]["superuser-url"] = stores.dsn(SUPERUSER, "postgres")
        migration = given_here(stores, "migration", own)
        subprocess.run(
            [sys.executable, "-m", "deploy.machine", "migrate"],
            cwd=CHECKOUT,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": ".:client", **migration},
            check=True,
        )
        told = {name: given_here(stores, name, own) for name in fly.PROCESSES}
        organization = Organization(directory, told)
        stack.callback(organization.stop)
        for name in fly.PROCESSES:
            organization.start(name)
        organization.await_ready()
        yield organization, own


def works(edge: str, trust: ssl.SSLContext) -> bool:
    """Tell whether the mesh does its main job, or cannot verify tokens yet."""
    try:
        return smoke(edge, trust).endswith(" s")
    except Failed as error:
        # An Envoy that was there before auth fetches its keys a little later.
        if "Jwks" not in str(error):
            raise
        return False


def test_machines_do_the_main_job_and_know_their_clients(
    running: tuple[Organization, Any],
) -> None:
    organization, own = running
    trust = ssl.create_default_context(cadata=own["authority"]["ca.crt"])
    with proxy_of_fly() as port:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not works(f"https://localhost:{port}", trust):
            assert time.monotonic() < deadline
    assert f'"address":"{CLIENT}"' in organization.log(EDGE).read_text()


def test_a_connection_that_says_not_whose_it_is_is_closed(
    running: tuple[Organization, Any],
) -> None:
    _, own = running
    trust = ssl.create_default_context(cadata=own["authority"]["ca.crt"])
    with (
        socket.create_connection((ADDRESSES[EDGE], pods.EDGE_PORT)) as raw,
        pytest.raises((ssl.SSLError, OSError)),
    ):
        trust.wrap_socket(raw, server_hostname="localhost")


def test_a_process_does_not_know_the_keys_of_its_envoy(running: tuple[Organization, Any]) -> None:
    organization, _ = running
    here = organization.directory / "memory"
    for path in (here / "identity" / "tls.key", here / "key" / "master.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    service = organization.service("memory")
    environment = Path(f"/proc/{service}/environ").read_bytes()
    assert b"KIMBERLY_DATABASE_URL=" in environment
    assert b"KIMBERLY_IDENTITY_KEY=" not in environment
    assert b"KIMBERLY_MASTER_KEY=" not in environment


def test_machines_end_well_when_they_are_told_to_and_fail_when_a_part_ends(
    running: tuple[Organization, Any],
) -> None:
    organization, _ = running
    os.kill(organization.service("jobs"), 9)
    # Fly starts a machine again that ends in failure.
    assert organization.machines["jobs"].wait(30) == 1
    ended = organization.stop()
    assert {name: status for name, status in ended.items() if status} == {"jobs": 1}
    assert "drained" in organization.log(WORKER).read_text()


def test_a_machine_that_is_told_too_little_says_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.machine", "serve", "auth"],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={"PYTHONPATH": ".:client", "KIMBERLY_IDENTITY_KEY": "no base64"},
    )
    assert done.returncode == 78
    assert "KIMBERLY_IDENTITY_KEY: Input should be base64" in done.stderr
    assert "KIMBERLY_IDENTITY_CERTIFICATE: Field required" in done.stderr
