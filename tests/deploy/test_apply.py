"""What deploy/apply.sh waits for, and in which order: the script runs, the cluster takes notes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import rendering
from deploy.rendering import RENDERED, render, targets
from local.layout import CHECKOUT

pytestmark = pytest.mark.skipif(
    not rendering.TOOLS.is_dir(), reason="make build/deploy/installed brings kustomize"
)

STORES = {
    "free": ["postgres", "valkey"],
    "local": ["postgres", "s3", "valkey"],
    "prod": [],
    "staging": ["s3", "valkey"],
}
"""By overlay, the stores that a StatefulSet runs."""
KUBECTL = f"""#!{sys.executable}
import os, sys, yaml
arguments = sys.argv[1:]
with open(os.environ["NOTES"], "a") as notes:
    print(*arguments, file=notes)
if "statefulsets" in arguments:
    label, _, value = arguments[arguments.index("-l") + 1].partition("=")
    for each in yaml.safe_load_all(open(os.environ["CLUSTER"])):
        about = each["metadata"]
        if each["kind"] == "StatefulSet" and about.get("labels", {{}}).get(label) == value:
            print("statefulset.apps/" + about["name"])
"""
"""A cluster that has what was applied, all of it ready."""


def asked_of_the_cluster(overlay: str, directory: Path) -> list[str]:
    """Return the commands to kubectl, in order. What is rendered is not pinned, nor checked."""
    RENDERED.mkdir(parents=True, exist_ok=True)
    rendered = RENDERED / f"{overlay}.yaml"
    rendered.write_text(render(targets()[overlay]))
    kubectl = directory / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    notes = directory / "notes"
    subprocess.run(
        [CHECKOUT / "deploy" / "apply.sh", overlay],
        env={
            "PATH": f"{directory}:{os.environ['PATH']}",
            "PYTHON": "true",
            "NOTES": str(notes),
            "CLUSTER": str(rendered),
        },
        check=True,
        timeout=60,
    )
    return notes.read_text().splitlines()


@pytest.mark.parametrize("overlay", STORES)
def test_the_migration_starts_when_every_store_is_ready(overlay: str, tmp_path: Path) -> None:
    asked = asked_of_the_cluster(overlay, tmp_path)
    (applied,) = (at for at, each in enumerate(asked) if "-l !kimberly/stage" in each)
    (migrating,) = (at for at, each in enumerate(asked) if "-l kimberly/stage=migrate" in each)
    (serving,) = (at for at, each in enumerate(asked) if "-l kimberly/stage=serve" in each)
    assert applied < migrating < serving
    between = asked[applied:migrating]
    waited = [each for each in between if "rollout status statefulset" in each]
    names = sorted(each.split("statefulset.apps/")[1].split()[0] for each in waited)
    assert names == STORES[overlay]
    assert any("clusters.postgresql.cnpg.io" in each for each in between) is (overlay == "staging")
    assert any("job/migration" in each for each in asked[migrating:serving])
