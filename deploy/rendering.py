"""Renders overlays and has others check them: the schemas of Kubernetes, and its operators'."""

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from deploy.manifests import Manifests
from deploy.secrets import Values, new_values
from local.layout import CHECKOUT

KUSTOMIZE: Final = CHECKOUT / "kustomize"
RENDERED: Final = CHECKOUT / "build" / "render"
EVERY_DOCUMENT: Final = RENDERED / "every-document.yaml"
TOOLS: Final = CHECKOUT / "build" / "deploy" / "bin"
VERSIONS: Final = ("1.33", "1.35", "1.37")
"""Of Kubernetes: from the oldest that people still run to the newest that there are schemas for."""
WITHOUT_SECRETS: Final = ("prod",)
"""Its secrets come from Vault: the manifests must name every one."""

ZONES: Final = {"prod": 3}
"""Overlays that outlive the loss of a zone, and over how many they are spread."""


def targets() -> Mapping[str, Path]:
    """Return what can be rendered, by name."""
    found = (*KUSTOMIZE.glob("overlays/*"), *KUSTOMIZE.glob("tests/*"))
    return {path.name: path for path in sorted(found) if path.is_dir()}


def secrets_of(name: str) -> Values:
    """Return secrets such as the cluster of an overlay holds beside its manifests."""
    return {} if name in WITHOUT_SECRETS else new_values(name)


def render(path: Path) -> str:
    """Return what an overlay renders to.

    Raises:
        subprocess.CalledProcessError: It does not; kustomize has said why.
    """
    command = [str(TOOLS / "kubectl"), "kustomize", str(path)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def problems_of_schema(every: Iterable[Manifests]) -> Iterator[str]:
    """Yield what some version of Kubernetes that we support would not take.

    Most documents are the same in several overlays; each is looked at once.
    """
    unique = {json.dumps(each): each for manifests in every for each in manifests.documents}
    RENDERED.mkdir(parents=True, exist_ok=True)
    # As JSON, which is YAML too, and faster to read.
    EVERY_DOCUMENT.write_text("\n---\n".join(unique))
    program = str(TOOLS / "kubernetes-validate")
    running = {
        version: subprocess.Popen(
            # Without warnings: those are about operators' kinds, which have no schema here.
            [program, "-k", version, "--strict", "--quiet", "--no-warn", str(EVERY_DOCUMENT)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for version in VERSIONS
    }
    for version, process in running.items():
        said, _ = process.communicate()
        if process.returncode:
            yield f"Kubernetes {version}: {said.strip()}"
