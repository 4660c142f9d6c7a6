"""Fly.io: what fly/*.toml say holds, of secrets, Envoys and costs too."""

import base64
import datetime as dt
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from deploy import fly, pods
from deploy.invariants import MEBIBYTE, bytes_of
from deploy.machine import MachineSettings
from deploy.manifests import Manifests
from deploy.rendering import render, targets
from deploy.secrets import new_values
from local import envoy
from local.layout import CHECKOUT
from local.processes import installed
from server import access
from server.access import EDGE, WORKER
from server.settings import Settings
from tests.deploy.fly_apps import HOST, NOW, app_of, environments, told, values
from tests.needs import needs_kustomize
from workers.__main__ import Settings as WorkerSettings

LASTING = (*fly.STORES, *fly.PROCESSES)
"""The apps whose machines do not end by themselves."""
PODS = {"migration": "Job/migration", "backup": "CronJob/backup"}
PODS |= {name: f"StatefulSet/{name}" for name in fly.STORES}
PODS |= {name: f"Deployment/{name}" for name in fly.PROCESSES}

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
