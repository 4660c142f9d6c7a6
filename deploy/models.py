"""Holds custom resources against their operators' models; runs in build/policies.

Those of cert-manager and KEDA come from the operators. None of CloudNativePG's could be had: what
we use of it is written down below, from its API reference. External Secrets has models.mjs.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from cloudcoil.models.cert_manager import v1 as certificates
from cloudcoil.models.keda import v1alpha1 as keda
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel


class Part(BaseModel):
    """A part of a resource that knows no other fields than those named here."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, strict=True)


class InitDb(Part):
    """How the data directory is made."""

    encoding: str
    locale_provider: Literal["builtin", "icu", "libc"]
    builtin_locale: str
    locale: str
    data_checksums: bool


class Bootstrap(Part):
    """What the first instance starts with."""

    initdb: InitDb


class Synchronous(Part):
    """How many standbys a commit waits for."""

    method: Literal["any", "first"]
    number: int = Field(ge=1)
    data_durability: Literal["required", "preferred"]


class PostgreSql(Part):
    """What PostgreSQL is told."""

    parameters: dict[str, str]
    synchronous: Synchronous


class SecretName(Part):
    """A secret of the same namespace."""

    name: str


class Storage(Part):
    """The volume of an instance."""

    size: str


class Resources(Part):
    """What an instance asks for and may take."""

    requests: dict[str, str]
    limits: dict[str, str]


class Affinity(Part):
    """Where instances are in relation to each other."""

    enable_pod_anti_affinity: bool
    topology_key: str


class ClusterSpec(Part):
    """What we use of CloudNativePG 1.30."""

    instances: int = Field(ge=1)
    image_name: str
    enable_superuser_access: bool
    superuser_secret: SecretName
    bootstrap: Bootstrap
    postgresql: PostgreSql
    storage: Storage
    resources: Resources
    affinity: Affinity


class Cluster(Part):
    """PostgreSQL with standbys."""

    api_version: str
    kind: str
    metadata: dict[str, Any]
    spec: ClusterSpec


MODELS: dict[tuple[str, str], Any] = {
    ("cert-manager.io/v1", "Certificate"): certificates.Certificate,
    ("cert-manager.io/v1", "Issuer"): certificates.Issuer,
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("keda.sh/v1alpha1", "TriggerAuthentication"): keda.TriggerAuthentication,
    ("postgresql.cnpg.io/v1", "Cluster"): Cluster,
}


def problems(document: dict[str, Any]) -> Iterator[str]:
    """Yield what the model of a custom resource says; nothing of others."""
    model = MODELS.get((document["apiVersion"], document["kind"]))
    if model is None:
        return
    name = f"{document['kind']}/{document['metadata']['name']}"
    try:
        kept = model.model_validate(document)
    except ValidationError as error:
        yield f"{name}: {error}"
        return
    # A model passes over what it does not know: what does not come back was misspelt.
    back = kept.model_dump(by_alias=True, exclude_none=True, mode="json")
    for path in _lost(document, back, name):
        yield f"{path}: is no field"


def _lost(given: Any, kept: Any, path: str) -> Iterator[str]:
    if kept is None:
        yield path
    elif isinstance(given, dict):
        for key, value in given.items():
            yield from _lost(value, kept.get(key), f"{path}.{key}")
    elif isinstance(given, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{path}[{number}]")


def main(file: Path) -> int:
    """Print the problems of a file of JSON documents and return whether there are any."""
    documents = [json.loads(text) for text in file.read_text().split("\n---\n")]
    found = [problem for document in documents for problem in problems(document)]
    sys.stdout.writelines(f"{problem}\n" for problem in found)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
