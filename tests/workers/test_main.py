"""The worker as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shipped_models import NARROW, WIDE
from tests.workers.conftest import Mesh

CHECKOUT = Path(__file__).resolve().parents[2]


def test_missing_variable_is_named(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "workers"],
        cwd=CHECKOUT,
        env={"PYTHONPATH": "client", "KIMBERLY_CONCURRENCY": "none"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 78
    assert "KIMBERLY_OUTBOUND_SOCKET: Field required" in finished.stderr
    assert "KIMBERLY_CONCURRENCY: " in finished.stderr
    assert "Traceback" not in finished.stderr


def test_models_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    finished = subprocess.run(
        [sys.executable, "-m", "workers"],
        cwd=CHECKOUT,
        env={
            "PYTHONPATH": "client",
            "KIMBERLY_OUTBOUND_SOCKET": "none",
            "KIMBERLY_EMBEDDING_MODELS_DIRECTORY": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 78
    assert finished.stderr.startswith(f"KIMBERLY_EMBEDDING_MODELS_DIRECTORY: {tmp_path}/mine has")
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("has_models", [False, True])
async def test_process_ends_well_on_sigterm(
    mesh: Mesh, socket: Path, shipped_models: Path, has_models: bool
) -> None:
    told = {"KIMBERLY_EMBEDDING_MODELS_DIRECTORY": str(shipped_models)} if has_models else {}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "workers",
        cwd=CHECKOUT,
        env={"PYTHONPATH": "client", "KIMBERLY_OUTBOUND_SOCKET": str(socket), **told},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    while b'"working"' not in (line := await process.stderr.readline()):
        assert line, "the process ended"
    assert json.loads(line)["models"] == ([WIDE, NARROW] if has_models else [])
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 100) == 0
