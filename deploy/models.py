"""Holds custom resources against their operators' own models; runs in build/policies.

There are models of cert-manager and KEDA. None of CloudNativePG and External Secrets could be had:
nothing but people reads those.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloudcoil.models.cert_manager import v1 as certificates
from cloudcoil.models.keda import v1alpha1 as keda
from pydantic import ValidationError

MODELS: dict[tuple[str, str], Any] = {
    ("cert-manager.io/v1", "Certificate"): certificates.Certificate,
    ("cert-manager.io/v1", "Issuer"): certificates.Issuer,
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("keda.sh/v1alpha1", "TriggerAuthentication"): keda.TriggerAuthentication,
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
