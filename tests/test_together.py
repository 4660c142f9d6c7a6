"""What shares a module's fixtures, or a mesh, is run by one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import WITH_A_MESH, group_of

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


@pytest.mark.parametrize("directory", WITH_A_MESH)
def test_a_directory_with_a_mesh_stays_together(directory: str) -> None:
    names = ("test_it.py::test_it[::1]", "test_that.py::test_it", "deeper/test_it.py::test_it")
    assert len({group_of(f"tests/{directory}/{name}") for name in names}) == 1


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
