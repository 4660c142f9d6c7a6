"""What deploy/apply.sh waits for, and in which order: the script runs, the cluster takes notes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyrage import x25519

from deploy.rendering import RENDERED, TOOLS, WITHOUT_SECRETS, render, targets
from deploy.secrets import encrypt, new_values
from local.layout import CHECKOUT
from tests.needs import needs_kustomize

pytestmark = needs_kustomize

STORES = {
    "free": ["postgres", "valkey"],
    "local": ["postgres", "s3", "valkey"],
    "prod": [],
    "staging": ["s3", "valkey"],
}
"""By overlay, the stores that a StatefulSet runs."""
KEY = x25519.Identity.generate()
KUBECTL = f"""#!{sys.executable}
import os, sys, yaml
arguments = sys.argv[1:]
with open(os.environ["NOTES"], "a") as notes:
    print(*arguments, file=notes)
if "-" in arguments:
    sys.stdin.read()
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
    notes.touch()
    subprocess.run(
        [CHECKOUT / "deploy" / "apply.sh", overlay],
        env={
            "PATH": f"{directory}:{os.environ['PATH']}",
            "PYTHON": "true",
            "NOTES": str(notes),
            "CLUSTER": str(rendered),
            "SECRETS": str(directory),
            "SOPS_AGE_KEY": str(KEY),
        },
        check=True,
        timeout=60,
    )
    return notes.read_text().splitlines()


def keep_secrets(overlay: str, directory: Path) -> None:
    """Encrypt the secrets of an overlay, as people do before they deploy."""
    file = directory / f"{overlay}.enc.yaml"
    encrypt(new_values(overlay), file, [str(KEY.to_public())], TOOLS / "sops")


@pytest.mark.parametrize("overlay", STORES)
def test_the_migration_starts_when_every_store_is_ready(overlay: str, tmp_path: Path) -> None:
    if overlay not in WITHOUT_SECRETS:
        keep_secrets(overlay, tmp_path)
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


@pytest.mark.parametrize("overlay", [name for name in STORES if name not in WITHOUT_SECRETS])
def test_a_cluster_without_its_secrets_is_left_alone(overlay: str, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        asked_of_the_cluster(overlay, tmp_path)
    assert (tmp_path / "notes").read_text() == ""
