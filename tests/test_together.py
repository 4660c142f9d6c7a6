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
FILES = 3
TESTS = 20
MANY = f"""
import pytest

@pytest.mark.parametrize("number", range({TESTS}))
def test_it(number):
    pass
"""
RAN = re.compile(r"^\[(gw\d)\] .*PASSED (\S+?)::", re.MULTILINE)


def test_all_that_starts_envoys_stays_together() -> None:
    assert len({group_of(f"tests/{each}/test_it.py::test_it[::1]") for each in WITH_ENVOYS}) == 1


def test_every_file_is_run_by_one_of_several_processes(tmp_path: Path) -> None:
    # Not ours: they would start servers in two more processes.
    (tmp_path / "tests").mkdir()
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_xdist_make_scheduler")
    for number in range(FILES):
        (tmp_path / "tests" / f"test_{number}.py").write_text(MANY)
    command = ("-m", "pytest", "-n", "2", "--dist", "loadgroup", "-v", "-p", "no:cacheprovider")
    ended = subprocess.run(
        [sys.executable, *command, f"--rootdir={tmp_path}", tmp_path / "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'client'}"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    processes = defaultdict[str, list[str]](list)
    for process, file in RAN.findall(ended.stdout):
        processes[file].append(process)
    assert len(processes) == FILES
    for of in processes.values():
        assert (len(of), len({*of})) == (TESTS, 1)
