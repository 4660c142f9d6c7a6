"""What is configured of those who watch: they find each other, and every process of the mesh.

Loki, Tempo and Grafana Alloy cannot be had here: of their files only what refers to something else
is looked at.
"""

import functools
import re
import subprocess
from typing import Any

import pytest
import yaml

from deploy import rendering, tools
from deploy.manifests import Manifests
from deploy.references import environment, may_connect
from deploy.slos import OBSERVABILITY
from server import access
from tests.needs import needs_kustomize, needs_prometheus

AMTOOL = tools.PROMETHEUS / "amtool"
PROMTOOL = tools.PROMETHEUS / "promtool"
ALERTMANAGER = OBSERVABILITY / "full" / "alertmanager.yaml"
MESH = (access.EDGE, *access.PROCESSES, access.WORKER)
HEALTH_PORT = 8081

pytestmark = needs_kustomize


@functools.cache
def rendered(name: str) -> Manifests:
    return Manifests.parse(rendering.render(rendering.targets()[name]))


def configuration(name: str) -> Any:
    return yaml.safe_load((OBSERVABILITY / name).read_text())


def data(overlay: str, prefix: str) -> dict[str, str]:
    """Return what a ConfigMap holds; its name ends in a hash."""
    (found,) = (
        each["data"]
        for name, each in rendered(overlay).named("ConfigMap").items()
        if re.fullmatch(rf"{prefix}-\w{{10}}", name)
    )
    return dict(found)


# --- who is asked ------------------------------------------------------------------------------


def test_prometheus_asks_every_process_and_every_envoy() -> None:
    jobs = {job["job_name"]: job for job in configuration("prometheus.yaml")["scrape_configs"]}
    (processes,) = jobs["processes"]["dns_sd_configs"]
    (envoys,) = jobs["envoy"]["dns_sd_configs"]
    assert set(envoys["names"]) == {f"{name}-metrics" for name in MESH}
    assert set(processes["names"]) == {f"{name}-metrics" for name in MESH if name != access.EDGE}
    for found in (processes, envoys):
        assert (found["type"], found["port"]) == ("A", HEALTH_PORT)


@pytest.mark.parametrize("overlay", ["free", "staging", "prod"])
@pytest.mark.parametrize("process", MESH)
def test_prometheus_finds_every_pod_and_may_reach_it(overlay: str, process: str) -> None:
    manifests = rendered(overlay)
    service = manifests.named("Service")[f"{process}-metrics"]["spec"]
    assert service["clusterIP"] == "None"
    # What does not get ready is what there is to tell of.
    assert service["publishNotReadyAddresses"] is True
    assert service["selector"] == {"app.kubernetes.io/name": process}
    asking, asked = manifests.pod("StatefulSet/prometheus"), manifests.pod(f"Deployment/{process}")
    assert may_connect(manifests, asking, asked, HEALTH_PORT)


@pytest.mark.parametrize("overlay", ["free", "staging", "prod"])
@pytest.mark.parametrize("process", MESH)
def test_whoever_watches_enters_the_mesh_by_no_other_door(overlay: str, process: str) -> None:
    manifests = rendered(overlay)
    asked = manifests.pod(f"Deployment/{process}")
    for name in ("StatefulSet/prometheus", "Deployment/grafana"):
        assert not may_connect(manifests, manifests.pod(name), asked, 9443)
    assert not may_connect(manifests, manifests.pod("Deployment/grafana"), asked, HEALTH_PORT)


WAYS = [
    ("Deployment/grafana", "StatefulSet/prometheus", 9090),
    ("StatefulSet/prometheus", "StatefulSet/alertmanager", 9093),
    ("Deployment/grafana", "StatefulSet/loki", 3100),
    ("Deployment/grafana", "StatefulSet/tempo", 3200),
    ("Deployment/collector", "StatefulSet/loki", 3100),
    ("Deployment/collector", "StatefulSet/tempo", 4317),
    *((f"Deployment/{process}", "Deployment/collector", 4317) for process in MESH),
]


@pytest.mark.parametrize(("caller", "called", "port"), WAYS)
def test_those_who_watch_reach_each_other(caller: str, called: str, port: int) -> None:
    manifests = rendered("prod")
    assert may_connect(manifests, manifests.pod(caller), manifests.pod(called), port)
    service = manifests.named("Service")[called.partition("/")[2]]
    assert port in {each["port"] for each in service["spec"]["ports"]}


def addresses(text: str) -> set[tuple[str, int]]:
    """Return the names of our own that a file speaks of, with their ports."""
    names = "prometheus|alertmanager|loki|tempo"
    return {(name, int(port)) for name, port in re.findall(rf"\b({names}):(\d+)", text)}


def test_addresses_in_the_files_are_those_of_services() -> None:
    services = rendered("prod").named("Service")
    files = [each for each in OBSERVABILITY.rglob("*") if each.suffix in (".yaml", ".alloy")]
    spoken_of = {address for file in files for address in addresses(file.read_text())}
    assert {name for name, _ in spoken_of} == {"prometheus", "alertmanager", "loki", "tempo"}
    for name, port in spoken_of:
        assert port in {each["port"] for each in services[name]["spec"]["ports"]}


def test_the_mesh_sends_its_traces_to_the_collector() -> None:
    manifests = rendered("prod")
    for process in MESH:
        container = manifests.pod(f"Deployment/{process}").containers[0]
        told = environment(manifests, container, {})
        assert told["KIMBERLY_OTLP_ENDPOINT"] == "http://collector:4317"
    assert "KIMBERLY_OTLP_ENDPOINT" not in data("free", "mesh")


# --- what is mounted ---------------------------------------------------------------------------


def test_a_small_cluster_has_rules_and_dashboards_and_nobody_to_tell() -> None:
    assert set(data("free", "prometheus")) == {"prometheus.yaml"}
    assert set(data("free", "prometheus-rules")) == {"alerts.yaml", "slos.yaml"}
    assert set(data("free", "grafana-datasources")) == {"lite.yaml"}
    assert "alertmanager" not in rendered("free").named("StatefulSet")


def test_a_large_one_has_all_of_that_and_more() -> None:
    assert set(data("prod", "prometheus")) == {"prometheus.yaml", "alertmanagers.yaml"}
    assert set(data("prod", "grafana-datasources")) == {"lite.yaml", "full.yaml"}
    assert {"alertmanager", "loki", "tempo"} <= rendered("prod").named("StatefulSet").keys()


def test_every_dashboard_is_among_what_grafana_loads() -> None:
    dashboards = {each.name for each in (OBSERVABILITY / "dashboards").iterdir()}
    assert set(data("free", "grafana-dashboards")) == dashboards


def test_grafana_looks_where_the_dashboards_are() -> None:
    (grafana,) = rendered("free").pod("Deployment/grafana").containers
    (provider,) = configuration("grafana/dashboards.yaml")["providers"]
    mounted = {each["mountPath"] for each in grafana.spec["volumeMounts"]}
    assert provider["options"]["path"] in mounted


@pytest.mark.parametrize(
    ("name", "paths"),
    [("loki", r"path_prefix: (\S+)"), ("tempo", r"path: ([^}\s]+)")],
)
def test_what_is_kept_is_kept_on_the_volume(name: str, paths: str) -> None:
    (container,) = rendered("prod").pod(f"StatefulSet/{name}").containers
    (place,) = (m["mountPath"] for m in container.spec["volumeMounts"] if m["name"] == "data")
    found = re.findall(paths, (OBSERVABILITY / "full" / f"{name}.yaml").read_text())
    assert found
    assert all(path.startswith(place) for path in found)


def test_every_part_of_the_collector_leads_to_one_that_there_is() -> None:
    text = (OBSERVABILITY / "full" / "collector.alloy").read_text()
    made = {".".join(each) for each in re.findall(r'(?m)^([\w.]+) "(\w+)" \{$', text)}
    named = r"\b((?:otelcol|discovery|loki)\.[\w.]+)\.(?:input|receiver|output|targets)"
    used = set(re.findall(named, text))
    assert used < made
    # Everything but what brings something in is led to.
    assert {name.split(".")[1] for name in made - used} == {"receiver", "source"}


def test_the_collector_may_read_logs_of_its_namespace_and_nothing_else() -> None:
    (rule,) = rendered("prod").named("Role")["collector"]["rules"]
    assert rule == {
        "apiGroups": [""],
        "resources": ["pods", "pods/log"],
        "verbs": ["get", "list", "watch"],
    }
    assert not list(rendered("prod").of_kind("ClusterRole", "ClusterRoleBinding"))


# --- who is told -------------------------------------------------------------------------------


@needs_prometheus
@pytest.mark.parametrize(
    ("severity", "receiver"), [("page", "on-call"), ("ticket", "team"), ("notice", "team")]
)
def test_an_alert_goes_to_whom_its_severity_says(severity: str, receiver: str) -> None:
    command = [str(AMTOOL), "config", "routes", "test", "--config.file", str(ALERTMANAGER)]
    labels = ["alertname=QueueOld", f"severity={severity}"]
    done = subprocess.run([*command, *labels], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == receiver


@needs_prometheus
def test_alertmanager_and_prometheus_take_their_files() -> None:
    for command in (
        [str(AMTOOL), "check-config", str(ALERTMANAGER)],
        [str(PROMTOOL), "check", "config", "--syntax-only", str(OBSERVABILITY / "prometheus.yaml")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
