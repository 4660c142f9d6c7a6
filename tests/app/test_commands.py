"""What the commands of the server say to the person who starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        cwd=CHECKOUT,
        env={"PATH": os.defpath, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'client'}", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("process", ["auth", "memory", "jobs", "migrate"])
def test_missing_settings_are_named(process: str) -> None:
    ended = run(process)
    assert ended.returncode == 78
    assert "KIMBERLY_" in ended.stderr
    assert "DATABASE_URL: Field required" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_wrong_settings_are_named_without_their_values() -> None:
    ended = run("memory", KIMBERLY_UNARY_SECONDS="-1", KIMBERLY_DATABASE_URL="postgresql://secret")
    assert "KIMBERLY_UNARY_SECONDS: Input should be greater than 0" in ended.stderr
    assert "secret" not in ended.stderr


def kimberly(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "kimberly.cli", *arguments],
        cwd=CHECKOUT,
        env={"PATH": os.defpath, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_kimberly_backup_is_the_command_of_the_server() -> None:
    path = f"{CHECKOUT}:{CHECKOUT / 'client'}"
    ended = kimberly("backup", "restore", "--at", "2026-05-04T12:00:00Z", path=path)
    assert ended.returncode == 78
    assert "KIMBERLY_BACKUP_IDENTITY_FILE: Field required" in ended.stderr
    shown = kimberly("backup", "verify", "--help", path=path)
    assert (shown.returncode, "--unsigned" in shown.stdout) == (0, True)


def test_a_client_alone_says_that_it_makes_no_backups(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise SystemExit('imported')")
    ended = kimberly("backup", "create", path=f"{CHECKOUT / 'client'}:{tmp_path}")
    assert ended.returncode == 2
    assert ended.stderr.startswith("the server is not here")


def test_help_lists_the_commands() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    for command in (
        "auth",
        "memory",
        "jobs",
        "migrate",
        "rotate-signing-key",
        "withdraw-signing-key",
        "rotate-data-keys",
        "settings",
    ):
        assert command in ended.stdout
