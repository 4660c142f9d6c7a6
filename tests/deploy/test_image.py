"""What the Dockerfile copies is enough to run, with what runtime.txt pins and nothing else."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy import images
from deploy.manifests import Manifests
from deploy.rendering import render, targets
from local.layout import CHECKOUT
from tests.needs import needs_kustomize

DOCKERFILE = CHECKOUT / "images" / "service" / "Dockerfile"

COPIED = re.compile(r"^COPY ([^-].*) (/app/\S+)$", re.MULTILINE)

OPTIONAL = {"_distutils_hack", "grpc_tools", "psutil"}
"""What setuptools, grpc and OpenTelemetry import where it happens to be."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder /app of the image, but for the packages of others."""
    root = tmp_path_factory.mktemp("image")
    for sources, target in COPIED.findall(DOCKERFILE.read_text().replace("\\\n", " ")):
        for source in sources.split():
            place = root / target.removeprefix("/")
            if (CHECKOUT / source).is_dir():
                shutil.copytree(CHECKOUT / source, place, dirs_exist_ok=True)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / source, place)
    return root / "app"


def run(image: Path, *arguments: str, **told: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=image,
        env={"PATH": os.defpath, "PYTHONPATH": f"{image}:{image / 'client'}", **told},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_kustomize
def test_every_command_of_the_manifests_starts_in_the_image(image: Path) -> None:
    manifests = Manifests.parse(render(targets()["local"]))
    commands = {
        container.command[1:]
        for container in manifests.containers
        if "kimberly" in container.spec["image"]
    }
    assert len(commands) == 11
    # Of machines of Fly.io, which have no manifests.
    for command in commands | {("-m", "deploy.machine", "serve", "auth")}:
        started = run(image, *command)
        # EX_CONFIG: it looked for its settings, so all of it was imported.
        assert started.returncode == 78, (command, started.stderr)
        assert "KIMBERLY_" in started.stderr


def test_the_image_writes_the_configuration_of_its_envoy(image: Path, tmp_path: Path) -> None:
    told = {
        "PROCESS": "memory",
        "POD_NAME": "memory-0",
        "POD_IP": "192.0.2.7",
        "TRUST_DOMAIN": "kimberly.local",
        "NAMESPACE": "kimberly",
        "TOKEN_ISSUER": "https://auth.kimberly.local",
        "TOKEN_AUDIENCE": "kimberly",
    }
    done = run(
        image,
        "-m",
        "deploy.pods",
        "--shared",
        str(tmp_path),
        **{f"KIMBERLY_{name}": value for name, value in told.items()},
    )
    assert done.returncode == 0, done.stderr
    assert "auth.kimberly.svc.cluster.local" in (tmp_path / "envoy.yaml").read_text()


def test_all_that_is_imported_is_pinned_for_the_image(image: Path) -> None:
    script = (
        "import json, sys, importlib\n"
        "for name in ('server.app', 'server.__main__', 'workers.__main__', 'deploy.machine'):\n"
        "    importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = run(image, "-c", script)
    assert done.returncode == 0, done.stderr
    of_packages = importlib.metadata.packages_distributions()
    imported = {
        name: {re.sub(r"[-_.]+", "-", each).lower() for each in of_packages[name]}
        for name in json.loads(done.stdout)
        if name in of_packages and name not in OPTIONAL
    }
    lines = (CHECKOUT / "requirements" / "runtime.txt").read_text()
    pinned = set(re.findall(r"^([\w-]+)==", lines, re.MULTILINE))
    assert {name for name, distributions in imported.items() if not distributions & pinned} == set()


# --- what runs is scanned ----------------------------------------------------------------------

DOCKER = f"""#!{sys.executable}
import sys
with open({{notes!r}}, "a") as notes:
    print(sys.argv[-1], file=notes)
sys.stdin.read()
sys.exit("envoy" in sys.argv[-1])
"""
"""A scanner that finds something in Envoy alone, and eats what it is not given."""


@pytest.fixture
def scan(tmp_path: Path) -> Callable[[], tuple[int, list[str]]]:
    """Scans the images of a checkout of its own; returns how that ended and what was looked at."""
    for part in ("images", "kustomize/components/images"):
        shutil.copytree(CHECKOUT / part, tmp_path / part)
    docker, notes = tmp_path / "docker", tmp_path / "notes"
    docker.write_text(DOCKER.format(notes=str(notes)))
    docker.chmod(0o755)
    notes.touch()

    def run_it() -> tuple[int, list[str]]:
        done = subprocess.run(
            [tmp_path / "images" / "scan.sh"],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
            check=False,
            timeout=60,
        )
        return done.returncode, notes.read_text().splitlines()

    return run_it


def test_every_image_of_a_release_is_scanned_and_what_is_found_in_one_fails(
    scan: Callable[[], tuple[int, list[str]]], tmp_path: Path
) -> None:
    component = tmp_path / images.FILE.relative_to(CHECKOUT)
    names = re.findall(r"(?m)^- name: (\w+)$", component.read_text())
    for number, name in enumerate(names):
        component.write_text(images.pinned(component.read_text(), name, f"sha256:{number:064}"))
    code, scanned = scan()
    assert code == 1
    assert scanned[0] == f"ghcr.io/kimberly/kimberly@sha256:{0:064}"
    assert [int(image.rpartition(":")[2]) for image in scanned] == list(range(len(names)))


def test_what_may_not_be_what_runs_is_not_scanned(
    scan: Callable[[], tuple[int, list[str]]],
) -> None:
    assert scan() == (2, [])


@pytest.mark.skipif(
    "KIMBERLY_BUILD_IMAGES" not in os.environ,
    reason="KIMBERLY_BUILD_IMAGES=DIRECTORY builds it there; takes root, buildah, debootstrap",
)
@pytest.mark.timeout(1200)
def test_the_dockerfiles_build_images_that_run() -> None:
    script = CHECKOUT / "images" / "build-offline.sh"
    done = subprocess.run(
        [str(script), os.environ["KIMBERLY_BUILD_IMAGES"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.endswith(" ok")]
    assert said == ["image     ok", "backups   ok"]
