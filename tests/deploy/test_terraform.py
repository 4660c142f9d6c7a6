"""What Terraform describes, as far as it can be told without the providers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.manifests import Manifests, Pod
from deploy.rendering import render, targets
from local.layout import CHECKOUT
from tests.needs import needs_kustomize, needs_terraform

ROOT = CHECKOUT / "terraform"


def terraform(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["terraform", *arguments, "-no-color"],
        cwd=directory,
        env={**os.environ, "TF_CLI_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_terraform
def test_files_are_formatted() -> None:
    checked = terraform(ROOT, "fmt", "-check", "-recursive")
    assert checked.returncode == 0, checked.stdout


@needs_terraform
def test_sizes_are_held_to_what_is_free(tmp_path: Path) -> None:
    module = shutil.copytree(ROOT / "modules" / "sizing", tmp_path / "sizing")
    assert terraform(module, "init", "-backend=false", "-input=false").returncode == 0
    for command in ("validate", "test"):
        done = terraform(module, command)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_kustomize
def test_what_runs_on_the_free_node_fits_into_it() -> None:
    """By what the pods ask for: limits may be more than there is, requests may not."""
    manifests = Manifests.parse(render(targets()["free"]))
    asked = [(pod.lives, *asked_for(pod)) for pod in manifests.pods]
    # What comes and goes is due at different hours: the largest of it has to fit beside the rest.
    cpu, memory = (
        sum(each[what] for each in asked if each[0])
        + max(each[what] for each in asked if not each[0])
        for what in (1, 2)
    )
    # k3s itself, cert-manager and the node take about half a core and 2 GiB.
    assert cpu <= 2000 - 500
    assert memory <= (12 - 2) * 1024


def asked_for(pod: Pod) -> tuple[int, int]:
    """Return what all replicas of a pod ask for: thousandths of a core, and mebibytes."""
    cpu = memory = 0
    # The first containers ask for less than the others together, and have ended by then.
    for container in (each for each in pod.containers if each.is_sidecar or not each.is_initial):
        requests = container.spec["resources"]["requests"]
        cpu += int(requests["cpu"].removesuffix("m"))
        mebibytes = requests["memory"].replace("Gi", " 1024").replace("Mi", " 1").split()
        memory += int(mebibytes[0]) * int(mebibytes[1])
    replicas = pod.owner["spec"].get("replicas", 1)
    return replicas * cpu, replicas * memory


@needs_kustomize
@pytest.mark.parametrize("environment", ["free", "staging"])
def test_backups_go_to_the_bucket_that_is_made_for_them(environment: str) -> None:
    described = (ROOT / "envs" / environment / "main.tf").read_text()
    (module,) = re.findall(r'(?ms)^module "backups" {.*?^}', described)
    maps = Manifests.parse(render(targets()[environment])).named("ConfigMap")
    (told,) = (each["data"] for name, each in maps.items() if name.startswith("backups-"))
    assert f'"{told["KIMBERLY_BACKUP_S3_BUCKET"]}"' in module
    # As the module has it: the tenancy and the region are whoever's.
    endpoint = r"\w+\.compat\.objectstorage\.([\w-]+)\.oraclecloud\.com"
    region = re.fullmatch(endpoint, told["KIMBERLY_BACKUP_S3_ENDPOINT"])
    assert region
    assert region[1] == told["KIMBERLY_BACKUP_S3_REGION"]


def test_production_lets_services_into_the_subnets_of_data() -> None:
    tested = (ROOT / "modules" / "sizing" / "sizing.tftest.hcl").read_text()
    (data,) = re.findall(r'data = "([\d./]+)"', tested)
    policy = CHECKOUT / "kustomize" / "overlays" / "prod" / "managed-stores-policy.yaml"
    assert f"cidr: {data}" in policy.read_text()
