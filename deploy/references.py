"""What manifests refer to: configuration, secrets, ports, and who may connect to whom."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deploy.manifests import Container, Document, Manifests, Pod, name_of, selects
from deploy.secrets import Values

CERTIFICATE_KEYS = ("tls.crt", "tls.key", "ca.crt")

_NOBODY: Document = {"matchLabels": {"nobody": "has this label"}}

# What the kubelet would fill in.
_POD_FIELDS = {"status.podIP": "192.0.2.7", "metadata.name": "pod-0"}


def unresolved(manifests: Manifests, given: Values) -> Iterator[str]:
    """Yield the references that lead nowhere."""
    for pod in manifests.pods:
        yield from _unresolved_volumes(manifests, pod, given)
        if pod.spec["serviceAccountName"] not in manifests.named("ServiceAccount"):
            yield f"{pod.name}: there is no service account {pod.spec['serviceAccountName']}"
        for container in pod.containers:
            yield from _unresolved_variables(manifests, container, given)
            yield from _unresolved_mounts(container)
    for document in manifests.documents:
        for name, keys in secrets_of(document):
            yield from _missing(name_of(document), name, keys, _secrets(manifests, given))
    yield from _unresolved_services(manifests)


def environment(manifests: Manifests, container: Container, given: Values) -> dict[str, str]:
    """Return what a container is told; of secrets that the manifests only name, the given value.

    What does not resolve is left out.
    """
    maps = manifests.named("ConfigMap")
    told: dict[str, str] = {}
    for source in container.spec.get("envFrom", ()):
        name = source.get("configMapRef", {}).get("name")
        told |= maps.get(name, {}).get("data", {})
    for variable in container.variables:
        value = _value(variable, container.pod, maps, given)
        if value is not None:
            told[variable["name"]] = value
    return told


def may_connect(manifests: Manifests, caller: Pod, called: Pod, port: int) -> bool:
    """Tell whether network policies let one pod open a TCP connection to another."""
    return _lets(
        manifests, "Egress", caller.labels, port, lambda peer: _is_pod(peer, called.labels)
    ) and _lets(
        manifests, "Ingress", called.labels, port, lambda peer: _is_pod(peer, caller.labels)
    )


def may_enter(manifests: Manifests, namespace: str, labels: Mapping[str, str], port: int) -> bool:
    """Tell whether network policies let all of another namespace connect to pods with labels."""
    return _lets(manifests, "Ingress", labels, port, lambda peer: _is_namespace(peer, namespace))


def secrets_of(document: Document) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the secrets that a custom resource refers to, with the keys that it reads."""
    spec = document.get("spec", {})
    match document["kind"]:
        case "TriggerAuthentication":
            for each in spec["secretTargetRef"]:
                yield each["name"], (each["key"],)
        case "Cluster":
            yield spec["superuserSecret"]["name"], ("username", "password")
        case "Issuer" if "ca" in spec:
            yield spec["ca"]["secretName"], CERTIFICATE_KEYS
        case "Issuer" if "acme" in spec:
            for solver in spec["acme"]["solvers"]:
                token = solver["dns01"]["cloudflare"]["apiTokenSecretRef"]
                yield token["name"], (token["key"],)


def _value(variable: Document, pod: Pod, maps: Mapping[str, Document], given: Values) -> str | None:
    source: Mapping[str, Any] = variable.get("valueFrom", {})
    if "fieldRef" in source:
        return _field(source["fieldRef"]["fieldPath"], pod)
    if "configMapKeyRef" in source:
        reference = source["configMapKeyRef"]
        data: Mapping[str, str] = maps.get(reference["name"], {}).get("data", {})
        return data.get(reference["key"])
    if "secretKeyRef" in source:
        reference = source["secretKeyRef"]
        return given.get(reference["name"], {}).get(reference["key"], "from-elsewhere")
    literal: str | None = variable.get("value")
    return literal


def _field(path: str, pod: Pod) -> str | None:
    if path == "metadata.namespace":
        return str(pod.owner["metadata"]["namespace"])
    if path.startswith("metadata.labels['"):
        return pod.labels.get(path.split("'")[1])
    return _POD_FIELDS.get(path)


def _secrets(manifests: Manifests, given: Values) -> dict[str, set[str]]:
    """Return the keys of every secret that there will be."""
    certified = {
        each["spec"]["secretName"]: set(CERTIFICATE_KEYS)
        for each in manifests.of_kind("Certificate")
    }
    copied = {
        each["spec"]["target"]["name"]: {entry["secretKey"] for entry in each["spec"]["data"]}
        for each in manifests.of_kind("ExternalSecret")
    }
    return {name: set(keys) for name, keys in given.items()} | certified | copied


def _unresolved_variables(
    manifests: Manifests, container: Container, given: Values
) -> Iterator[str]:
    maps, known = manifests.named("ConfigMap"), _secrets(manifests, given)
    for source in container.spec.get("envFrom", ()):
        name = source.get("configMapRef", {}).get("name")
        if name not in maps:
            yield f"{container.name}: there is no ConfigMap {name}"
    for variable in container.variables:
        source = variable.get("valueFrom", {})
        if "configMapKeyRef" in source and _value(variable, container.pod, maps, given) is None:
            yield f"{container.name}: {variable['name']} comes from a ConfigMap that lacks it"
        reference = source.get("secretKeyRef")
        if reference:
            yield from _missing(container.name, reference["name"], (reference["key"],), known)


def _unresolved_volumes(manifests: Manifests, pod: Pod, given: Values) -> Iterator[str]:
    known, maps = _secrets(manifests, given), manifests.named("ConfigMap")
    for volume in pod.volumes.values():
        if "secret" in volume:
            secret = volume["secret"]
            keys = tuple(item["key"] for item in secret.get("items", ()))
            yield from _missing(pod.name, secret["secretName"], keys, known)
        name = volume.get("configMap", {}).get("name")
        if name and name not in maps:
            yield f"{pod.name}: there is no ConfigMap {name}"


def _missing(
    who: str, name: str, keys: tuple[str, ...], known: Mapping[str, set[str]]
) -> Iterator[str]:
    if name not in known:
        yield f"{who}: nothing makes the secret {name}"
    else:
        for key in set(keys) - known[name]:
            yield f"{who}: the secret {name} has no {key}"


def _unresolved_mounts(container: Container) -> Iterator[str]:
    for mount in container.spec.get("volumeMounts", ()):
        if mount["name"] not in container.pod.volumes:
            yield f"{container.name}: mounts {mount['name']}, which is no volume of the pod"


def _unresolved_services(manifests: Manifests) -> Iterator[str]:
    for service in manifests.of_kind("Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        if "cnpg.io/cluster" in service["spec"]["selector"]:
            # The operator makes those pods.
            continue
        pods = [pod for pod in manifests.pods if selects(selector, pod.labels)]
        for port in service["spec"]["ports"]:
            if not any(port["targetPort"] in pod.ports for pod in pods):
                yield f"{name_of(service)}: no pod opens port {port['targetPort']}"


def _lets(
    manifests: Manifests,
    direction: str,
    labels: Mapping[str, str],
    port: int,
    is_peer: Callable[[Document], bool],
) -> bool:
    """Tell whether the policies about a pod with these labels let somebody be its peer."""
    policies = [each["spec"] for each in manifests.of_kind("NetworkPolicy")]
    about = [
        policy
        for policy in policies
        if direction in policy["policyTypes"] and selects(policy["podSelector"], labels)
    ]
    return not about or any(
        _rule_lets(rule, direction, port, is_peer)
        for policy in about
        for rule in policy.get(direction.lower(), ())
    )


def _rule_lets(
    rule: Document, direction: str, port: int, is_peer: Callable[[Document], bool]
) -> bool:
    ports = [each["port"] for each in rule.get("ports", ())]
    if ports and port not in ports:
        return False
    peers = rule.get("from" if direction == "Ingress" else "to")
    return peers is None or any(is_peer(peer) for peer in peers)


def _is_pod(peer: Document, labels: Mapping[str, str]) -> bool:
    # Ours are all in one namespace; an ipBlock means what is outside of the cluster.
    return (
        "podSelector" in peer
        and "namespaceSelector" not in peer
        and selects(peer["podSelector"], labels)
    )


def _is_namespace(peer: Document, name: str) -> bool:
    named = {"kubernetes.io/metadata.name": name}
    return "podSelector" not in peer and selects(peer.get("namespaceSelector", _NOBODY), named)
