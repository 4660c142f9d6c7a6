"""Rendered manifests, and what in them refers to what."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

Document = Mapping[str, Any]

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet")
"""Kinds that run for good. Their pods have to be probed and may be disturbed one at a time."""


@dataclass(frozen=True, slots=True)
class Container:
    """A container, and the pod that it runs in."""

    pod: "Pod"
    spec: Document
    is_initial: bool

    @property
    def name(self) -> str:
        """Such as Deployment/memory:app."""
        return f"{self.pod.name}:{self.spec['name']}"

    @property
    def is_sidecar(self) -> bool:
        """Whether it starts first and runs as long as the pod."""
        return self.is_initial and self.spec.get("restartPolicy") == "Always"

    @property
    def command(self) -> tuple[str, ...]:
        """Its command and arguments."""
        return (*self.spec.get("command", ()), *self.spec.get("args", ()))

    @property
    def named_ports(self) -> Mapping[str, int]:
        """The ports that it opens and names. Nothing but its own probes finds those by name."""
        ports = self.spec.get("ports", ())
        return {port["name"]: port["containerPort"] for port in ports if "name" in port}

    @property
    def variables(self) -> list[Document]:
        """Its environment, variable by variable."""
        return list(self.spec.get("env", ()))


@dataclass(frozen=True)
class Pod:
    """The template of a pod."""

    owner: Document
    template: Document

    @property
    def name(self) -> str:
        """Kind and name of its owner, such as Deployment/memory."""
        return name_of(self.owner)

    @property
    def spec(self) -> Document:
        """Its specification."""
        return dict(self.template["spec"])

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels."""
        return dict(self.template["metadata"].get("labels", {}))

    @property
    def lives(self) -> bool:
        """Whether it runs for good."""
        return self.owner["kind"] in WORKLOADS

    @property
    def volumes(self) -> Mapping[str, Document]:
        """Its volumes by name; those that a StatefulSet claims are empty."""
        claims = self.owner["spec"].get("volumeClaimTemplates", ())
        return {claim["metadata"]["name"]: {} for claim in claims} | {
            volume["name"]: volume for volume in self.spec.get("volumes", ())
        }

    @cached_property
    def containers(self) -> tuple[Container, ...]:
        """All of them, those that come first included."""
        return tuple(
            Container(self, spec, is_initial=part == "initContainers")
            for part in ("initContainers", "containers")
            for spec in self.spec.get(part, ())
        )

    @property
    def ports(self) -> set[str | int]:
        """The ports that its containers open, by name and by number."""
        opened = [port for each in self.containers for port in each.spec.get("ports", ())]
        return {port["containerPort"] for port in opened} | {
            port["name"] for port in opened if "name" in port
        }


@dataclass(frozen=True)
class Manifests:
    """Everything that one overlay renders to."""

    documents: tuple[Document, ...]

    @classmethod
    def parse(cls, text: str) -> "Manifests":
        """Return what a file of YAML holds."""
        return cls(tuple(each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each))

    def of_kind(self, *kinds: str) -> Iterator[Document]:
        """Yield the documents of some kinds."""
        return (document for document in self.documents if document["kind"] in kinds)

    def named(self, kind: str) -> Mapping[str, Document]:
        """Return the documents of a kind by name."""
        return {document["metadata"]["name"]: document for document in self.of_kind(kind)}

    @cached_property
    def pods(self) -> tuple[Pod, ...]:
        """Every template of a pod."""
        direct = (Pod(each, each["spec"]["template"]) for each in self.of_kind(*WORKLOADS, "Job"))
        timed = (
            Pod(each, each["spec"]["jobTemplate"]["spec"]["template"])
            for each in self.of_kind("CronJob")
        )
        return (*direct, *timed)

    @property
    def containers(self) -> Iterator[Container]:
        """Every container of every pod."""
        return (container for pod in self.pods for container in pod.containers)

    def pod(self, name: str) -> Pod:
        """Return a pod by the name of its owner, such as Deployment/memory."""
        return next(pod for pod in self.pods if pod.name == name)

    @property
    def images(self) -> set[str]:
        """Every image that is named."""
        clusters = (each["spec"]["imageName"] for each in self.of_kind("Cluster"))
        return {container.spec["image"] for container in self.containers} | set(clusters)


def name_of(document: Document) -> str:
    """Return kind and name of a document."""
    return f"{document['kind']}/{document['metadata']['name']}"


def selects(selector: Document, labels: Mapping[str, str]) -> bool:
    """Tell whether a selector of labels takes a pod in."""
    wanted = selector.get("matchLabels", {})
    expressions: Iterable[Document] = selector.get("matchExpressions", ())
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _holds(expression, labels) for expression in expressions
    )


def _holds(expression: Document, labels: Mapping[str, str]) -> bool:
    value, operator = labels.get(expression["key"]), expression["operator"]
    if operator in ("In", "NotIn"):
        return (value in expression["values"]) is (operator == "In")
    return (value is not None) is (operator == "Exists")
