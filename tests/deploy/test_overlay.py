"""The overlay `local` as processes of this machine.

Every container of its pods is run with the command, the environment and the secrets that the
manifests give it; loopback addresses stand for pods, folders for volumes, programs for images.
PostgreSQL alone is started our own way: its image's start script cannot be run here.
"""

import contextlib
import datetime as dt
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy import references
from deploy.manifests import Container, Manifests, Pod
from deploy.rendering import render, targets
from deploy.secrets import new_values
from deploy.smoke import Account, Failed, smoke
from local.certificates import Authority, Names
from local.layout import CHECKOUT, Layout
from local.mesh import in_background
from local.postgres import SUPERUSER
from local.processes import installed
from local.servers import Stores, _valkey_binary, _weed_binary
from server import access
from tests.deploy.test_pods import eventually
from tests.needs import needs_kustomize

# All pods at once on this machine, each with a probe that loses patience.
pytestmark = [pytest.mark.alone, needs_kustomize]

PATIENCE_SECONDS = 90.0
# Two runs at once do not meet.
NETWORK = f"127.77.{os.getpid() % 250}"
PODS = ("valkey", "s3", "auth", "memory", "jobs", "worker", "edge")
ADDRESSES = {pod: f"{NETWORK}.{number}" for number, pod in enumerate(PODS, start=2)}
EDGE = ADDRESSES["edge"]


@dataclass
class Cluster:
    """What a node would do with the pods of an overlay."""

    manifests: Manifests
    directory: Path
    values: dict[str, dict[str, str]]
    words: dict[str, str]
    """What stands here for names that only a cluster knows."""
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def pod(self, name: str) -> Pod:
        return next(pod for pod in self.manifests.pods if pod.owner["metadata"]["name"] == name)

    def place(self, pod: str, path: str) -> str:
        """Return where a path of a pod is."""
        for mounted in ("/run/", "/data", "/tmp/"):
            if path.startswith(mounted):
                return str(self.directory / pod / path.lstrip("/"))
        return path

    def told(self, pod: str, container: Container) -> dict[str, str]:
        told = references.environment(self.manifests, container, self.values)
        for word, here in self.words.items():
            told = {name: value.replace(word, here) for name, value in told.items()}
        told = {name: self.place(pod, value) for name, value in told.items()}
        return told | {"KIMBERLY_POD_IP": ADDRESSES.get(pod, ""), "KIMBERLY_HOST_NAMES": EDGE}

    def environment(self, pod: str, container: Container) -> dict[str, str]:
        told = self.told(pod, container)
        return {"PATH": os.environ["PATH"], "PYTHONPATH": ".:client", **told}

    def mount(self, pod: str, secret: str, path: str) -> None:
        place = Path(self.place(pod, path))
        place.mkdir(parents=True)
        for key, value in self.values[secret].items():
            (place / key).write_text(value)
            (place / key).chmod(0o440)

    def log(self, pod: str, container: str) -> Path:
        return self.directory / f"{pod}.{container}.log"

    def run(self, pod: str, container: Container, *more: str) -> None:
        """Run a container to its end."""
        done = subprocess.run(
            [sys.executable, *container.command[1:], *more],
            cwd=CHECKOUT,
            env=self.environment(pod, container),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (container.name, done.stderr)

    def start(self, pod: str, container: Container, command: list[str]) -> None:
        name = container.spec["name"]
        with self.log(pod, name).open("wb") as log:
            self.children[f"{pod}/{name}"] = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env=self.environment(pod, container),
                stdout=log,
                stderr=log,
            )

    def start_pod(self, pod: str) -> None:
        """Start a pod of ours: what its Envoy reads, its Envoy, its process."""
        shared = Path(self.place(pod, "/run/mesh"))
        shared.mkdir(parents=True)
        volumes = (
            "--shared",
            "/run/mesh",
            "--identity",
            "/run/identity",
            "--public",
            "/run/public",
        )
        more = [self.place(pod, word) for word in volumes]
        for container in self.pod(pod).containers:
            if container.spec["name"] == "envoy-files":
                self.run(pod, container, *more)
                config = shared / "envoy.yaml"
                text = config.read_text()
                for process in access.PROCESSES:
                    text = text.replace(f"{process}.kimberly.svc.cluster.local", ADDRESSES[process])
                config.write_text(text)
            elif container.spec["name"] == "envoy":
                program = str(next(installed("envoy").glob("_bin/envoy*")))
                arguments = [self.place(pod, word) for word in container.spec["args"]]
                self.start(pod, container, [program, *arguments])
            else:
                self.start(pod, container, [sys.executable, *container.command[1:]])

    def start_store(self, pod: str, program: Path, *more: str) -> None:
        (container,) = self.pod(pod).containers
        arguments = [
            re.sub(r"(/run/|/tmp/|/data).*", lambda found: self.place(pod, found[0]), word)
            for word in container.spec["args"]
        ]
        for path in ("/data", "/tmp"):
            (self.directory / pod / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        self.start(pod, container, [str(program), *arguments, *more])

    def is_ready(self, pod: str) -> bool:
        """Do what a kubelet does with the probes of a pod."""
        return all(
            answers(ADDRESSES[pod], container, container.spec["readinessProbe"])
            for container in self.pod(pod).containers
            if "readinessProbe" in container.spec
        )

    def await_ready(self, *pods: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        for pod in pods:
            while not self.is_ready(pod):
                for name, child in self.children.items():
                    assert child.poll() is None, (
                        name,
                        self.log(*name.split("/")).read_text()[-2000:],
                    )
                assert time.monotonic() < deadline, f"{pod} is not ready"
                time.sleep(0.2)


def answers(address: str, container: Container, probe: Mapping[str, dict[str, object]]) -> bool:
    if "grpc" in probe:
        with grpc.insecure_channel(f"{address}:{probe['grpc']['port']}") as channel:
            request = health_pb2.HealthCheckRequest(service=str(probe["grpc"].get("service", "")))
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    way, asked = next((way, probe[way]) for way in ("httpGet", "tcpSocket") if way in probe)
    port = container.named_ports.get(str(asked["port"]), asked["port"])
    if way == "tcpSocket":
        # Its log tells that it listens; nothing is left open here.
        return (
            subprocess.run(
                ["bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}"],
                check=False,
                capture_output=True,
            ).returncode
            == 0
        )
    try:
        return httpx.get(f"http://{address}:{port}{asked['path']}").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def certify(cluster: Cluster) -> ssl.SSLContext:
    """Do what cert-manager does, and return what clients trust."""
    now = dt.datetime.now(dt.UTC)
    authority = Authority.open(cluster.directory / "authority", now=now)
    for certificate in cluster.manifests.of_kind("Certificate"):
        spec = certificate["spec"]
        name = certificate["metadata"]["name"]
        if name.startswith("identity-"):
            (uri,) = spec["uris"]
            pod, path, names = name.removeprefix("identity-"), "/run/identity", Names(uri)
        elif name == "edge-public":
            pod, path, names = "edge", "/run/public", Names(addresses=(EDGE,))
        else:
            continue
        issued = authority.ensure(name, names, now=now)
        place = Path(cluster.place(pod, path))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(issued / "current", target_is_directory=True)
    return ssl.create_default_context(cafile=str(authority.bundle))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, ssl.SSLContext]]:
    """The overlay, all of its pods ready."""
    # Not pytest's: the path of a socket must be short.
    directory = Path(tempfile.mkdtemp(prefix="k8s-"))
    manifests, values = Manifests.parse(render(targets()["local"])), new_values("local")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        layout = Layout(tmp_path_factory.mktemp("stores"))
        stores = stack.enter_context(in_background(Stores(layout, durable=False)))
        values["database-owner"]["superuser-url"] = stores.dsn(SUPERUSER, "postgres")
        words = {
            "@postgres.kimberly.svc:5432/": f"@127.0.0.1:{stores.postgres.port}/",
            "@valkey:6379/": f"@{ADDRESSES['valkey']}:6379/",
            "s3.kimberly.svc.cluster.local:": f"{ADDRESSES['s3']}:",
        }
        cluster = Cluster(manifests, directory, values, words)
        stack.callback(stop, cluster)
        trust = certify(cluster)
        cluster.mount("valkey", "redis", "/run/acl")
        cluster.mount("s3", "s3", "/run/keys")
        for pod in ("auth", "memory"):
            cluster.mount(pod, "key", "/run/key")
        cluster.start_store("valkey", _valkey_binary(), "--bind", ADDRESSES["valkey"])
        here = (f"-ip={ADDRESSES['s3']}", f"-ip.bind={ADDRESSES['s3']}")
        cluster.start_store("s3", _weed_binary(), *here)
        for container in cluster.pod("migration").containers:
            cluster.run("migration", container)
        cluster.await_ready("valkey", "s3")
        pods = ("auth", "jobs", "memory", "worker", "edge")
        for pod in pods:
            cluster.start_pod(pod)
        cluster.await_ready(*pods)
        yield cluster, trust


def stop(cluster: Cluster) -> None:
    for child in reversed(cluster.children.values()):
        child.terminate()
    for child in cluster.children.values():
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def test_a_new_user_does_the_main_job_through_the_edge(
    running: tuple[Cluster, ssl.SSLContext],
) -> None:
    _, trust = running
    assert smoke(f"https://{EDGE}:8443", trust).endswith(" s")


def test_a_user_who_is_there_for_that_does_the_main_job_where_a_mail_would_have_to_confirm_another(
    running: tuple[Cluster, ssl.SSLContext],
) -> None:
    edge, trust = f"https://{EDGE}:8443", running[1]
    account = Account("releases@example.com", "tries what was released")
    told = {"email": account.email, "password": account.password}
    assert httpx.post(f"{edge}/v1/signup", json=told, verify=trust).status_code == httpx.codes.OK
    assert smoke(edge, trust, account=account).endswith(" s")
    with pytest.raises(Failed, match="POST /v1/login: 401"):
        smoke(edge, trust, account=Account(account.email, "not the password"))


def test_the_worker_waits_for_work_through_its_own_envoy(
    running: tuple[Cluster, ssl.SSLContext],
) -> None:
    cluster, _ = running
    admin = cluster.place("worker", "/run/mesh/sockets/admin")
    with httpx.Client(transport=httpx.HTTPTransport(uds=admin)) as client:

        def waits() -> bool:
            stats = client.get("http://envoy/stats?filter=cluster.jobs.upstream_rq_active$").text
            return stats == "cluster.jobs.upstream_rq_active: 1\n"

        eventually(waits)  # its stream may just be broken, and opened again


def test_nobody_enters_the_stores_without_a_key(running: tuple[Cluster, ssl.SSLContext]) -> None:
    s3 = f"http://{ADDRESSES['s3']}:8333/kimberly/object"
    assert httpx.put(s3, content=b"x").status_code == httpx.codes.FORBIDDEN
    asked = subprocess.run(
        ["bash", "-c", f"exec 3<>/dev/tcp/{ADDRESSES['valkey']}/6379; echo PING >&3; head -1 <&3"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert asked.stdout.startswith("-NOAUTH")
