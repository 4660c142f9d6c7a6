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
        timeout=100,
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


def test_models_for_questions_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    nowhere = "postgresql://nobody@localhost:1/none"
    ended = run(
        "memory",
        KIMBERLY_DATABASE_URL=nowhere,
        KIMBERLY_SYSTEM_DATABASE_URL=nowhere,
        KIMBERLY_REDIS_URL="redis://localhost:1",
        KIMBERLY_S3_ENDPOINT="localhost:1",
        KIMBERLY_S3_ACCESS_KEY="none",
        KIMBERLY_S3_SECRET_KEY="none",
        KIMBERLY_LISTEN_SOCKET=str(tmp_path / "listen"),
        KIMBERLY_OUTBOUND_SOCKET=str(tmp_path / "outbound"),
        KIMBERLY_TOKEN_ISSUER="https://localhost:1",
        KIMBERLY_TRUST_DOMAIN="kimberly.local",
        KIMBERLY_NAMESPACE="test",
        KIMBERLY_MASTER_KEY_FILE=str(tmp_path / "master.key"),
        KIMBERLY_QUESTION_MODELS_DIRECTORY=str(tmp_path),
    )
    assert ended.returncode == 78, ended.stderr
    assert f"{tmp_path}/mine has no tokenizer.json" in ended.stderr
    assert "Traceback" not in ended.stderr


def kimberly(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "kimberly.cli", *arguments],
        cwd=CHECKOUT,
        env={"PATH": os.defpath, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
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
