"""Each invariant of the manifests: all overlays keep it, and what breaks it is said."""

import copy
import functools
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from deploy import images, rendering
from deploy.invariants import problems, spread, unpinned
from deploy.manifests import Manifests
from deploy.rendering import render, secrets_of, targets
from deploy.secrets import new_values
from local.layout import CHECKOUT
from local.postgres import COMMON_SETTINGS, DURABLE_SETTINGS
from server.database import SystemDatabase
from tests.needs import needs_kustomize

pytestmark = needs_kustomize

HASH = re.compile(r"-[a-z0-9]{10}$")
"""What kustomize puts behind the name of a ConfigMap."""

Change = Callable[[dict[str, Any]], object]


@functools.cache
def rendered(name: str) -> Manifests:
    return Manifests.parse(render(targets()[name]))


def changed(overlay: str, kind: str, name: str, change: Change) -> list[str]:
    """Return the problems of an overlay in which one document is changed."""
    documents = list(copy.deepcopy(rendered(overlay).documents))
    (found,) = (
        each
        for each in documents
        if each["kind"] == kind and HASH.sub("", each["metadata"]["name"]) == name
    )
    change(dict(found))
    return problems(Manifests(tuple(documents)), secrets_of(overlay))


def pod(document: dict[str, Any]) -> Any:
    return document["spec"]["template"]["spec"]


def app(document: dict[str, Any]) -> Any:
    return pod(document)["containers"][0]


def sidecar(document: dict[str, Any]) -> Any:
    return pod(document)["initContainers"][1]


def variable(container: Any, name: str) -> Any:
    return next(each for each in container["env"] if each["name"] == name)


@pytest.mark.parametrize("name", targets())
def test_an_overlay_keeps_every_invariant(name: str) -> None:
    assert problems(rendered(name), secrets_of(name)) == []


CHANGES: list[tuple[str, str, str, Change, str]] = [
    ("local", "Deployment", "memory", lambda d: app(d).pop("readinessProbe"), "no readinessProbe"),
    ("local", "Deployment", "memory", lambda d: app(d).pop("livenessProbe"), "no livenessProbe"),
    ("local", "Deployment", "jobs", lambda d: sidecar(d).pop("startupProbe"), "no startupProbe"),
    (
        "local",
        "Deployment",
        "memory",
        lambda d: app(d)["readinessProbe"]["grpc"].update(port=9999),
        "asks port 9999",
    ),
    (
        "local",
        "Deployment",
        "worker",
        # The name of another container's port.
        lambda d: app(d)["readinessProbe"]["httpGet"].update(port="health"),
        "asks port health",
    ),
    (
        "local",
        "Deployment",
        "memory",
        lambda d: app(d)["readinessProbe"]["grpc"].update(service="kimberly.auth.v1.AuthService"),
        "a service that it does not serve",
    ),
    (
        "local",
        "PodDisruptionBudget",
        "auth",
        lambda d: d["spec"]["selector"]["matchLabels"].update({"app.kubernetes.io/name": "x"}),
        "Deployment/auth: has 0 disruption budgets",
    ),
    (
        "local",
        "PodDisruptionBudget",
        "auth",
        lambda d: (d["spec"].pop("maxUnavailable"), d["spec"].update(minAvailable=1)),
        "stops every drain",
    ),
    (
        "local",
        "NetworkPolicy",
        "default-deny",
        lambda d: d["spec"].update(policyTypes=["Ingress"]),
        "nothing denies what is not allowed",
    ),
    (
        "local",
        "NetworkPolicy",
        "memory-peers",
        lambda d: d["spec"].update(ingress=[]),
        "edge cannot reach memory",
    ),
    (
        "local",
        "NetworkPolicy",
        "auth-peers",
        lambda d: d["spec"]["ingress"].append({}),
        # Its own side alone does not open the way.
        "",
    ),
    (
        "local",
        "NetworkPolicy",
        "dns",
        lambda d: d["spec"].update(policyTypes=["Ingress", "Egress"], ingress=[{}], egress=[{}]),
        "jobs can reach memory",
    ),
    (
        "local",
        "Deployment",
        "memory",
        lambda d: variable(app(d), "KIMBERLY_REDIS_URL").update(name="KIMBERLY_VALKEY_URL"),
        "KIMBERLY_VALKEY_URL is no setting of ours",
    ),
    (
        "local",
        "Deployment",
        "memory",
        lambda d: app(d)["env"].remove(variable(app(d), "KIMBERLY_DATABASE_URL")),
        "KIMBERLY_DATABASE_URL: Field required",
    ),
    (
        "local",
        "ConfigMap",
        "stores",
        lambda d: d["data"].update(KIMBERLY_KMS="paper"),
        "KIMBERLY_KMS: Input should be",
    ),
    (
        "prod",
        "ConfigMap",
        "stores",
        lambda d: d["data"].update(KIMBERLY_VAULT_ADDRESS="http://vault.example"),
        "KIMBERLY_VAULT_ADDRESS: must be https",
    ),
    (
        "local",
        "Deployment",
        "auth",
        lambda d: app(d)["envFrom"][0]["configMapRef"].update(name="mesh"),
        "there is no ConfigMap mesh",
    ),
    (
        "local",
        "Deployment",
        "auth",
        lambda d: variable(app(d), "KIMBERLY_S3_ACCESS_KEY")["valueFrom"]["secretKeyRef"].update(
            key="access"
        ),
        "the secret s3 has no access",
    ),
    (
        "free",
        "StatefulSet",
        "prometheus",
        lambda d: pod(d)["volumes"][0]["configMap"].update(name="prometheus"),
        "there is no ConfigMap prometheus",
    ),
    (
        "prod",
        "ExternalSecret",
        "redis",
        lambda d: d["spec"]["target"].update(name="valkey"),
        "nothing makes the secret redis",
    ),
    (
        "local",
        "Certificate",
        "identity-jobs",
        lambda d: d["spec"].update(uris=["spiffe://kimberly.local/ns/kimberly/sa/auth"]),
        "Certificate/identity-jobs: names",
    ),
    (
        "local",
        "Deployment",
        "jobs",
        lambda d: pod(d).update(serviceAccountName="auth"),
        "must be jobs",
    ),
    (
        "free",
        "Certificate",
        "edge-public",
        lambda d: d["spec"].update(dnsNames=["elsewhere.example"]),
        "its certificate names ['elsewhere.example']",
    ),
    (
        "local",
        "Deployment",
        "edge",
        lambda d: app(d)["securityContext"].pop("readOnlyRootFilesystem"),
        "its security context is not",
    ),
    (
        "local",
        "StatefulSet",
        "valkey",
        lambda d: pod(d)["securityContext"].pop("runAsNonRoot"),
        "may run as root",
    ),
    (
        "local",
        "Deployment",
        "worker",
        lambda d: pod(d)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "volume host is of a kind that is not permitted",
    ),
    (
        "local",
        "Deployment",
        "memory",
        lambda d: app(d)["resources"]["limits"].update(cpu="1"),
        "none of CPU",
    ),
    (
        "local",
        "Deployment",
        "edge",
        lambda d: app(d)["resources"]["limits"].update(memory="512Mi"),
        "leaves no room beside a heap",
    ),
    (
        "prod",
        "Deployment",
        "memory",
        lambda d: d["spec"].update(replicas=2),
        "would undo HorizontalPodAutoscaler/memory",
    ),
    (
        "cnpg-spiffe-keda",
        "NetworkPolicy",
        "keda-to-postgres",
        lambda d: d["spec"].update(ingress=[]),
        "KEDA cannot reach the database in pods with {'cnpg.io/cluster'",
    ),
    (
        "statefulset-keda",
        "NetworkPolicy",
        "keda-to-postgres-statefulset",
        lambda d: d["spec"]["ingress"][0]["ports"][0].update(port=5433),
        "KEDA cannot reach the database in pods with",
    ),
    (
        "local",
        "Service",
        "edge",
        lambda d: d["spec"]["ports"][0].update(targetPort="http"),
        "no pod opens port http",
    ),
    ("local", "Service", "auth", lambda d: d["metadata"].pop("namespace"), "not in namespace"),
    (
        "local",
        "Deployment",
        "memory",
        lambda d: app(d).update(image="memory"),
        "no component says which image",
    ),
    (
        "local",
        "Deployment",
        "memory",
        lambda d: app(d)["command"].append("--verbose"),
        "nobody knows what reads its environment",
    ),
]


@pytest.mark.parametrize(("overlay", "kind", "name", "change", "said"), CHANGES)
def test_what_breaks_an_invariant_is_said(
    overlay: str, kind: str, name: str, change: Change, said: str
) -> None:
    found = changed(overlay, kind, name, change)
    if said:
        assert any(said in problem for problem in found), found
    else:
        assert found == []


def test_a_field_that_kubernetes_does_not_know_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = list(copy.deepcopy(rendered("minimal").documents))
    deployment: Any = next(each for each in documents if each["kind"] == "Deployment")
    deployment["spec"]["replicaz"] = 3
    found = list(rendering.problems_of_schema([Manifests(tuple(documents))]))
    assert len(found) == len(rendering.VERSIONS)
    assert all("replicaz" in problem for problem in found)


def test_keda_looks_for_the_database_under_a_name_that_its_namespace_knows() -> None:
    values = secrets_of("statefulset-keda")
    given = {name: dict(keys) for name, keys in values.items()}
    given["database"]["system-url"] = "postgresql://kimberly_system:x@postgres:5432/kimberly"
    assert problems(rendered("statefulset-keda"), given) == [
        "database/system-url: in namespace keda there is no postgres"
    ]


@pytest.mark.parametrize("name", rendering.ZONES)
def test_what_is_to_outlive_the_loss_of_a_zone_is_spread(name: str) -> None:
    assert list(spread(rendered(name), rendering.ZONES[name])) == []


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "Deployment",
            lambda d: pod(d)["topologySpreadConstraints"][0].update(
                whenUnsatisfiable="ScheduleAnyway"
            ),
            "Deployment/memory: all of its pods may be in one zone",
        ),
        (
            "Deployment",
            lambda d: pod(d)["topologySpreadConstraints"][0].pop("matchLabelKeys"),
            "Deployment/memory: all of its pods may be in one zone",
        ),
        (
            "HorizontalPodAutoscaler",
            lambda d: d["spec"].update(minReplicas=2),
            "Deployment/memory: 2 replicas are not in 3 zones",
        ),
    ],
)
def test_what_a_lost_zone_would_take_is_said(kind: str, change: Change, said: str) -> None:
    documents = copy.deepcopy(rendered("prod").documents)
    (found,) = (
        each for each in documents if each["kind"] == kind and each["metadata"]["name"] == "memory"
    )
    change(dict(found))
    assert list(spread(Manifests(documents), 3)) == [said]


# --- images ------------------------------------------------------------------------------------

DIGEST = f"sha256:{'0123456789abcdef' * 4}"


def test_what_is_not_pinned_is_refused_for_a_release(tmp_path: Any) -> None:
    assert any(
        image.startswith("ghcr.io/kimberly/kimberly:") for image in unpinned(rendered("prod"))
    )
    text = images.FILE.read_text()
    for name in re.findall(r"(?m)^- name: (\w+)$", text):
        text = images.pinned(text, name, DIGEST)
    # Once more, as the next release does.
    text = images.pinned(text, "kimberly", DIGEST)
    for part in ("kustomize", "observability"):
        subprocess.run(["cp", "-r", CHECKOUT / part, tmp_path / part], check=True)
    (tmp_path / images.FILE.relative_to(CHECKOUT)).write_text(text)
    manifests = Manifests.parse(render(tmp_path / "kustomize" / "overlays" / "prod"))
    assert unpinned(manifests) == []
    assert f"ghcr.io/kimberly/kimberly@{DIGEST}" in manifests.images


@pytest.mark.parametrize(
    ("name", "digest"), [("kimberly", "sha256:1234"), ("kimberly", "latest"), ("nginx", DIGEST)]
)
def test_what_is_no_digest_of_an_image_of_ours_is_refused(name: str, digest: str) -> None:
    with pytest.raises(ValueError, match=r"no digest|no image"):
        images.pinned(images.FILE.read_text(), name, digest)


# --- stores ------------------------------------------------------------------------------------


def test_postgres_has_the_settings_of_a_local_mesh() -> None:
    (container,) = rendered("local").pod("StatefulSet/postgres").containers
    arguments = container.spec["args"]
    assert set(arguments[::2]) == {"-c"}
    settings = dict(argument.split("=", 1) for argument in arguments[1::2])
    of_one_machine = {"listen_addresses", "unix_socket_permissions"}
    assert settings == {
        name: value
        for name, value in (COMMON_SETTINGS | DURABLE_SETTINGS).items()
        if name not in of_one_machine
    }


async def test_what_counts_the_queue_is_a_statement_of_our_schema(
    system_database: SystemDatabase,
) -> None:
    (scaler,) = rendered("prod").of_kind("ScaledObject")
    query = scaler["spec"]["triggers"][0]["metadata"]["query"]
    async with system_database.transaction() as connection:
        assert await connection.fetchval(query) == 0


def test_the_values_of_secrets_are_what_the_manifests_expect() -> None:
    values = new_values("staging")
    assert {name for name, keys in values.items() if "" in keys.values()} == {
        "alerts",
        "backup",
        "dns",
        "mails",
    }
    assert new_values("staging") != values


@pytest.mark.parametrize("name", targets())
def test_what_serves_waits_for_the_migration_and_that_for_all_else(name: str) -> None:
    """deploy/apply.sh goes by these labels; a Deployment without one would start too early."""
    stages = {
        "CronJob": "serve",
        "Deployment": "serve",
        "Job": "migrate",
    }
    for document in rendered(name).documents:
        labels = document["metadata"].get("labels", {})
        # The one that restores is there before either: it runs when somebody says so.
        is_asked_for = document["metadata"]["name"] == "restore"
        stage = None if is_asked_for else stages.get(document["kind"])
        assert labels.get("kimberly/stage") == stage
