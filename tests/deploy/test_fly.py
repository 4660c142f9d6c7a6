"""Fly.io: what fly/*.toml say holds, deploy/fly.sh does it in order, and a machine runs here."""

import base64
import contextlib
import datetime as dt
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import pytest
import yaml
from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings

from deploy import fly, pods
from deploy.invariants import MEBIBYTE, bytes_of
from deploy.machine import MachineSettings
from deploy.manifests import Manifests
from deploy.pods import PodSettings
from deploy.rendering import TOOLS, render, targets
from deploy.secrets import documents, new_values
from deploy.smoke import Failed, smoke
from local import envoy
from local.layout import CHECKOUT, Layout
from local.mesh import in_background
from local.postgres import SUPERUSER
from local.processes import installed
from local.servers import Stores
from server import access
from server.access import EDGE, WORKER
from server.settings import (
    PREFIX,
    BackupSettings,
    MigrationSettings,
    ProvisionSettings,
    Settings,
)
from workers.__main__ import Settings as WorkerSettings

HOST = "api.kimberly.example"
NOW = dt.datetime.now(dt.UTC)
LASTING = (*fly.STORES, *fly.PROCESSES)
"""The apps whose machines do not end by themselves."""
PODS = {"migration": "Job/migration", "backup": "CronJob/backup"}
PODS |= {name: f"StatefulSet/{name}" for name in fly.STORES}
PODS |= {name: f"Deployment/{name}" for name in fly.PROCESSES}
needs_kustomize = pytest.mark.skipif(
    not TOOLS.is_dir(), reason="make build/deploy/installed brings kustomize"
)

# --- what Fly's reference of fly.toml knows, as far as we use it (read on 2026-11-23) ------------

Duration = Annotated[str, Field(pattern=r"^\d+s$")]


class Known(BaseModel):
    """A table without any other key."""

    model_config = ConfigDict(extra="forbid")


class Ports(Known):
    port: int
    handlers: list[Literal["http", "tls", "proxy_proto"]] = []
    proxy_proto_options: dict[str, str] = {}


class Concurrency(Known):
    type: Literal["connections"]
    soft_limit: int
    hard_limit: int


class TcpCheck(Known):
    grace_period: Duration
    interval: Duration
    timeout: Duration


class Check(TcpCheck):
    type: Literal["http", "tcp"]
    port: int
    method: Literal["get"] | None = None
    path: str | None = None


class Service(Known):
    protocol: Literal["tcp"]
    internal_port: int
    auto_stop_machines: Literal["off"]
    auto_start_machines: bool
    ports: list[Ports]
    concurrency: Concurrency
    tcp_checks: list[TcpCheck]


class Machine(Known):
    size: Literal["shared-cpu-1x", "shared-cpu-2x"]
    memory: Annotated[str, Field(pattern=r"^\d+mb$")]

    @property
    def mebibytes(self) -> int:
        return int(self.memory.removesuffix("mb"))

    @property
    def cpus(self) -> int:
        return int(self.size[-2])


class Mount(Known):
    source: str
    destination: str
    initial_size: Annotated[str, Field(pattern=r"^\d+gb$")]
    snapshot_retention: int = 5


class Files(Known):
    guest_path: str
    secret_name: str


class Restart(Known):
    policy: Literal["never", "on-failure"]
    retries: int = 10


class App(Known):
    app: str
    primary_region: str
    kill_signal: Literal["SIGTERM", "SIGINT"] = "SIGINT"
    kill_timeout: Annotated[int, Field(gt=0, le=300)] = 5
    processes: dict[str, str] = {}
    env: dict[str, str] = {}
    deploy: dict[Literal["release_command"], str] = {}
    services: list[Service] = []
    checks: dict[str, Check] = {}
    metrics: dict[Literal["port", "path"], int | str] = {}
    vm: Annotated[list[Machine], Field(min_length=1, max_length=1)]
    mounts: list[Mount] = []
    files: list[Files] = []
    restart: list[Restart] = []
    experimental: dict[Literal["cmd"], list[str]] = {}


def app_of(name: str) -> App:
    return App.model_validate(tomllib.loads((CHECKOUT / "fly" / f"{name}.toml").read_text()))


def values() -> dict[str, dict[str, str]]:
    """Return secrets of which none was left empty."""
    made = new_values("fly")
    for name, key in (("s3", "access-key"), ("s3", "secret-key"), ("backup", "access-key")):
        made[name][key] = "given"
    for key in ("secret-key", "erasures-access-key", "erasures-secret-key"):
        made["backup"][key] = "given"
    made["mails"]["smtp-password"] = "given"
    return made


def told(name: str) -> dict[str, str]:
    return fly.variables(name, values(), prefix="kimberly", host_name=HOST, now=NOW)


# --- fly/*.toml ----------------------------------------------------------------------------------


def test_there_is_a_file_for_every_app_and_fly_knows_all_that_it_says() -> None:
    assert sorted(path.stem for path in CHECKOUT.glob("fly/*.toml")) == sorted(fly.APPS)
    for name in fly.APPS:
        app = app_of(name)
        assert app.app == f"kimberly-{name}"
        assert app.vm[0].mebibytes % 256 == 0
        assert app.vm[0].mebibytes <= 2048 * app.vm[0].cpus


def test_only_the_edge_is_public_and_ends_tls_itself() -> None:
    assert [name for name in fly.APPS if app_of(name).services] == [EDGE]
    (service,) = app_of(EDGE).services
    assert service.internal_port == pods.EDGE_PORT
    assert service.concurrency.hard_limit == envoy.EdgeLimits().connections
    (port,) = service.ports
    # Neither tls nor http: what comes is passed through.
    assert (port.port, port.handlers) == (443, ["proxy_proto"])
    assert app_of(EDGE).env["KIMBERLY_PROXY_PROTOCOL"] == "true"


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_checked_where_it_listens(name: str) -> None:
    (check,) = app_of(name).checks.values()
    if name in fly.STORES:
        command = " ".join(app_of(name).experimental["cmd"])
        port = {"postgres": 5432, "valkey": 6379}[name]
        assert (check.type, check.port) == ("tcp", port)
        assert "--port" not in command or f"--port {port}" in command
        return
    assert (check.type, check.port) == ("http", pods.HEALTH_PORT)
    # A service that is away must not take the edge away from all others.
    assert check.path == ("/live" if name == EDGE else "/ready")
    assert app_of(name).metrics == {
        "port": pods.HEALTH_PORT,
        "path": "/stats/prometheus" if name == EDGE else "/metrics",
    }


@pytest.mark.parametrize("name", fly.PROCESSES)
def test_a_machine_has_the_time_that_it_needs_to_end(name: str) -> None:
    app = app_of(name)
    assert app.kill_signal == "SIGTERM"
    machine, drain = MachineSettings.model_fields, 10 if name == EDGE else 2
    if name == EDGE:
        needed = machine["settle_seconds"].default + machine["leave_seconds"].default
    elif name == WORKER:
        needed = WorkerSettings.model_fields["drain_seconds"].default
    else:
        fields = Settings.model_fields
        needed = fields["health_interval_seconds"].default + fields["drain_seconds"].default
        # A call may take as long, whatever else is over.
        needed += fields["unary_seconds"].default
    assert app.kill_timeout >= needed + drain


@needs_kustomize
@pytest.mark.parametrize("name", fly.APPS)
def test_a_machine_has_the_memory_of_a_pod(name: str) -> None:
    pod = Manifests.parse(render(targets()["local"])).pod(PODS[name])
    running = [
        bytes_of(container.spec["resources"]["limits"]["memory"])
        for container in pod.containers
        if container.is_sidecar or not container.is_initial
    ]
    if name == EDGE:
        # What drains it is a container there; here it is the process that runs Envoy.
        assert len(running) == 2
    assert app_of(name).vm[0].mebibytes * MEBIBYTE >= sum(running)


@needs_kustomize
def test_a_store_is_started_as_in_a_pod() -> None:
    manifests = Manifests.parse(render(targets()["local"]))
    for name, program in (("postgres", "postgres"), ("valkey", "valkey-server")):
        (container,) = manifests.pod(PODS[name]).containers
        first, *arguments = app_of(name).experimental["cmd"]
        assert first == program
        pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
        theirs = container.spec["args"]
        assert sorted(pairs) == sorted(zip(theirs[::2], theirs[1::2], strict=True))


# --- secrets -------------------------------------------------------------------------------------


@needs_kustomize
@pytest.mark.parametrize("name", fly.APPS)
def test_an_app_is_told_the_secrets_of_its_pod_and_no_others(name: str) -> None:
    pod = Manifests.parse(render(targets()["free"])).pod(PODS[name])
    theirs = {
        variable["name"]: (reference["name"], reference["key"])
        for container in pod.containers
        for variable in container.variables
        if (reference := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    ours = {key: at for key, at in fly.SECRETS[name].items() if key not in fly.FILES}
    assert ours == theirs
    mounted = {
        volume["secret"]["secretName"] for volume in pod.volumes.values() if "secret" in volume
    }
    files = {at[0] for key, at in fly.SECRETS[name].items() if key in fly.FILES}
    assert files == mounted - {f"identity-{name}", "edge-public"}


def test_an_identity_names_its_process_alone_and_outlives_a_quarter() -> None:
    for name in fly.PROCESSES:
        leaf = x509.load_pem_x509_certificate(
            base64.b64decode(told(name)["KIMBERLY_IDENTITY_CERTIFICATE"])
        )
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [each.value for each in names] == [
            access.spiffe_id(fly.TRUST_DOMAIN, fly.NAMESPACE, name)
        ]
        assert leaf.not_valid_after_utc >= NOW + dt.timedelta(days=89)


def test_the_certificate_that_was_given_is_the_one_that_clients_see() -> None:
    own = values()
    own["edge-public"] = {"tls.crt": "certificate\n", "tls.key": "key\n"}
    seen = fly.variables(EDGE, own, prefix="kimberly", host_name=HOST, now=NOW)
    assert base64.b64decode(seen["KIMBERLY_PUBLIC_CERTIFICATE"]) == b"certificate\n"
    assert base64.b64decode(seen["KIMBERLY_PUBLIC_KEY"]) == b"key\n"


def test_the_key_that_issues_certificates_is_told_to_nobody() -> None:
    own = values()
    key = own["authority"]["ca.key"]
    forms = (key, base64.b64encode(key.encode()).decode())
    for name in fly.APPS:
        text = fly.lines(name, fly.variables(name, own, prefix="kimberly", host_name=HOST, now=NOW))
        assert not [form for form in forms if form.strip() in text]


def test_what_was_never_filled_in_stops_the_release() -> None:
    with pytest.raises(fly.NotGiven, match="s3/access-key was never filled in"):
        fly.variables("auth", new_values("fly"), prefix="kimberly", host_name=HOST, now=NOW)


def test_stores_have_the_names_of_fly_whatever_the_prefix() -> None:
    mine = fly.variables("jobs", values(), prefix="mine", host_name=HOST, now=NOW)
    assert "@mine-postgres.internal:5432/" in mine["KIMBERLY_DATABASE_URL"]
    assert "@mine-valkey.internal:6379/" in mine["KIMBERLY_REDIS_URL"]


def test_an_image_is_named_by_its_digest_or_not_at_all() -> None:
    digest = f"sha256:{'a' * 64}"
    text = f"- name: kimberly\n  newName: ghcr.io/kimberly/kimberly\n  digest: {digest}\n"
    assert fly.image("kimberly", text) == f"ghcr.io/kimberly/kimberly@{digest}"
    with pytest.raises(fly.NotPinned):
        fly.image("kimberly", text.replace("digest: ", "newTag: "))


# --- its Envoys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fly.PROCESSES)
def test_the_envoy_of_a_machine_is_a_valid_one_that_all_of_fly_reaches(
    name: str, tmp_path: Path
) -> None:
    environment = environments()[name] | {
        "FLY_MACHINE_ID": "d8901",
        "FLY_PRIVATE_IP": "fdaa:0:18:a7b:7d:f066:b83b:2",
        "KIMBERLY_MACHINE_DIRECTORY": str(tmp_path / "m"),
    }
    code = "import sys; from deploy.machine import Machine; Machine.told(sys.argv[1]).prepare()"
    subprocess.run(
        [sys.executable, "-c", code, name],
        cwd=CHECKOUT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": ".:client", **environment},
        check=True,
    )
    config = tmp_path / "m" / "mesh" / "envoy.yaml"
    program = next(installed("envoy").glob("_bin/envoy*"))
    checked = [str(program), "--mode", "validate", "--config-path", str(config)]
    subprocess.run(checked, check=True, capture_output=True)
    text = config.read_text()
    listeners = yaml.safe_load(text)["static_resources"]["listeners"]
    open_to = [address for each in listeners if (address := each["address"].get("socket_address"))]
    assert {(each["address"], each["ipv4_compat"]) for each in open_to} == {("::", True)}
    assert {each["port_value"] for each in open_to} == {
        pods.HEALTH_PORT,
        *([pods.EDGE_PORT] if name == EDGE else []),
        *([pods.PEER_PORT] if name in access.PROCESSES else []),
    }
    peers = {each for each in envoy.peers_of(name) if each != name}
    assert {each for each in access.PROCESSES if f"kimberly-{each}.internal" in text} == peers
    # The sidecar of auth has the keys itself.
    assert ("fdaa:0:18:a7b:7d:f066:b83b:2" in text) is (name == "auth")


# --- deploy/fly.sh -------------------------------------------------------------------------------

FLYCTL = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
told = sys.stdin.read() if arguments[:2] == ["secrets", "import"] else ""
with open(os.environ["NOTES"], "a") as notes:
    print(*arguments, f"<{{len(told.splitlines())}} lines" if told else "", file=notes)
made = Path(os.environ["NOTES"] + ".made")
have = made.read_text().splitlines() if made.exists() else []
app = arguments[arguments.index("--app") + 1] if "--app" in arguments else ""
if arguments[:2] == ["apps", "create"]:
    made.write_text("\\n".join([*have, arguments[2]]))
elif arguments[0] == "status" and app not in have:
    sys.exit(1)
elif arguments[:2] == ["ips", "list"]:
    print(json.dumps([{{"Type": each}} for each in ("v4", "v6") if each in have]))
elif arguments[0] == "ips":
    made.write_text("\\n".join([*have, arguments[1].removeprefix("allocate-")]))
elif arguments[:2] == ["machine", "list"]:
    print('[{{"id": "d8901"}}]')
"""
"""An organization that has what was made, and takes whatever it is told."""
SOPS = f"""#!{sys.executable}
import os
print(open(os.environ["VALUES"]).read())
"""


def dry_run(*more: str, **environment: str) -> list[list[str]]:
    done = subprocess.run(
        [CHECKOUT / "deploy" / "fly.sh", "--dry-run", *(more or (HOST,))],
        env={"PATH": os.environ["PATH"], **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return [shlex.split(line) for line in done.stdout.splitlines() if "flyctl " in line]


def environments() -> dict[str, dict[str, str]]:
    """Return by app what its machines are told: by their file, by the script, and as secrets."""
    found = {}
    for command in dry_run():
        if command[:2] == ["flyctl", "deploy"]:
            name = command[command.index("--app") + 1].removeprefix("kimberly-")
            given = [command[at + 1] for at, word in enumerate(command) if word == "--env"]
            pairs = dict(each.split("=", 1) for each in given)
            found[name] = app_of(name).env | pairs | told(name)
    return found


def kinds_of(name: str) -> tuple[type[BaseSettings], ...]:
    """Return what reads the environment of an app."""
    match name:
        case "migration":
            return (ProvisionSettings, MigrationSettings)
        case "backup":
            return (BackupSettings,)
        case "edge":
            return (MachineSettings, PodSettings)
        case "worker":
            return (MachineSettings, PodSettings, WorkerSettings)
        case _:
            return (MachineSettings, PodSettings, Settings)


OF_THE_MACHINE = {
    "process": "auth",
    "pod_name": "d8901",
    "pod_ip": "fdaa::2",
    "listen_socket": "/tmp/kimberly/mesh/sockets/app",
    "outbound_socket": "/tmp/kimberly/mesh/sockets/out",
    "metrics_socket": "/tmp/kimberly/mesh/sockets/metrics",
    "master_key_file": "/tmp/kimberly/key/master.key",
}
"""What deploy.machine says by itself."""


@pytest.mark.parametrize("name", [name for name in fly.APPS if name not in fly.STORES])
def test_what_a_machine_is_told_is_what_its_programs_read(name: str) -> None:
    environment = environments()[name]
    read = set[str]()
    for kind in kinds_of(name):
        fields = {f"{PREFIX}{field}".upper(): field for field in kind.model_fields}
        read |= fields.keys()
        given = {fields[key]: value for key, value in environment.items() if key in fields}
        given |= {key: value for key, value in OF_THE_MACHINE.items() if key in kind.model_fields}
        kind.model_validate(given)
    assert environment.keys() <= read


def test_a_release_goes_in_order_names_images_by_digest_and_says_what_comes_next(
    tmp_path: Path,
) -> None:
    deployed = [
        command[command.index("--config") + 1]
        for command in dry_run()
        if command[:2] == ["flyctl", "deploy"]
    ]
    assert deployed == [f"fly/{name}.toml" for name in fly.APPS]
    for command in dry_run():
        if command[:2] == ["flyctl", "deploy"]:
            words = [word for word in command if "@digest" in word]
            # One image, or the two of which one is made.
            assert len(words) == (1 if "--image" in command else 2)
            assert "--no-public-ips" in command
    assert subprocess.run(
        [CHECKOUT / "deploy" / "fly.sh"], check=False, capture_output=True
    ).returncode


@pytest.fixture
def organization(tmp_path: Path) -> Callable[[], list[str]]:
    """Return what runs the script beside a flyctl that takes notes, and returns the notes."""
    checkout = tmp_path / "checkout"
    for folder in ("deploy", "fly", "secrets", "images", "kustomize", "local", "server", "workers"):
        shutil.copytree(CHECKOUT / folder, checkout / folder)
    for folder in ("client", "envoy"):
        (checkout / folder).symlink_to(CHECKOUT / folder)
    pins = checkout / "kustomize" / "components" / "images" / "kustomization.yaml"
    pins.write_text(re.sub(r"newTag: \S+", f"digest: sha256:{'a' * 64}", pins.read_text()))
    tools = checkout / "build" / "deploy" / "bin"
    tools.mkdir(parents=True)
    for path, text in ((tmp_path / "flyctl", FLYCTL), (tools / "sops", SOPS)):
        path.write_text(text)
        path.chmod(0o755)
    (checkout / "secrets" / "fly.enc.yaml").touch()
    (tmp_path / "values").write_text(documents(values()))

    def release() -> list[str]:
        notes = tmp_path / "notes"
        notes.unlink(missing_ok=True)
        subprocess.run(
            [checkout / "deploy" / "fly.sh", HOST],
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "PYTHON": sys.executable,
                "NOTES": str(notes),
                "VALUES": str(tmp_path / "values"),
            },
            check=True,
            timeout=300,
        )
        return notes.read_text().splitlines()

    return release


def test_a_second_release_makes_nothing_again_and_no_argument_is_a_secret(
    organization: Callable[[], list[str]],
) -> None:
    first, second = organization(), organization()
    assert len([line for line in first if line.startswith("apps create")]) == len(fly.APPS)
    assert len([line for line in first if line.startswith("ips allocate")]) == 2
    assert not [line for line in second if line.startswith(("apps create", "ips allocate"))]
    for name in fly.APPS:
        (imported,) = (
            line for line in second if f"secrets import --stage --app kimberly-{name} <" in line
        )
        assert imported.endswith(f"<{len(told(name))} lines")
    assert f"--image docker.io/valkey/valkey@sha256:{'a' * 64}" in "\n".join(second)
    secret = [value for value in told("auth").values() if len(value) > 20]
    assert not [line for line in first for value in secret if value in line]
    assert second[-1].startswith("machine update d8901 --app kimberly-backup --schedule daily")


# --- what it costs -------------------------------------------------------------------------------

CPU, GIGABYTE, VOLUME, ADDRESS = 2.19, 6.00, 0.15, 2.00
"""Dollars a month, of Fly's list of prices; docs/operations.md has its date."""
OFTEN_OVER = {"migration", "backup"}


def test_the_documented_cost_is_that_of_what_is_deployed() -> None:
    text = (CHECKOUT / "docs" / "operations.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| \$([\d.]+) \|$", text, re.MULTILINE))
    cost = {}
    for name in fly.APPS:
        app = app_of(name)
        machine = app.vm[0]
        extra = machine.mebibytes / 1024 - 0.25 * machine.cpus
        running = 0.0 if name in OFTEN_OVER else CPU * machine.cpus + GIGABYTE * extra
        disks = sum(int(mount.initial_size.removesuffix("gb")) for mount in app.mounts)
        cost[name] = running + VOLUME * disks + (ADDRESS if app.services else 0)
    assert {name: float(rows[name]) for name in fly.APPS} == pytest.approx(cost, abs=0.011)
    (total,) = re.findall(r"^\| together \|.*\| \*\*\$([\d.]+)\*\* \|$", text, re.MULTILINE)
    assert float(total) == pytest.approx(sum(cost.values()), abs=0.05)


# --- a machine runs ------------------------------------------------------------------------------

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
    children = subprocess.run(
        ["ps", "--ppid", str(organization.machines["memory"].pid), "-o", "pid=,args="],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    (service,) = (line.split()[0] for line in children if "-m server memory" in line)
    environment = Path(f"/proc/{service}/environ").read_bytes()
    assert b"KIMBERLY_DATABASE_URL=" in environment
    assert b"KIMBERLY_IDENTITY_KEY=" not in environment
    assert b"KIMBERLY_MASTER_KEY=" not in environment


def test_machines_end_well_when_they_are_told_to_and_fail_when_a_part_ends(
    running: tuple[Organization, Any],
) -> None:
    organization, _ = running
    pid = organization.machines["jobs"].pid
    children = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid=,args="], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    (service,) = (int(line.split()[0]) for line in children if "-m server jobs" in line)
    os.kill(service, 9)
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
