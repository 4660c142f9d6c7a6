"""What shares a module's fixtures, or the watchers of a machine, is run by one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from tests.conftest import WITH_ENVOYS, group_of

CHECKOUT = Path(__file__).parent.parent
FILES = ("tests/billing/test_meters.py", "tests/jobs/test_retries.py", "tests/rpc/test_places.py")
RAN = re.compile(r"^\[(gw\d)\] .*PASSED (\S+?)::", re.MULTILINE)


def test_all_that_starts_envoys_stays_together() -> None:
    assert len({group_of(f"tests/{each}/test_it.py::test_it[::1]") for each in WITH_ENVOYS}) == 1


def test_every_file_is_run_by_one_of_several_processes(tmp_path: Path) -> None:
    command = ("-m", "pytest", "-n", "2", "--dist", "loadgroup", "-v", "--basetemp", tmp_path / "b")
    ended = subprocess.run(
        [sys.executable, *command, *FILES],
        cwd=CHECKOUT,
        env={**os.environ, "PYTEST_ADDOPTS": "-p no:cacheprovider"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    processes = defaultdict[str, set[str]](set)
    for process, file in RAN.findall(ended.stdout):
        processes[file].add(process)
    assert {file: len(of) for file, of in processes.items()} == dict.fromkeys(FILES, 1)
