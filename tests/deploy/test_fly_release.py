"""Fly.io: deploy/fly.sh does what it is for, in order, and the same once more."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from deploy import fly
from deploy.machine import MachineSettings
from deploy.pods import PodSettings
from deploy.secrets import documents
from local.layout import CHECKOUT
from server.settings import PREFIX, BackupSettings, MigrationSettings, ProvisionSettings, Settings
from tests.deploy.fly_apps import HOST, dry_run, environments, told, values
from workers.__main__ import Settings as WorkerSettings

FLYCTL = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
told = sys.stdin.read() if arguments[:2] == ["secrets", "import"] else ""
with open(os.environ["NOTES"], "a") as notes:
    print(*arguments, f"<{{len(told.splitlines())}} lines" if told else "", file=notes)
made = Path(os.environ["NOTES"] + ".made")
have = made.read_text().splitlines() if made.exists() else []
app = arguments[arguments.index("--app") + 1] if "--app" in arguments else ""
if arguments[:2] == ["apps", "create"]:
    made.write_text("\\n".join([*have, arguments[2]]))
elif arguments[0] == "status" and app not in have:
    sys.exit(1)
elif arguments[:2] == ["ips", "list"]:
    print(json.dumps([{{"Type": each}} for each in ("v4", "v6") if each in have]))
elif arguments[0] == "ips":
    made.write_text("\\n".join([*have, arguments[1].removeprefix("allocate-")]))
elif arguments[:2] == ["machine", "list"]:
    print('[{{"id": "d8901"}}]')
"""
"""An organization that has what was made, and takes whatever it is told."""
SOPS = f"""#!{sys.executable}
import os
print(open(os.environ["VALUES"]).read())
"""


def kinds_of(name: str) -> tuple[type[BaseSettings], ...]:
    """Return what reads the environment of an app."""
    match name:
        case "migration":
            return (ProvisionSettings, MigrationSettings)
        case "backup":
            return (BackupSettings,)
        case "edge":
            return (MachineSettings, PodSettings)
        case "worker":
            return (MachineSettings, PodSettings, WorkerSettings)
        case _:
            return (MachineSettings, PodSettings, Settings)


OF_THE_MACHINE = {
    "process": "auth",
    "pod_name": "d8901",
    "pod_ip": "fdaa::2",
    "listen_socket": "/tmp/kimberly/mesh/sockets/app",
    "outbound_socket": "/tmp/kimberly/mesh/sockets/out",
    "metrics_socket": "/tmp/kimberly/mesh/sockets/metrics",
    "master_key_file": "/tmp/kimberly/key/master.key",
}
"""What deploy.machine says by itself."""


@pytest.mark.parametrize("name", [name for name in fly.APPS if name not in fly.STORES])
def test_what_a_machine_is_told_is_what_its_programs_read(name: str) -> None:
    environment = environments()[name]
    read = set[str]()
    for kind in kinds_of(name):
        fields = {f"{PREFIX}{field}".upper(): field for field in kind.model_fields}
        read |= fields.keys()
        given = {fields[key]: value for key, value in environment.items() if key in fields}
        given |= {key: value for key, value in OF_THE_MACHINE.items() if key in kind.model_fields}
        kind.model_validate(given)
    assert environment.keys() <= read


def test_a_release_goes_in_order_names_images_by_digest_and_says_what_comes_next(
    tmp_path: Path,
) -> None:
    deployed = [
        command[command.index("--config") + 1]
        for command in dry_run()
        if command[:2] == ["flyctl", "deploy"]
    ]
    assert deployed == [f"fly/{name}.toml" for name in fly.APPS]
    for command in dry_run():
        if command[:2] == ["flyctl", "deploy"]:
            words = [word for word in command if "@digest" in word]
            # One image, or the two of which one is made.
            assert len(words) == (1 if "--image" in command else 2)
            assert "--no-public-ips" in command
    assert subprocess.run(
        [CHECKOUT / "deploy" / "fly.sh"], check=False, capture_output=True
    ).returncode


@pytest.fixture
def organization(tmp_path: Path) -> Callable[[], list[str]]:
    """Return what runs the script beside a flyctl that takes notes, and returns the notes."""
    checkout = tmp_path / "checkout"
    for folder in ("deploy", "fly", "secrets", "images", "kustomize", "local", "server", "workers"):
        shutil.copytree(CHECKOUT / folder, checkout / folder)
    for folder in ("client", "envoy"):
        (checkout / folder).symlink_to(CHECKOUT / folder)
    pins = checkout / "kustomize" / "components" / "images" / "kustomization.yaml"
    pins.write_text(re.sub(r"newTag: \S+", f"digest: sha256:{'a' * 64}", pins.read_text()))
    tools = checkout / "build" / "deploy" / "bin"
    tools.mkdir(parents=True)
    for path, text in ((tmp_path / "flyctl", FLYCTL), (tools / "sops", SOPS)):
        path.write_text(text)
        path.chmod(0o755)
    (checkout / "secrets" / "fly.enc.yaml").touch()
    (tmp_path / "values").write_text(documents(values()))

    def release() -> list[str]:
        notes = tmp_path / "notes"
        notes.unlink(missing_ok=True)
        subprocess.run(
            [checkout / "deploy" / "fly.sh", HOST],
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "PYTHON": sys.executable,
                "NOTES": str(notes),
                "VALUES": str(tmp_path / "values"),
            },
            check=True,
            timeout=300,
        )
        return notes.read_text().splitlines()

    return release


def test_a_second_release_makes_nothing_again_and_no_argument_is_a_secret(
    organization: Callable[[], list[str]],
) -> None:
    first, second = organization(), organization()
    assert len([line for line in first if line.startswith("apps create")]) == len(fly.APPS)
    assert len([line for line in first if line.startswith("ips allocate")]) == 2
    assert not [line for line in second if line.startswith(("apps create", "ips allocate"))]
    for name in fly.APPS:
        (imported,) = (
            line for line in second if f"secrets import --stage --app kimberly-{name} <" in line
        )
        assert imported.endswith(f"<{len(told(name))} lines")
    assert f"--image docker.io/valkey/valkey@sha256:{'a' * 64}" in "\n".join(second)
    secret = [value for value in told("auth").values() if len(value) > 20]
    assert not [line for line in first for value in secret if value in line]
    assert second[-1].startswith("machine update d8901 --app kimberly-backup --schedule daily")
