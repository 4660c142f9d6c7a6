"""The worker as a process."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

from tests.workers.conftest import Mesh

CHECKOUT = Path(__file__).resolve().parents[2]


def test_missing_variable_is_named(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "workers"],
        cwd=CHECKOUT,
        env={"PYTHONPATH": "client", "KIMBERLY_CONCURRENCY": "none"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode == 78
    assert "KIMBERLY_OUTBOUND_SOCKET: Field required" in finished.stderr
    assert "KIMBERLY_CONCURRENCY: " in finished.stderr
    assert "Traceback" not in finished.stderr


async def test_process_ends_well_on_sigterm(mesh: Mesh, socket: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "workers",
        cwd=CHECKOUT,
        env={"PYTHONPATH": "client", "KIMBERLY_OUTBOUND_SOCKET": str(socket)},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    while b'"working"' not in (line := await process.stderr.readline()):
        assert line, "the process ended"
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 20) == 0
