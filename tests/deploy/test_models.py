"""Custom resources against models of their operators: what those do not know is said."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy import tools
from deploy.manifests import Manifests
from deploy.rendering import render, targets
from local.layout import CHECKOUT

# Of the slow part of `make render`, which a workflow runs before the tests.
needs_models = pytest.mark.skipif(
    not all((each / "installed").exists() for each in (tools.MODELS, tools.POLICIES.parent)),
    reason="make build/models/installed build/policies/installed brings models",
)
pytestmark = needs_models

Change = Callable[[dict[str, Any]], object]
OF_MODELS = [
    tool.command()[:-1] for tool in tools.SLOW if any("models." in word for word in tool.arguments)
]


def said_of(overlay: str, kind: str, change: Change, directory: Path) -> str:
    """Return what the models say of an overlay in which the first document of a kind is changed."""
    documents = Manifests.parse(render(targets()[overlay])).documents
    change(dict(next(each for each in documents if each["kind"] == kind)))
    file = directory / "documents.yaml"
    file.write_text("\n---\n".join(map(json.dumps, documents)))
    done = [
        subprocess.run(
            [*command, str(file)], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
        for command in OF_MODELS
    ]
    assert not any(each.stderr for each in done), [each.stderr for each in done]
    assert any(each.returncode for each in done) is any(each.stdout for each in done)
    return "".join(each.stdout for each in done)


@pytest.mark.parametrize("overlay", ["prod", "staging"])
def test_what_we_write_is_what_the_models_know(overlay: str, tmp_path: Path) -> None:
    assert len(OF_MODELS) == 2
    assert said_of(overlay, "Deployment", lambda _: None, tmp_path) == ""


CHANGES: list[tuple[str, str, Change, str]] = [
    (
        "prod",
        "ExternalSecret",
        lambda d: d["spec"].update(refreshIntervall="1h"),
        "spec.refreshIntervall: is no field",
    ),
    (
        "prod",
        "ExternalSecret",
        lambda d: d["spec"]["data"][0]["remoteRef"].pop("key"),
        'remoteRef: {"missingProperty":"key"}',
    ),
    (
        "prod",
        "SecretStore",
        lambda d: d["spec"]["provider"]["vault"].update(version="v3"),
        'version: {"allowedValues":["v1","v2"]}',
    ),
    ("prod", "ScaledObject", lambda d: d["spec"].update(cooldown=3), "cooldown: is no field"),
    (
        "staging",
        "Cluster",
        lambda d: d["spec"]["bootstrap"]["initdb"].update(dataChecksum=True),
        "dataChecksum",
    ),
    ("staging", "Cluster", lambda d: d["spec"].update(instances="3"), "valid integer"),
    ("staging", "Certificate", lambda d: d["spec"].update(uri=[]), "uri: is no field"),
]


@pytest.mark.parametrize(("overlay", "kind", "change", "said"), CHANGES)
def test_what_they_do_not_know_is_said(
    overlay: str, kind: str, change: Change, said: str, tmp_path: Path
) -> None:
    assert said in said_of(overlay, kind, change, tmp_path)
