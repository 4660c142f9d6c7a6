"""What every overlay must keep to, beyond what the schemas of Kubernetes say.

Each check takes rendered manifests and yields problems, one line each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from deploy import references
from deploy.drain import DrainSettings
from deploy.manifests import Container, Document, Manifests, Pod, name_of, selects
from deploy.pods import PEER_PORT, PodSettings
from deploy.secrets import Values
from local import envoy
from server import access
from server.settings import (
    PREFIX,
    BackupSettings,
    MigrationSettings,
    ProvisionSettings,
    RestoreSettings,
    Settings,
    VerificationSettings,
    explain,
)
from workers.__main__ import Settings as WorkerSettings

Check = Callable[[Manifests, Values], Iterator[str]]

SETTINGS: Final[Mapping[tuple[str, ...], type[BaseSettings]]] = {
    ("python3", "-m", "deploy.pods"): PodSettings,
    ("python3", "-m", "deploy.drain"): DrainSettings,
    ("python3", "-m", "server", "migrate"): MigrationSettings,
    ("python3", "-m", "server", "provision"): ProvisionSettings,
    ("python3", "-m", "server", "backup", "create"): BackupSettings,
    ("python3", "-m", "server", "backup", "verify"): VerificationSettings,
    ("python3", "-m", "server", "backup", "restore"): RestoreSettings,
    ("python3", "-m", "workers"): WorkerSettings,
    **{("python3", "-m", "server", process): Settings for process in access.PROCESSES},
}
"""What reads the environment of a container of ours, by its command."""
HEAPS: Final = {access.EDGE: envoy.EdgeLimits().heap_bytes}
"""What an Envoy may hold, where that is not what a sidecar may."""
SAFE_VOLUMES: Final = {
    "configMap",
    "csi",
    "emptyDir",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""What the Pod Security Standard "restricted" lets a pod mount, but for what nothing here uses."""
WITHOUT_LIVENESS: Final = {"Deployment/worker:app", "Deployment/edge:drain"}
"""They open no port. A job whose worker hangs is offered again when its lease lapses; the other one
waits for the end of its pod and does nothing else."""
POSTGRES_PORT: Final = 5432
KEDA: Final = "keda"
"""The namespace that KEDA is installed in."""
ZONE: Final = "topology.kubernetes.io/zone"
MEBIBYTE: Final = 1 << 20
_UNITS: Final = {"Ki": 1 << 10, "Mi": MEBIBYTE, "Gi": 1 << 30}


def problems(manifests: Manifests, given: Values) -> list[str]:
    """Return everything that is wrong.

    Args:
        manifests: What an overlay renders to.
        given: The secrets that its cluster holds beside them.
    """
    return [problem for check in CHECKS for problem in check(manifests, given)]


def unpinned(manifests: Manifests) -> list[str]:
    """Return the images that are named by a tag, which may be another image tomorrow."""
    return sorted(image for image in manifests.images if "@sha256:" not in image)


# --- who is disturbed, asked, and let in -------------------------------------------------------


def _images(manifests: Manifests, _: Values) -> Iterator[str]:
    for image in sorted(manifests.images):
        if "/" not in image:
            yield f"{image}: no component says which image that is"


def _namespaces(manifests: Manifests, _: Values) -> Iterator[str]:
    (namespace,) = manifests.named("Namespace")
    for document in manifests.documents:
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != namespace:
            yield f"{name_of(document)}: is not in namespace {namespace}"


def _probes(manifests: Manifests, _: Values) -> Iterator[str]:
    for container in manifests.containers:
        if container.pod.lives and (container.is_sidecar or not container.is_initial):
            yield from _probes_of(container)


def _probes_of(container: Container) -> Iterator[str]:
    # A sidecar is not asked whether it is ready: the process that it serves is.
    needed = ["startupProbe" if container.is_sidecar else "readinessProbe"]
    if container.name not in WITHOUT_LIVENESS:
        needed.append("livenessProbe")
    for kind in needed:
        if kind not in container.spec:
            yield f"{container.name}: has no {kind}"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        for way in ("grpc", "httpGet", "tcpSocket"):
            yield from _misdirected(container, kind, way)


def _misdirected(container: Container, kind: str, way: str) -> Iterator[str]:
    asked = container.spec.get(kind, {}).get(way)
    if asked is None:
        return
    # By name a container finds its own ports only, by number those of the whole pod.
    known = container.named_ports if isinstance(asked["port"], str) else container.pod.ports
    if asked["port"] not in known:
        yield f"{container.name}: {kind} asks port {asked['port']}, which none opens"
    if asked.get("service", "") not in _health_names(container):
        yield f"{container.name}: {kind} asks for a service that it does not serve"


def _health_names(container: Container) -> set[str]:
    return {"", *access.PROCESSES.get(container.command[-1], ())}


def _budgets(manifests: Manifests, _: Values) -> Iterator[str]:
    budgets = list(manifests.of_kind("PodDisruptionBudget"))
    for pod in manifests.pods:
        owning = [each for each in budgets if selects(each["spec"]["selector"], pod.labels)]
        if pod.lives and len(owning) != 1:
            yield f"{pod.name}: has {len(owning)} disruption budgets"
    for budget in budgets:
        if "maxUnavailable" not in budget["spec"]:
            yield f"{name_of(budget)}: with one replica minAvailable stops every drain of a node"


def _peers(manifests: Manifests, _: Values) -> Iterator[str]:
    """Who may reach whose sidecar by policy is who may by the table of access."""
    pods = {process: manifests.pod(f"Deployment/{process}") for process in envoy_processes()}
    for caller, called in ((a, b) for a in pods for b in access.PROCESSES if a != b):
        needed = called in envoy.peers_of(caller)
        open_ = references.may_connect(manifests, pods[caller], pods[called], PEER_PORT)
        if open_ is not needed:
            verb = "cannot" if needed else "can"
            yield f"NetworkPolicy: {caller} {verb} reach {called}, against server/access.py"


def envoy_processes() -> tuple[str, ...]:
    """Return every process with an Envoy."""
    return (access.EDGE, *access.PROCESSES, access.WORKER)


def _closed(manifests: Manifests, _: Values) -> Iterator[str]:
    everywhere = [
        set(policy["spec"]["policyTypes"])
        for policy in manifests.of_kind("NetworkPolicy")
        if policy["spec"]["podSelector"] == {} and not policy["spec"].keys() & {"ingress", "egress"}
    ]
    if {"Ingress", "Egress"} not in everywhere:
        yield "NetworkPolicy: nothing denies what is not allowed"


# --- what is referred to -----------------------------------------------------------------------


def _references(manifests: Manifests, given: Values) -> Iterator[str]:
    yield from references.unresolved(manifests, given)


def _settings(manifests: Manifests, given: Values) -> Iterator[str]:
    known = {f"{PREFIX}{name}".upper() for kind in SETTINGS.values() for name in kind.model_fields}
    for container in manifests.containers:
        told = references.environment(manifests, container, given)
        for name in told.keys() - known:
            if name.startswith(PREFIX):
                yield f"{container.name}: {name} is no setting of ours"
        kind = SETTINGS.get(container.command)
        if kind is not None:
            yield from _rejected(container, kind, told)
        elif container.command[:2] == ("python3", "-m"):
            yield f"{container.name}: nobody knows what reads its environment"


def _rejected(
    container: Container, kind: type[BaseSettings], told: Mapping[str, str]
) -> Iterator[str]:
    fields = {f"{PREFIX}{name}".upper(): name for name in kind.model_fields}
    values: dict[str, Any] = {fields[name]: told[name] for name in told if name in fields}
    try:
        kind.model_validate(values)
    except ValidationError as error:
        yield f"{container.name}: {explain(error)}"


# --- identities --------------------------------------------------------------------------------


def _identities(manifests: Manifests, given: Values) -> Iterator[str]:
    certificates = manifests.named("Certificate")
    for process in envoy_processes():
        pod = manifests.pod(f"Deployment/{process}")
        if pod.spec["serviceAccountName"] != process:
            yield f"{pod.name}: its service account is its identity and must be {process}"
        volume = pod.volumes.get("identity", {})
        if "csi" in volume:
            continue
        told = references.environment(manifests, pod.containers[0], given)
        expected = access.spiffe_id(
            told[f"{PREFIX}TRUST_DOMAIN"], pod.owner["metadata"]["namespace"], process
        )
        uris = certificates.get(f"identity-{process}", {}).get("spec", {}).get("uris")
        if uris != [expected]:
            yield f"Certificate/identity-{process}: names {uris}, not {expected}"


def _host_names(manifests: Manifests, given: Values) -> Iterator[str]:
    edge = manifests.pod("Deployment/edge")
    told = references.environment(manifests, edge.containers[0], given)
    names = set(told.get(f"{PREFIX}HOST_NAMES", "").split(","))
    certified = set(manifests.named("Certificate")["edge-public"]["spec"]["dnsNames"])
    if names != certified:
        yield f"Deployment/edge: serves {sorted(names)}, its certificate names {sorted(certified)}"


# --- what a pod may do, and how much -----------------------------------------------------------


def _restricted(manifests: Manifests, _: Values) -> Iterator[str]:
    """The Pod Security Standard "restricted", and a root file system that nobody writes to."""
    for pod in manifests.pods:
        context = pod.spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{pod.name}: may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.name}: has no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: gets a token for the API server, which it does not use"
        for name, volume in pod.volumes.items():
            if not volume.keys() - {"name"} <= SAFE_VOLUMES:
                yield f"{pod.name}: volume {name} is of a kind that is not permitted"
        yield from _unlocked(pod)


def _unlocked(pod: Pod) -> Iterator[str]:
    locked = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for container in pod.containers:
        if container.spec.get("securityContext") != locked:
            yield f"{container.name}: its security context is not {locked}"


def _resources(manifests: Manifests, _: Values) -> Iterator[str]:
    for container in manifests.containers:
        resources = container.spec.get("resources", {})
        if not {"cpu", "memory"} <= resources.get("requests", {}).keys():
            yield f"{container.name}: asks for no share of CPU or memory"
        if set(resources.get("limits", {})) != {"memory"}:
            # A limit of CPU slows what the node could do.
            yield f"{container.name}: must have a limit of memory, and none of CPU"
        elif container.spec["name"] == "envoy":
            yield from _tight(container)


def _tight(container: Container) -> Iterator[str]:
    process = container.pod.owner["metadata"]["name"]
    heap = HEAPS.get(process, envoy.SidecarLimits().heap_bytes)
    if bytes_of(container.spec["resources"]["limits"]["memory"]) < heap + 64 * MEBIBYTE:
        yield f"{container.name}: its limit leaves no room beside a heap of {heap} bytes"


def bytes_of(quantity: str) -> int:
    """Return a quantity of memory in bytes."""
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


def _scaling(manifests: Manifests, _: Values) -> Iterator[str]:
    for scaler in manifests.of_kind("HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]["name"]
        deployment = manifests.named("Deployment").get(target)
        if deployment is None:
            yield f"{name_of(scaler)}: there is no {target}"
            continue
        if "replicas" in deployment["spec"]:
            yield f"Deployment/{target}: a number of replicas would undo {name_of(scaler)}"
        containers = {
            each.spec["name"] for each in Pod(deployment, deployment["spec"]["template"]).containers
        }
        yield from (
            f"{name_of(scaler)}: measures container {name}, which {target} does not have"
            for name in _measured(scaler)
            if name not in containers
        )


def _counting(manifests: Manifests, given: Values) -> Iterator[str]:
    """KEDA counts jobs in the database, from a namespace of its own."""
    if not any(manifests.of_kind("ScaledObject")):
        return
    inside = [pod.labels for pod in manifests.pods if pod.lives and POSTGRES_PORT in pod.ports]
    inside += [{"cnpg.io/cluster": name} for name in manifests.named("Cluster")]
    for labels in inside:
        if not references.may_enter(manifests, KEDA, labels, POSTGRES_PORT):
            yield f"NetworkPolicy: KEDA cannot reach the database in pods with {labels}"
    (namespace,) = manifests.named("Namespace")
    host = urlsplit(given.get("database", {}).get("system-url", "")).hostname
    if inside and host and not host.partition(".")[2].startswith(f"{namespace}.svc"):
        yield f"database/system-url: in namespace {KEDA} there is no {host}"


def spread(manifests: Manifests, zones: int) -> Iterator[str]:
    """Yield what would not be served any more, or too little, when a zone is lost.

    Args:
        manifests: What an overlay renders to.
        zones: Over how many it is to be spread.
    """
    least = {
        each["spec"]["scaleTargetRef"]["name"]: each["spec"].get(
            "minReplicas", each["spec"].get("minReplicaCount")
        )
        for each in manifests.of_kind("HorizontalPodAutoscaler", "ScaledObject")
    }
    for process in envoy_processes():
        pod = manifests.pod(f"Deployment/{process}")
        bound = [
            each
            for each in pod.spec.get("topologySpreadConstraints", ())
            if each["topologyKey"] == ZONE and each["whenUnsatisfiable"] == "DoNotSchedule"
        ]
        if not any(_spreads(each, pod) for each in bound):
            yield f"{pod.name}: all of its pods may be in one zone"
        replicas = least.get(process, pod.owner["spec"].get("replicas", 1))
        if replicas < zones:
            yield f"{pod.name}: {replicas} replicas are not in {zones} zones"


def _spreads(constraint: Document, pod: Pod) -> bool:
    # An empty selector is every pod of the namespace: the labels make it those of one release.
    keys = {"app.kubernetes.io/name", "pod-template-hash"}
    return (
        constraint["maxSkew"] == 1
        and selects(constraint["labelSelector"], pod.labels)
        and keys == set(constraint.get("matchLabelKeys", ()))
    )


def _measured(scaler: Document) -> Sequence[str]:
    metrics = scaler["spec"].get("metrics", ())
    return [metric["containerResource"]["container"] for metric in metrics]


CHECKS: Final[tuple[Check, ...]] = (
    _images,
    _namespaces,
    _probes,
    _budgets,
    _closed,
    _peers,
    _references,
    _settings,
    _identities,
    _host_names,
    _restricted,
    _resources,
    _scaling,
    _counting,
)
