"""The Envoys of Kubernetes pods: written by the image itself, they boot and answer a kubelet."""

import contextlib
import datetime as dt
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from deploy import pods, references, rendering
from deploy.manifests import Manifests
from deploy.pods import Places, PodSettings
from local import envoy
from local.certificates import Authority, Names
from local.layout import CHECKOUT
from server import access, telemetry
from server.settings import PREFIX
from tests.needs import needs_kustomize

ROLES = (access.EDGE, *access.PROCESSES, access.WORKER)
NOW = dt.datetime.now(dt.UTC)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class Pod:
    """The Envoy of one pod, on a loopback address of its own."""

    told: PodSettings
    places: Places

    @classmethod
    def make(cls, directory: Path, process: str, address: str, **more: str) -> "Pod":
        usual = {
            "trust_domain": "kimberly.example",
            "namespace": "prod",
            "token_issuer": "https://auth.kimberly.example",
            "token_audience": "kimberly",
        }
        own = {"process": process, "pod_name": f"{process}-0", "pod_ip": address}
        told = PodSettings.model_validate({**usual, **more, **own})
        shared = directory / process
        shared.mkdir()
        authority = Authority.open(directory / "certificates", now=NOW)
        identity = f"spiffe://{told.trust_domain}/ns/{told.namespace}/sa/{process}"
        mounted = authority.ensure(process, Names(identity), now=NOW) / "current"
        public = authority.ensure("public", Names(dns_names=("localhost",)), now=NOW) / "current"
        pod = cls(told, Places(shared, mounted, public))
        pods.prepare(told, pod.places)
        return pod

    def health(self, path: str) -> int:
        try:
            return httpx.get(f"http://{self.told.pod_ip}:{pods.HEALTH_PORT}{path}").status_code
        except httpx.TransportError:
            return 0

    def probe(self, service: str) -> str:
        """Ask as a kubelet's probe of kind grpc does: in plain text, at the address of the pod."""
        target = f"{self.told.pod_ip}:{pods.HEALTH_PORT}"
        with grpc.insecure_channel(target) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)
            except grpc.RpcError as error:
                return str(error.code().name)
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with (self.places.shared / "log").open("wb") as log:
            child = subprocess.Popen(envoy.command(self.places.config), stdout=log, stderr=log)
            try:
                eventually(lambda: self.health("/live") == 200)
                yield
            finally:
                child.terminate()
                child.wait()


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not pytest's: the path of a socket must be short.
    path = Path(tempfile.mkdtemp(prefix="kimberly-"))
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def application(pod: Pod) -> Iterator[health.HealthServicer]:
    """An application that only has a health, on the socket where the pod's Envoy expects it."""
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{pod.places.sockets / 'app'}")
    server.start()
    yield servicer
    server.stop(None).wait()


def test_the_stubs_hold_the_whole_contract() -> None:
    built = envoy.methods_of_contract(envoy.descriptor_set())
    assert sorted(envoy.methods_of_contract(pods.contract_of_stubs()), key=lambda m: m.path) == (
        sorted(built, key=lambda m: m.path)
    )


def told_by(overlay: str, role: str) -> dict[str, str]:
    """Return what an overlay tells the container that writes the configuration of an Envoy."""
    manifests = Manifests.parse(rendering.render(rendering.targets()[overlay]))
    (container,) = (
        each
        for each in manifests.pod(f"Deployment/{role}").containers
        if each.spec["name"] == "envoy-files"
    )
    told = references.environment(manifests, container, rendering.secrets_of(overlay))
    return {
        name: told[variable]
        for name in PodSettings.model_fields.keys() - {"process", "pod_name", "pod_ip"}
        if (variable := f"{PREFIX}{name}".upper()) in told
    }


@needs_kustomize
@pytest.mark.parametrize(
    ("overlay", "more"),
    [
        *((overlay, {}) for overlay in rendering.targets()),
        ("prod", {"cors_origins": "https://app.kimberly.example,https://kimberly.example"}),
    ],
)
def test_the_envoys_of_every_overlay_boot_and_live(
    directory: Path, overlay: str, more: dict[str, str]
) -> None:
    pods_ = [
        Pod.make(directory, role, f"127.0.2.{number}", **{**told_by(overlay, role), **more})
        for number, role in enumerate(ROLES, start=1)
    ]
    traced = overlay in ("staging", "prod", "all-components")
    with contextlib.ExitStack() as running:
        for pod in pods_:
            assert (pod.places.sockets.stat().st_mode & 0o777) == 0o700
            assert ("collector" in pod.places.config.read_text()) is traced
            running.enter_context(pod.running())
        for pod in pods_:
            # Nothing that it needs is there.
            assert pod.health("/ready") == 503
            assert pod.health("/stats") == 404
            log = (pod.places.shared / "log").read_text()
            assert "gRPC config" not in log, log


def test_prometheus_sees_what_a_pod_measures(directory: Path) -> None:
    edge = Pod.make(directory, access.EDGE, "127.0.0.2")
    worker = Pod.make(directory, access.WORKER, "127.0.0.3")
    with edge.running(), worker.running(), telemetry.exposed(worker.places.sockets / "metrics"):
        assert edge.health("/stats/prometheus") == worker.health("/stats/prometheus") == 200
        assert (edge.health("/metrics"), worker.health("/metrics")) == (404, 200)
        assert edge.health("/config_dump") == worker.health("/config_dump") == 404


def test_a_kubelet_sees_the_health_of_the_application_and_nothing_else(directory: Path) -> None:
    pod = Pod.make(directory, "memory", "127.0.1.2")
    service = access.PROCESSES["memory"][0]
    with pod.running():
        assert pod.probe(service) == "UNAVAILABLE"
        with application(pod) as told:
            told.set(service, SERVING)
            eventually(lambda: pod.probe(service) == "SERVING")
            eventually(lambda: pod.health("/ready") == 200)
            told.set(service, NOT_SERVING)
            eventually(lambda: pod.probe(service) == "NOT_SERVING")
            eventually(lambda: pod.health("/ready") == 503)
            assert pod.health("/live") == 200
            with grpc.insecure_channel(f"127.0.1.2:{pods.HEALTH_PORT}") as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(), timeout=20
                )
                with pytest.raises(grpc.RpcError) as refused:
                    next(iter(watch))
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_only_the_address_of_the_pod_is_listened_on(directory: Path) -> None:
    pod = Pod.make(directory, "jobs", "127.0.1.3")
    with pod.running():
        for port in (pods.PEER_PORT, pods.HEALTH_PORT):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_an_edge_that_is_about_to_end_asks_its_clients_to_connect_anew(directory: Path) -> None:
    pod = Pod.make(directory, access.EDGE, "127.0.1.4")
    trust = ssl.create_default_context(cafile=str(directory / "certificates" / "ca.pem"))
    told = {
        "PYTHONPATH": ".:client",
        "KIMBERLY_ADMIN_SOCKET": str(pod.places.sockets / "admin"),
        "KIMBERLY_SETTLE_SECONDS": "0",
    }
    with (
        pod.running(),
        httpx.Client(base_url=f"https://127.0.1.4:{pods.EDGE_PORT}", verify=trust) as client,
    ):

        def asked_to_leave() -> bool:
            answer = client.get("/healthz", headers={"host": "localhost"}, extensions=SNI)
            return bool(answer.headers.get("connection") == "close")

        with subprocess.Popen(
            [sys.executable, "-m", "deploy.drain"],
            cwd=CHECKOUT,
            env=told,
            stderr=subprocess.PIPE,
            text=True,
        ) as drainer:
            assert drainer.stderr is not None
            assert drainer.stderr.readline() == "waiting for the end of the pod\n"
            assert not asked_to_leave()
            drainer.terminate()
            assert drainer.wait(60) == 0
        eventually(asked_to_leave)
        # It still serves whoever stays, until it is told to end itself.
        assert pod.health("/live") == 200


SNI = {"sni_hostname": "localhost"}


def test_a_pod_that_is_told_too_little_says_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.pods"],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={"PYTHONPATH": ".:client"},
    )
    assert done.returncode == pods.EXIT_SETTINGS
    assert "KIMBERLY_POD_IP: Field required" in done.stderr
